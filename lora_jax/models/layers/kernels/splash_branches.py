"""Splash attention over prompts with several completions: two calls, combined by softmax sums.

The kernel tells tokens apart by segments alone, of which a token has one. So each token looks at
its own branch, then each token of a completion at its prompt, and the two outputs are joined by the
logarithms of their sums of weights (`logsumexp`). JAX's kernel has no derivative of these; but its
backward pass, given the joined output and logsumexp, computes each call's terms of the gradients.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from lora_jax.models.layers.attention import KERNEL_OUTPUT
from lora_jax.models.layers.kernels.splash_backward import (
    Operands,
    compute_gradients,
    sum_products,
)

CALLS_WITH_BRANCHES = 2  # of the kernel, for a row of prompts and completions
_backward: Any = getattr(splash_attention_kernel, "_splash_attention_bwd", None)


def missing_derivative() -> str | None:
    """Returns the reason why this JAX version cannot combine kernel calls, or None."""
    return None if _backward else f"JAX {jax.__version__} hides the kernel's backward pass"


def attend_branches(
    kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, segment_sets: list[kernels.SegmentIds]
) -> jax.Array:
    """Computes attention over disjoint sets of keys, by one call for each set.

    Args:
      kernel: a splash attention kernel without sinks, [heads, queries] by [heads, keys].
      q: [heads, queries, head_dim], scaled.
      k, v: [kv_heads, keys, head_dim].
      segment_sets: the segments of queries and of keys in each call. A query sees a key in one call
        at least; a call in which it sees none adds nothing.

    Returns:
      As q.
    """
    options = {**kernel.kwargs, "residual_checkpoint_name": None}
    mask_tables = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)

    @jax.custom_vjp
    def joined(mask_tables: Any, q: jax.Array, k: jax.Array, v: jax.Array, segments: Any) -> Any:
        return forward(mask_tables, q, k, v, segments)[0]

    def forward(mask_tables: Any, q: jax.Array, k: jax.Array, v: jax.Array, segments: Any) -> Any:
        """Returns attention and the residuals of its gradient."""
        options_with_sums = {**options, "save_residuals": True}
        forward_kernel = type(kernel)(mask_tables[0], None, None, **options_with_sums)
        outputs = []
        logsumexps = []
        for segment_ids in segments:
            output, (logsumexp,) = forward_kernel(q, k, v, segment_ids)
            outputs.append(output)
            logsumexps.append(logsumexp)
        # Each output is weighted by the share of its call in the sum of all weights.
        total = jax.nn.logsumexp(jnp.stack(logsumexps), axis=0)
        weighted = [
            output * jnp.exp(logsumexp - total)[..., None]
            for output, logsumexp in zip(outputs, logsumexps, strict=True)
        ]
        out = checkpoint_name(sum(weighted).astype(q.dtype), KERNEL_OUTPUT)
        total = checkpoint_name(total, KERNEL_OUTPUT)
        return out, (mask_tables, q, k, v, segments, out, total)

    def backward(residuals: Any, cotangent: jax.Array) -> Any:
        """Returns the gradients of q, k and v, summed over the calls."""
        mask_tables, q, k, v, segments, out, total = residuals
        # Each call adds its terms to the gradients, given the joined output and logsumexp.
        gradients = []
        for segment_ids in segments:
            if mask_tables[2] is None:  # the backward pass is one kernel
                operands = Operands(
                    q=q,
                    k=k,
                    v=v,
                    segments=segment_ids,
                    logsumexp=total,
                    cotangent=cotangent,
                    products=sum_products(out, cotangent),
                )
                gradients.append(compute_gradients(mask_tables[0], options, operands))
                continue
            kernel_residuals = (q, k, v, segment_ids, None, out, total, *mask_tables[1:])
            _, _, _, dq, dk, dv, _, _ = _backward(**options, res=kernel_residuals, do=cotangent)
            gradients.append((dq, dk, dv))
        dq, dk, dv = (sum(terms) for terms in zip(*gradients, strict=True))
        return None, dq, dk, dv, None

    joined.defvjp(forward, backward)
    result: jax.Array = joined(mask_tables, q, k, v, segment_sets)
    return result
