"""Attention one block of queries at a time, in plain JAX, with memory linear in the length.

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
    SoftmaxOptions,
    add_sinks,
    soft_cap,
)
from lora_jax.models.layers.masks import Mask, MaskTokens, Split
from lora_jax.models.layers.paired import KEEPS_SUMS, attend_pair, name_sums, visible_tiles


@dataclasses.dataclass(frozen=True)
class Blockwise(Implementation):
    """Computes attention one block of queries at a time; see ``attend`` for the arguments.

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
            raise ValueError(
                f"{self} is not valid. Pass a block and a number of spans of at least 1."
            )

    def compute(self, inputs: AttentionInputs) -> jax.Array:
        """Computes attention one block of queries at a time."""
        q, k, v, mask, *_ = inputs
        batch, seq, _, head_dim = q.shape
        grouped = q.reshape(batch, seq, k.shape[2], -1, head_dim)
        keys = k.transpose(0, 2, 1, 3)
        values = v.transpose(0, 2, 1, 3)
        softmax = SoftmaxOptions(inputs.factor, inputs.cap, inputs.sinks)
        # A device with an early and a late chunk of the row attends by pairs of tiles.
        if mask.causal and mask.split is not None and mask.split.paired:
            out = _attend_pairs(
                q=grouped,
                keys=keys,
                values=values,
                mask=mask,
                softmax=softmax,
                tile=self._tile(seq // 2, mask.split),
                block=self.block,
            )
            return out.reshape(q.shape)
        # Queries of a span see no keys behind the span, which are not multiplied.
        skips_hidden_keys = mask.causal and mask.aligned
        span_bounds = self._span_bounds(seq) if skips_hidden_keys else [(0, seq)]
        span_outputs = []
        for start, stop in span_bounds:
            n_keys = stop if skips_hidden_keys else k.shape[1]
            span_mask = dataclasses.replace(
                mask,
                queries=mask.queries.take(start, stop - start),
                keys=mask.keys.take(0, n_keys),
            )
            span_output = _attend_span(
                q=grouped[:, start:stop],
                keys=keys[:, :, :n_keys],
                values=values[:, :, :n_keys],
                mask=span_mask,
                softmax=softmax,
                block=self.block,
            )
            span_outputs.append(span_output)
        return jnp.concatenate(span_outputs, axis=1).reshape(q.shape)

    def pairs(self, seq: int, split: Split | None = None) -> int:
        """Returns the number of scores per head for a causal sequence.

        Args:
          seq: the number of tokens.
          split: how they are split over devices; the number counts all devices together.
        """
        if split is None:
            return sum((stop - start) * stop for start, stop in self._span_bounds(seq))
        if not split.paired:
            return seq**2
        size = self._tile(seq // (2 * split.parts), split)
        return seq // 2 * (seq + size)

    def _span_bounds(self, seq: int) -> list[tuple[int, int]]:
        """Returns the start and end of each span, which has two blocks or more.

        XLA removes a loop over a single block, and would then keep its scores after all.
        """
        blocks = -(-seq // self.block)
        size = max(2, -(-blocks // self.spans)) * self.block
        return [(start, min(start + size, seq)) for start in range(0, seq, size)]

    def _tile(self, chunk: int, split: Split) -> int:
        """Returns the number of queries in a tile: an equal part of a chunk, at least a block.

        A tile's pair of blocks costs as much as two blocks of a span.
        """
        max_tiles = max(1, min(self.spans // split.parts, chunk // self.block))
        n_tiles = max(n for n in range(1, max_tiles + 1) if chunk % n == 0)
        return chunk // n_tiles


ON_GPU = Blockwise(spans=2)


def _attend_span(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: Mask,
    softmax: SoftmaxOptions,
    block: int,
) -> jax.Array:
    """Computes attention from queries to all given keys, block by block.

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
    softmax: SoftmaxOptions,
    tile: int,
    block: int,
) -> jax.Array:
    """Computes attention of a device's two query chunks, one tile of each at a time.

    The first tile of the first chunk goes with the last of the last, and so on.

    Args:
      q: [batch, 2 chunk, kv_heads, group, head_dim].
      keys, values: [batch, kv_heads, keys, head_dim], of the whole row.
      mask: mask of these queries and keys, with a split.
      softmax: makes weights of scores.
      tile: queries per tile, and keys per tile.
      block: queries per block.

    Returns:
      As q.
    """
    assert mask.split is not None, "pairs of tiles are those of a split"

    def cut_into_tiles(tree: Tree, axis: int) -> Tree:
        return jax.tree.map(lambda x: x.reshape(_cut_shape(x.shape, axis, tile)), tree)

    key_tiles = cut_into_tiles(keys, 2)  # [batch, kv_heads, tiles, tile, head_dim]
    value_tiles = cut_into_tiles(values, 2)
    key_tokens = cut_into_tiles(mask.keys, -1)
    query_tiles = cut_into_tiles(q, 1)  # [batch, tiles, tile, kv_heads, group, head_dim]
    query_tokens = cut_into_tiles(mask.queries, -1)
    n_tiles = query_tiles.shape[1]
    n_pairs = n_tiles // 2
    pair_outputs = []
    for early in range(n_pairs):
        late = n_tiles - 1 - early
        tile_of_row = lax.axis_index(mask.split.axis) * n_pairs + early
        visible = visible_tiles(tile_of_row, key_tiles, value_tiles, key_tokens)

        def attend_queries(q: jax.Array, queries: MaskTokens, visible: Any = visible) -> jax.Array:
            return attend_pair(q, queries, visible, mask, softmax)

        def stack_pair(x: jax.Array, early: int = early, late: int = late) -> jax.Array:
            return jnp.stack([x[..., early, :], x[..., late, :]], axis=-2)

        # [batch, tile, 2, kv_heads, group, head_dim]
        pair = jnp.stack([query_tiles[:, early], query_tiles[:, late]], axis=2)
        pair_tokens = jax.tree.map(stack_pair, query_tokens)
        pair_outputs.append(_map_blocks(attend_queries, pair, pair_tokens, block))
    # The late tiles were taken from the last one on, and are put back into their order.
    early_outputs = [pair[:, :, 0] for pair in pair_outputs]
    late_outputs = [pair[:, :, 1] for pair in reversed(pair_outputs)]
    return jnp.stack(early_outputs + late_outputs, axis=1).reshape(q.shape)


def _map_blocks(
    body: Callable[[jax.Array, MaskTokens], jax.Array],
    q: jax.Array,
    queries: MaskTokens,
    block: int,
) -> jax.Array:
    """Computes ``body`` for each block of q, and recomputes it in the backward pass."""
    run_block = jax.checkpoint(body, policy=KEEPS_SUMS)
    seq = q.shape[1]
    n_looped = seq - seq % block  # queries in full blocks
    outputs = []
    # Full blocks are one loop, whose program does not grow with the length.
    if n_looped:
        query_blocks = _cut_into_blocks(q[:, :n_looped], 1, block)
        token_blocks = _cut_into_blocks(queries.take(0, n_looped), -1, block)
        out = lax.map(lambda arrays: run_block(*arrays), (query_blocks, token_blocks))
        outputs.append(jnp.moveaxis(out, 0, 1).reshape(q.shape[0], n_looped, *q.shape[2:]))
    if n_looped < seq:  # the rest is a smaller block
        outputs.append(run_block(q[:, n_looped:], queries.take(n_looped, seq - n_looped)))
    return jnp.concatenate(outputs, axis=1)


def _attend_block(
    q: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array, softmax: SoftmaxOptions
) -> jax.Array:
    """Computes attention of one block; ``visible`` is [batch, block, keys]."""
    batch, size, kv_heads, group, head_dim = q.shape
    scale, cap, sinks = softmax
    dtype = scale.dtype
    # Query heads that share keys are multiplied together: [batch, kv_heads, group * size, head_dim]
    stacked_q = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * size, head_dim)
    scores = jnp.einsum("bnqd,bnkd->bnqk", stacked_q, keys, preferred_element_type=dtype)
    # [batch, kv_heads, group, size, keys]
    scores = soft_cap(scores.reshape(batch, kv_heads, group, size, -1) * scale, cap)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(dtype).min)
    # Division comes last, when there is less to divide. The maximum changes no result, and so
    # needs no derivative.
    largest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    largest, sink = add_sinks(largest, sinks, (kv_heads, group, 1, 1))
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True) + sink
    # The weights multiply the values; the sums are divided by the total of the weights.
    weights = weights.reshape(batch, kv_heads, group * size, -1).astype(values.dtype)
    sums = jnp.einsum("bnqk,bnkd->bnqd", weights, values, preferred_element_type=dtype)
    out = name_sums(sums).reshape(batch, kv_heads, group, size, head_dim) / total
    return out.astype(q.dtype).transpose(0, 3, 1, 2, 4)


def _cut_into_blocks(tree: Tree, axis: int, size: int) -> Tree:
    """Splits an axis of each leaf into blocks, and moves the block axis to the front."""

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(_cut_shape(x.shape, axis, size)), axis % x.ndim, 0)

    return jax.tree.map(cut, tree)


def _cut_shape(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    """Returns a shape with one axis split into [parts, size]."""
    axis = axis % len(shape)
    return (*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])
