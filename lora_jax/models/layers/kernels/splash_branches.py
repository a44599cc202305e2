"""Splash attention over prompts with several completions: two calls, joined by their sums.

The kernel tells tokens apart by segments alone, of which a token has one. So each token looks at
its own branch, then each token of a completion at its prompt, and the two results are joined by the
logarithms of their sums of weights. JAX's kernel has no derivative of these; but its backward pass,
given the joined result and sum, computes just what each part adds to the gradients.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from lora_jax.models.layers.attention import KERNEL_OUTPUT

CALLS = 2  # of the kernel, for a row of prompts and completions
_backward: Any = getattr(splash_attention_kernel, "_splash_attention_bwd", None)


def missing_derivative() -> str | None:
    """Returns the reason why this JAX lets nobody join calls of the kernel; None if it does."""
    return None if _backward else f"JAX {jax.__version__} hides the kernel's backward pass"


def attend_branches(
    kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, parts: list[kernels.SegmentIds]
) -> jax.Array:
    """Computes attention over several sets of keys, which are disjoint, by a call for each.

    Args:
      kernel: a splash attention kernel without sinks, [heads, queries] by [heads, keys].
      q: [heads, queries, head_dim], scaled.
      k, v: [kv_heads, keys, head_dim].
      parts: the segments of queries and of keys by which each call tells what is seen. A query sees
        a key in some call at least; where it sees none in one, that call adds nothing.

    Returns:
      As q.
    """
    options = {**kernel.kwargs, "residual_checkpoint_name": None}
    tables = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)

    @jax.custom_vjp
    def joined(tables: Any, q: jax.Array, k: jax.Array, v: jax.Array, parts: Any) -> Any:
        return forward(tables, q, k, v, parts)[0]

    def forward(tables: Any, q: jax.Array, k: jax.Array, v: jax.Array, parts: Any) -> Any:
        each = type(kernel)(tables[0], None, None, **{**options, "save_residuals": True})
        outs, residuals = zip(*(each(q, k, v, part) for part in parts), strict=True)
        sums = [of for (of,) in residuals]
        total = jax.nn.logsumexp(jnp.stack(sums), axis=0)
        weighted = [
            out * jnp.exp(of - total)[..., None] for out, of in zip(outs, sums, strict=True)
        ]
        out = checkpoint_name(sum(weighted).astype(q.dtype), KERNEL_OUTPUT)
        total = checkpoint_name(total, KERNEL_OUTPUT)
        return out, (tables, q, k, v, parts, out, total)

    def backward(kept: Any, cotangent: jax.Array) -> Any:
        tables, q, k, v, parts, out, total = kept
        slopes = []
        for part in parts:
            residuals = (q, k, v, part, None, out, total, *tables[1:])
            _, _, _, *slope, _, _ = _backward(**options, res=residuals, do=cotangent)
            slopes.append(slope)
        return None, *(sum(of) for of in zip(*slopes, strict=True)), None

    joined.defvjp(forward, backward)
    result: jax.Array = joined(tables, q, k, v, parts)
    return result
