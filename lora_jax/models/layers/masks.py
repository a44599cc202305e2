"""Attention masks described by token, so that only the needed blocks of a mask are computed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Slots: TypeAlias = Any  # numbers, or arrays of numbers: of NumPy, of JAX, or in a kernel
_PADDING_SEGMENT = jnp.iinfo(jnp.int32).min  # the segment of padding, where it needs one
MAX_BRANCHES = 1 << 10  # branches of a segment, its prompt included, that kernels tell apart


class MaskTokens(NamedTuple):
    """The mask's description of queries or of keys.

    Attributes:
      slots: [n] int32, the index among all keys, padding included.
      positions: [batch, n] int32, the place that a window counts by; of a key -1 where there is
        nothing to see. None for queries of a mask without a window.
      segments: [batch, n] int32, the segment; None where each row is one sequence.
      branches: [batch, n] int32 below `MAX_BRANCHES`, the branch of a segment: 0 is a prompt, which
        all see; each other number is a completion of it, which sees itself and the prompt.
        None where there are no branches.
    """

    slots: jax.Array
    positions: jax.Array | None
    segments: jax.Array | None = None
    branches: jax.Array | None = None

    def take(self, start: jax.Array | int, size: int) -> MaskTokens:
        """Returns ``size`` tokens from ``start`` on."""
        taken: MaskTokens = jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, start, size, -1), self
        )
        return taken


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a sequence's queries over several devices; each device has all keys.

    A function that gets a mask with a split runs in ``jax.shard_map``: the device's number is
    ``jax.lax.axis_index(split.axis)``.

    Attributes:
      axis: the axis of the mesh over which the queries are sharded.
      parts: the number of devices along it, n.
      paired: device i has chunks i and 2n - 1 - i of 2n, in this order, so that causal queries see
        equally many keys on every device; otherwise chunk i of n.

    >>> from lora_jax.models.layers.masks import Split
    >>> Split("sequence", 2, paired=True).slots(8).tolist()
    [[0, 1, 6, 7], [2, 3, 4, 5]]
    """

    axis: str
    parts: int
    paired: bool

    def slots(self, seq: int) -> np.ndarray:
        """Returns the slots of each device's queries, [n, seq / n], for ``seq`` queries in all."""
        slots = np.arange(seq, dtype=np.int32)
        if not self.paired:
            return slots.reshape(self.parts, -1)
        chunks = slots.reshape(2 * self.parts, -1)
        return np.concatenate([chunks[: self.parts], chunks[: self.parts - 1 : -1]], axis=1)

    def take(self, tokens: MaskTokens) -> MaskTokens:
        """Returns this device's slice of all tokens."""
        device_index = lax.axis_index(self.axis)
        n_tokens = tokens.slots.shape[0]
        if not self.paired:
            size = n_tokens // self.parts
            return tokens.take(device_index * size, size)
        size = n_tokens // (2 * self.parts)
        early_chunk = tokens.take(device_index * size, size)
        late_chunk = tokens.take((2 * self.parts - 1 - device_index) * size, size)
        pair: MaskTokens = jax.tree.map(
            lambda *chunks: jnp.concatenate(chunks, axis=-1), early_chunk, late_chunk
        )
        return pair


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("queries", "keys", "windowed"),
    meta_fields=("causal", "aligned", "window", "split"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """The keys that each query may see, without an array [seq, keys].

    Attributes:
      queries: the tokens that look.
      keys: the tokens that are looked at.
      window: a query sees keys whose positions lie less than this before its own; None for all.
      windowed: [] bool: whether the window holds, where only some layers have it; None if it does.
      causal: a query sees no key in a later slot than its own.
      aligned: query i has slot i and key j slot j, as without a cache, so that keys behind a block
        of causal queries need not be looked at. Without branches, positions are slots, too.
      split: the part of the queries that is on this device; None where all are. Then query i has
        the slot that ``split`` says, and key j slot j; ``aligned`` is False.
    """

    queries: MaskTokens
    keys: MaskTokens
    window: int | None = None
    windowed: jax.Array | None = None
    causal: bool
    aligned: bool
    split: Split | None = None

    def within(self, window: int | None, windowed: jax.Array | None = None) -> Mask:
        """Returns the mask with a sliding window, if any, that applies where ``windowed``."""
        return dataclasses.replace(self, window=window, windowed=windowed)

    def branching(self, branches: jax.Array) -> Mask:
        """Returns the mask for rows in which prompts precede several completions each.

        The positions of completions, by which windows count, each go on from their prompt's.

        Args:
          branches: [batch, seq] int32, of queries and keys; see ``MaskTokens``.
        """
        queries, keys = (x._replace(branches=branches) for x in (self.queries, self.keys))
        return dataclasses.replace(self, queries=queries, keys=keys)

    def visible(
        self, queries: MaskTokens | None = None, keys: MaskTokens | None = None
    ) -> jax.Array:
        """Returns [batch, queries, keys] bool: True where a query may see a key.

        Args:
          queries, keys: some of the mask's tokens; all of them by default.
        """
        queries = self.queries if queries is None else queries
        keys = self.keys if keys is None else keys
        if keys.positions is None:
            raise ValueError(
                "The keys of this mask have no positions. Pass keys with positions, which are -1 "
                "where there is nothing to see."
            )
        visible = (keys.positions >= 0)[:, None, :]
        if self.causal:
            visible = visible & (keys.slots[None, :] <= queries.slots[:, None])[None]
        if queries.segments is not None and keys.segments is not None:
            visible = visible & (queries.segments[:, :, None] == keys.segments[:, None, :])
        if queries.branches is not None and keys.branches is not None:
            is_same_branch = queries.branches[:, :, None] == keys.branches[:, None, :]
            is_prompt = (keys.branches == 0)[:, None, :]
            visible = visible & (is_same_branch | is_prompt)
        if self.window is not None:
            if queries.positions is None:
                raise ValueError(
                    "The queries of a mask with a window have no positions. Pass queries with "
                    "positions."
                )
            distance = queries.positions[:, :, None] - keys.positions[:, None, :]
            is_in_window = distance < self.window
            if self.windowed is not None:
                is_in_window = is_in_window | ~self.windowed
            visible = visible & is_in_window
        shape = (visible.shape[0], queries.slots.shape[0], keys.slots.shape[0])
        return jnp.broadcast_to(visible, shape)

    def segments(self) -> tuple[jax.Array, jax.Array]:
        """Returns segments of queries and keys, [batch, n] int32; padding has its own segment.

        For kernels that tell tokens apart by segments alone: a real token sees the real ones of its
        segment. Where there are branches, the last bits are the branch, and a token sees those of
        its ``prompt_segments``, too. The mask must be one without a cache.
        """
        if self.keys.positions is None:
            raise ValueError(
                "The keys of this mask have no positions. Pass keys with positions, which are -1 "
                "where there is nothing to see."
            )
        keys = _segments_with_padding(self.keys)
        if not self.aligned:
            return jnp.take(keys, self.queries.slots, axis=1), keys
        if self.queries.positions is None:
            return keys, keys
        return _segments_with_padding(self.queries), keys


def _segments_with_padding(tokens: MaskTokens) -> jax.Array:
    """Returns the segments of tokens with positions, in which padding has its own segment."""
    segments = jnp.int32(0) if tokens.segments is None else tokens.segments
    if tokens.branches is not None:
        segments = segments * MAX_BRANCHES + tokens.branches
    assert tokens.positions is not None, "the tokens have positions"
    return jnp.where(tokens.positions >= 0, segments, _PADDING_SEGMENT)


def prompt_segments(segments: Slots) -> Slots:
    """Returns the segment of each branch's prompt; see ``Mask.segments``."""
    return segments & -MAX_BRANCHES


def segments_that_see_prompts(queries: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns segments with which branches see only their prompts.

    Args:
      queries, keys: the result of ``Mask.segments`` for a mask with branches.
    """
    # Segments that differ from each other and from all others: such queries see no such keys.
    blind_query, hidden_key = jnp.int32(_PADDING_SEGMENT), jnp.int32(_PADDING_SEGMENT + 1)
    is_prompt_query = queries == prompt_segments(queries)
    is_prompt_key = (keys == prompt_segments(keys)) & (keys != _PADDING_SEGMENT)
    return (
        jnp.where(is_prompt_query, blind_query, prompt_segments(queries)),
        jnp.where(is_prompt_key, keys, hidden_key),
    )


def find_empty_and_full(
    low: Slots, high: Slots, first: Slots, last: Slots, *, causal: bool, window: Slots = None
) -> tuple[Slots, Slots]:
    """Returns two flags of a mask block: whether it is empty, and whether it is full.

    In an empty block, no query of slots low to high sees a key of slots first to last; in a full
    one, all queries see all keys. Distances in a block are a range, and so are the visible ones.
    Arrays broadcast.

    Args:
      low, high: the extreme slots of queries.
      first, last: the extreme slots of keys.
      causal, window: see ``Mask``.
    """
    min_distance = low - last
    max_distance = high - first
    is_empty = min_distance > max_distance  # False, in the shape of the arrays
    is_full = min_distance <= max_distance  # True
    if causal:
        is_empty = is_empty | (max_distance < 0)
        is_full = is_full & (min_distance >= 0)
    if window is not None:
        is_empty = is_empty | (min_distance >= window)
        is_full = is_full & (max_distance < window)
    return is_empty, is_full


def visited_blocks(
    slots: Slots,
    keys: Slots,
    sizes: tuple[int, int],
    *,
    causal: bool,
    window: Slots = None,
) -> Slots:
    """Returns [query blocks, key blocks] bool: False if no slot in a block sees another.

    Args:
      slots, keys: the slots of queries and of keys.
      sizes: queries and keys per block.
      causal, window: the mask's.
    """
    query_size, key_size = sizes
    query_blocks = slots.reshape(-1, query_size)
    key_blocks = keys.reshape(-1, key_size)
    is_empty, _ = find_empty_and_full(
        query_blocks.min(1)[:, None],
        query_blocks.max(1)[:, None],
        key_blocks.min(1),
        key_blocks.max(1),
        causal=causal,
        window=window,
    )
    # Without causality and a window, is_empty may have fewer axes.
    return ~(is_empty | np.zeros((query_blocks.shape[0], key_blocks.shape[0]), bool))


def visits_scope(visited: Sequence[int], blocks: int) -> str:
    """Returns the scope name of a kernel call, which plans parse: "blocks_3_of_4".

    Args:
      visited: numbers of blocks that it visits: of a layer without a window, and of one with it.
      blocks: the number of all blocks.
    """
    return f"blocks_{'_or_'.join(map(str, visited))}_of_{blocks}"


def bidirectional_mask(present: jax.Array) -> Mask:
    """Returns a mask in which every token sees all tokens that are not padding.

    Args:
      present: [batch, seq] bool, False at padding.
    """
    slots = jnp.arange(present.shape[1], dtype=jnp.int32)
    keys = MaskTokens(slots, jnp.where(present, slots, -1))
    return Mask(queries=MaskTokens(slots, None), keys=keys, causal=False, aligned=True)


def pad_rows(x: jax.Array, multiple: int) -> jax.Array:
    """Returns an array with axis 1 padded to a multiple of a size.

    Args:
      x: [batch, n, …], of floats, which get zeros; or of a mask's segments, which get padding's.
      multiple: the size.
    """
    pads = [(0, 0), (0, -x.shape[1] % multiple), *[(0, 0)] * (x.ndim - 2)]
    is_segments = jnp.issubdtype(x.dtype, jnp.integer)
    return jnp.pad(x, pads, constant_values=_PADDING_SEGMENT if is_segments else 0)
