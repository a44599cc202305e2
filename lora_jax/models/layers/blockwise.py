"""Attention a block of queries at a time, in plain JAX: memory is linear in the length.

Unlike FlashAttention (Dao et al. 2022), a block of queries is multiplied with all its keys in one
product, so its softmax needs no running maximum, and forward mode works. As there, the backward
pass computes a block's scores again, and most products with keys that a causal mask hides are left
out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.types import Tree
from lora_jax.models.layers.attention import (
    AttentionInputs,
    Implementation,
    Softmax,
    add_sinks,
    soft_cap,
)
from lora_jax.models.layers.masks import Mask, MaskTokens, Split
from lora_jax.models.layers.paired import KEEPS_SUMS, attend_pair, name_sums, visible_tiles


@dataclasses.dataclass(frozen=True)
class Blockwise(Implementation):
    """Computes attention a block of queries at a time; see ``attend`` for the arguments.

    A causal sequence is cut into spans, and a block meets the keys up to the end of its span: with
    n spans, (n + 1) / 2n of all scores are computed. The blocks of a span are a loop, so the
    program does not grow with the length. Where a mask has a split, each device loops over pairs of
    blocks that see a row and a tile together; see ``lora_jax.models.layers.paired``.

    Attributes:
      block: queries per block. Scores are [batch, heads, block, keys] at a time, in fp32 (in the
        backward pass, too, unless a policy of rematerialisation keeps the results of all products).
      spans: spans of a causal sequence. More of them save products, and take memory and time to
        compile: on a GPU seconds each, so that ``ON_GPU`` has two. A sequence that is split over n
        devices has n at least.

    >>> from lora_jax.models.layers.blockwise import Blockwise
    >>> Blockwise(block=32)
    Blockwise(block=32, spans=8)
    """

    block: int = 64
    spans: int = 8

    def __post_init__(self) -> None:
        if self.block < 1 or self.spans < 1:
            raise ValueError(f"{self}: block and spans must be at least 1")

    def compute(self, inputs: AttentionInputs) -> jax.Array:
        q, k, v, mask, *_ = inputs
        batch, seq, _, head_dim = q.shape
        grouped = q.reshape(batch, seq, k.shape[2], -1, head_dim)
        keys, values = (x.transpose(0, 2, 1, 3) for x in (k, v))
        softmax = Softmax(inputs.factor, inputs.cap, inputs.sinks)
        if mask.causal and mask.split is not None and mask.split.paired:
            size = self._tile(seq // 2, mask.split)
            out = _attend_pairs(grouped, keys, values, mask, softmax, (size, self.block))
            return out.reshape(q.shape)
        skips = mask.causal and mask.aligned
        outs = []
        for start, stop in self._bounds(seq) if skips else [(0, seq)]:
            seen = stop if skips else k.shape[1]
            part = dataclasses.replace(
                mask,
                queries=mask.queries.take(start, stop - start),
                keys=mask.keys.take(0, seen),
            )
            spans = (grouped[:, start:stop], keys[:, :, :seen], values[:, :, :seen])
            outs.append(_attend_span(*spans, part, softmax, self.block))
        return jnp.concatenate(outs, axis=1).reshape(q.shape)

    def pairs(self, seq: int, split: Split | None = None) -> int:
        """Returns the number of scores that a head computes for a causal sequence.

        Args:
          seq: the number of tokens.
          split: how they are split over devices; the number counts all devices together.
        """
        if split is None:
            return sum((stop - start) * stop for start, stop in self._bounds(seq))
        if not split.paired:
            return seq**2
        size = self._tile(seq // (2 * split.parts), split)
        return seq // 2 * (seq + size)

    def _bounds(self, seq: int) -> list[tuple[int, int]]:
        """Returns start and end of each span: two blocks or more, whole but for the last.

        XLA removes a loop over a single block, and would then keep its scores after all.
        """
        blocks = -(-seq // self.block)
        size = max(2, -(-blocks // self.spans)) * self.block
        return [(start, min(start + size, seq)) for start in range(0, seq, size)]

    def _tile(self, chunk: int, split: Split) -> int:
        """Returns the number of queries of a tile: an equal part of a chunk, a block at least.

        A tile's pair of blocks costs as much as two blocks of a span.
        """
        parts = max(1, min(self.spans // split.parts, chunk // self.block))
        return chunk // max(n for n in range(1, parts + 1) if chunk % n == 0)


ON_GPU = Blockwise(spans=2)


def _attend_span(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: Mask,
    softmax: Softmax,
    block: int,
) -> jax.Array:
    """Computes attention of queries, block by block, to all of the given keys.

    Args:
      q: [batch, seq, kv_heads, group, head_dim].
      keys, values: [batch, kv_heads, keys, head_dim].
      mask: mask of these queries and keys.
      softmax: makes weights of scores.
      block: queries per block.

    Returns:
      As q.
    """

    def attend_queries(q: jax.Array, queries: MaskTokens) -> jax.Array:
        return _attend_block(q, keys, values, mask.visible(queries), softmax)

    return _map_blocks(attend_queries, q, mask.queries, block)


def _attend_pairs(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: Mask,
    softmax: Softmax,
    sizes: tuple[int, int],
) -> jax.Array:
    """Computes attention of a device's two chunks of queries, a tile of each at a time.

    The first tile of the first chunk goes with the last of the last, and so on.

    Args:
      q: [batch, 2 chunk, kv_heads, group, head_dim].
      keys, values: [batch, kv_heads, keys, head_dim], of the whole row.
      mask: mask of these queries and keys, with a split.
      softmax: makes weights of scores.
      sizes: queries per tile, as many keys, and queries per block.

    Returns:
      As q.
    """
    tile, block = sizes
    assert mask.split is not None, "pairs of tiles are those of a split"
    axis = mask.split.axis

    def tiles(tree: Tree, axis: int) -> Tree:
        return jax.tree.map(lambda x: x.reshape(_cut(x.shape, axis, tile)), tree)

    all_keys, all_values, tokens = tiles(keys, 2), tiles(values, 2), tiles(mask.keys, -1)
    mine, looking = tiles(q, 1), tiles(mask.queries, -1)
    count = mine.shape[1]
    outs = []
    for i in range(count // 2):
        first = lax.axis_index(axis) * (count // 2) + i
        seen = visible_tiles(first, all_keys, all_values, tokens)
        pair = (i, count - 1 - i)

        def attend_queries(q: jax.Array, queries: MaskTokens, seen: Any = seen) -> jax.Array:
            return attend_pair(q, queries, seen, mask, softmax)

        both = jnp.stack([mine[:, at] for at in pair], axis=2)
        queries = jax.tree.map(
            lambda x, pair=pair: jnp.stack([x[..., at, :] for at in pair], axis=-2), looking
        )
        outs.append(_map_blocks(attend_queries, both, queries, block))
    out = jnp.stack([x[:, :, 0] for x in outs] + [x[:, :, 1] for x in reversed(outs)], axis=1)
    return out.reshape(q.shape)


def _map_blocks(
    body: Callable[[jax.Array, MaskTokens], jax.Array],
    q: jax.Array,
    queries: MaskTokens,
    block: int,
) -> jax.Array:
    """Computes ``body``, again in the backward pass, for each block of q [batch, seq, …]."""
    run = jax.checkpoint(body, policy=KEEPS_SUMS)
    seq, outs = q.shape[1], []
    looped = seq - seq % block
    if looped:
        xs = _blocks(q[:, :looped], 1, block), _blocks(queries.take(0, looped), -1, block)
        out = jnp.moveaxis(lax.map(lambda x: run(*x), xs), 0, 1)
        outs.append(out.reshape(q.shape[0], looped, *q.shape[2:]))
    if rest := seq - looped:
        outs.append(run(q[:, looped:], queries.take(looped, rest)))
    return jnp.concatenate(outs, axis=1)


def _attend_block(
    q: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array, softmax: Softmax
) -> jax.Array:
    """Computes attention of a block; its mask is [batch, block, keys]. See ``_attend_span``."""
    batch, size, kv_heads, group, head_dim = q.shape
    scale, cap, sinks = softmax
    dtype = scale.dtype
    rows = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * size, head_dim)
    scores = jnp.einsum("bnqd,bnkd->bnqk", rows, keys, preferred_element_type=dtype)
    scores = soft_cap(scores.reshape(batch, kv_heads, group, size, -1) * scale, cap)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(dtype).min)
    # Division comes last, when there is less to divide. The maximum changes no result, and so
    # needs no derivative.
    largest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    largest, sink = add_sinks(largest, sinks, (kv_heads, group, 1, 1))
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True) + sink
    weights = weights.reshape(batch, kv_heads, group * size, -1).astype(values.dtype)
    out = jnp.einsum("bnqk,bnkd->bnqd", weights, values, preferred_element_type=dtype)
    out = (name_sums(out).reshape(batch, kv_heads, group, size, head_dim) / total).astype(q.dtype)
    return out.transpose(0, 3, 1, 2, 4)


def _blocks(tree: Tree, axis: int, size: int) -> Tree:
    """Cuts an axis of each leaf into blocks, and lets them lead."""

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(_cut(x.shape, axis, size)), axis % x.ndim, 0)

    return jax.tree.map(cut, tree)


def _cut(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    """Returns a shape, one axis of which is cut into parts of a size: [parts, size]."""
    at = axis % len(shape)
    return (*shape[:at], shape[at] // size, size, *shape[at + 1 :])
