"""Attention a block of queries at a time, in plain JAX: memory is linear in the length.

Unlike FlashAttention (Dao et al. 2022), a block meets its keys in one product, so its softmax is
exact as it stands, and forward mode works. Like there, a block's scores are computed again in the
backward pass, and most products with keys that a causal mask hides are left out.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.models.layers.attention import score_scale, soft_cap
from lora_jax.models.layers.masks import Mask, Tokens


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """Computes attention a block of queries at a time; see ``attend`` for the arguments.

    A causal sequence is cut into spans, and a block meets the keys up to the end of its span: with
    n spans, (n + 1) / 2n of all scores are computed. The blocks of a span are a loop, so the
    program does not grow with the length.

    Attributes:
      block: queries per block. Scores are [batch, heads, block, keys] at a time, in fp32 (in the
        backward pass, too, unless a policy of rematerialisation keeps the results of all products).
      spans: spans of a causal sequence. More of them save products, and take memory and time to
        compile.

    >>> from lora_jax.models.layers.blockwise import Blockwise
    >>> Blockwise(block=64)
    Blockwise(block=64, spans=4)
    """

    block: int = 128
    spans: int = 4

    def __post_init__(self) -> None:
        if self.block < 1 or self.spans < 1:
            raise ValueError(f"{self}: block and spans must be at least 1")

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        scale: float | jax.Array | None = None,
        cap: float | None = None,
    ) -> jax.Array:
        batch, seq, _, head_dim = q.shape
        grouped = q.reshape(batch, seq, k.shape[2], -1, head_dim)
        keys, values = (x.transpose(0, 2, 1, 3) for x in (k, v))
        run = functools.partial(_span, scale=score_scale(q, scale), cap=cap, block=self.block)
        skips = mask.causal and mask.aligned
        outs = []
        for start, stop in self._bounds(seq) if skips else [(0, seq)]:
            seen = stop if skips else k.shape[1]
            part = dataclasses.replace(
                mask,
                queries=mask.queries.take(start, stop - start),
                keys=mask.keys.take(0, seen),
            )
            outs.append(run(grouped[:, start:stop], keys[:, :, :seen], values[:, :, :seen], part))
        return jnp.concatenate(outs, axis=1).reshape(q.shape)

    def pairs(self, seq: int) -> int:
        """Returns the number of scores that a head computes for a causal sequence."""
        return sum((stop - start) * stop for start, stop in self._bounds(seq))

    def _bounds(self, seq: int) -> list[tuple[int, int]]:
        """Returns start and end of each span, of whole blocks but for the last."""
        blocks = -(-seq // self.block)
        size = -(-blocks // self.spans) * self.block
        return [(start, min(start + size, seq)) for start in range(0, seq, size)]


def _span(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: Mask,
    *,
    scale: jax.Array,
    cap: float | None,
    block: int,
) -> jax.Array:
    """Computes attention of queries, block by block, to all of the given keys.

    Args:
      q: [batch, seq, kv_heads, group, head_dim].
      keys, values: [batch, kv_heads, keys, head_dim].
      mask: of these queries and keys.
      scale: [], the factor of the scores.
      cap: see ``soft_cap``.
      block: queries per block.

    Returns:
      As q.
    """

    @jax.checkpoint
    def one(q: jax.Array, queries: Tokens) -> jax.Array:
        return _block(q, keys, values, mask.visible(queries), scale, cap)

    seq, outs = q.shape[1], []
    looped = seq - seq % block
    if looped:
        xs = _blocks(q[:, :looped], 1, block), _blocks(mask.queries.take(0, looped), -1, block)
        out = jnp.moveaxis(lax.map(lambda x: one(*x), xs), 0, 1)
        outs.append(out.reshape(q.shape[0], looped, *q.shape[2:]))
    if rest := seq - looped:
        outs.append(one(q[:, looped:], mask.queries.take(looped, rest)))
    return jnp.concatenate(outs, axis=1)


def _block(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    visible: jax.Array,
    scale: jax.Array,
    cap: float | None,
) -> jax.Array:
    """Computes attention of one block; its mask is [batch, block, keys]. See ``_span``."""
    batch, size, kv_heads, group, head_dim = q.shape
    dtype = scale.dtype
    rows = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * size, head_dim)
    scores = jnp.einsum("bnqd,bnkd->bnqk", rows, keys, preferred_element_type=dtype)
    scores = soft_cap(scores.reshape(batch, kv_heads, group, size, -1) * scale, cap)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(dtype).min)
    # Division comes last, when there is less to divide. The maximum changes no result, and so
    # needs no derivative.
    weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.reshape(batch, kv_heads, group * size, -1).astype(values.dtype)
    out = jnp.einsum("bnqk,bnkd->bnqd", weights, values, preferred_element_type=dtype)
    out = (out.reshape(batch, kv_heads, group, size, head_dim) / total).astype(q.dtype)
    return out.transpose(0, 3, 1, 2, 4)


def _blocks(tree: Any, axis: int, size: int) -> Any:
    """Cuts an axis of each leaf into blocks, and lets them lead."""

    def cut(x: jax.Array) -> jax.Array:
        at = axis % x.ndim
        shape = (*x.shape[:at], x.shape[at] // size, size, *x.shape[at + 1 :])
        return jnp.moveaxis(x.reshape(shape), at, 0)

    return jax.tree.map(cut, tree)
