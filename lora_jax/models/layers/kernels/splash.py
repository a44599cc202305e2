"""Attention by JAX's TPU kernel, splash attention, without scores in memory.

The kernel visits blocks of queries and keys, and skips those that a mask hides completely. Tables,
made for causal masks and windows, list the blocks to visit; within a block the kernel computes the
mask from slots and segments. Padding is a segment of its own, so that real tokens see real tokens
only. The backward pass is a kernel of our own where its sums fit on the chip; see
``splash_backward``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu import splash_attention as kernels

from lora_jax.models.layers.attention import (
    KERNEL_OUTPUT,
    AttentionCall,
    AttentionInputs,
    Implementation,
)
from lora_jax.models.layers.blockwise import Blockwise
from lora_jax.models.layers.kernels.splash_backward import LANES, attend_fused, fits_chip
from lora_jax.models.layers.kernels.splash_branches import attend_branches, missing_derivative
from lora_jax.models.layers.masks import (
    Mask,
    Slots,
    Split,
    find_empty_and_full,
    segments_that_see_prompts,
    visited_blocks,
    visits_scope,
)

_WINDOWED = 1 << 30  # a bit of a query's slot: its layer has the window


@dataclasses.dataclass(frozen=True)
class Splash(Implementation):
    """Computes attention by the kernel; see ``attend`` for the arguments.

    A row whose length is no multiple of 128 is padded. Calls that the kernel does not support (see
    ``refusal``) go block by block in plain JAX. Scores and softmax are fp32; queries in half
    precision are rounded once more when they are scaled. There is no forward mode.

    Of prompts with several completions, it is called twice; see ``attend_branches``.

    Where only some layers have a window, one program serves all: tables are chosen at run time, and
    a bit in the slots of the queries tells the kernel.

    Attributes:
      block: queries and keys per block at most, a multiple of 128.
      fused: whether one kernel computes all gradients, where the chip's own memory holds those of a
        head's keys and values: up to 16,384 keys in half precision, with heads of at most 128.
        Otherwise, two kernels compute the gradients in more time.
      interpret: run the kernel in Python on any device, for tests.
      fallback: computes what the kernel refuses.

    >>> from lora_jax.models.layers.kernels.splash import Splash
    >>> Splash(block=256).pairs(512) / 512**2  # causal: three of four blocks
    0.75
    """

    block: int = 512
    fused: bool = True
    interpret: bool = False
    fallback: Blockwise = Blockwise()

    def __post_init__(self) -> None:
        if self.block < LANES or self.block % LANES:
            raise ValueError(f"{self} is not valid. Pass a block that is a multiple of {LANES}.")

    def refusal(self, call: AttentionCall) -> str | None:
        """Returns the reason why the kernel cannot run a call; None if it can."""
        reason = call.kernel_refusal((jnp.bfloat16, jnp.float32))
        if reason is None and call.branched:
            reason = _branches_refusal(call)
        if reason is not None or call.split is None:
            return reason
        chunk = _n_contiguous_queries(call.queries, call.split)
        if chunk % LANES:
            return f"a device has {chunk} tokens of a row at a time, no multiple of {LANES}"
        return None

    def pairs(
        self,
        seq: int,
        split: Split | None = None,
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> int:
        """Returns the number of scores per head for a row.

        Args:
          seq: the number of tokens.
          split: how they are split over devices; the number counts all devices together.
          causal, window: the mask's.
        """
        seq += -seq % LANES
        band = _Band(seq, seq, causal, window, split)
        visited, blocks = band.visits(*self._blocks(band))
        return seq**2 * visited // blocks

    def compute(self, inputs: AttentionInputs) -> jax.Array:
        """Computes attention by the kernel, or by the fallback if the kernel refuses the call."""
        if self.refusal(inputs.call):
            return self.fallback(*inputs)
        _, _, _, mask, _, cap, sinks = inputs
        _, seq, heads, _ = inputs.q.shape
        q, k, v, *segments = inputs._replace(q=inputs.scaled_queries).padded(LANES)
        fused = self.fused and fits_chip(k.shape[1], k.shape[3], v.shape[3], k.dtype)
        kernel, visits = self._kernel(heads, q.shape[1], k.shape[1], mask, cap, fused)
        if sinks is not None:
            sinks = sinks.astype(q.dtype)  # the kernel's gradient of them has this dtype
        branched = mask.keys.branches is not None

        def attend_row(row: tuple[jax.Array, ...]) -> jax.Array:
            """Computes attention of one row."""
            q, k, v = (x.transpose(1, 0, 2) for x in row[:3])
            segment_ids = kernels.SegmentIds(*row[3:])
            with jax.named_scope(visits):
                if branched:
                    prompt_ids = kernels.SegmentIds(*segments_that_see_prompts(*segment_ids))
                    out = attend_branches(kernel, q, k, v, [segment_ids, prompt_ids])
                elif fused:
                    out = attend_fused(kernel, q, k, v, segment_ids, sinks)
                else:
                    out = kernel(q, k, v, segment_ids, sinks)
            return out.transpose(1, 0, 2)

        # Row by row: the kernel writes 128 fp32 copies of each query's logsumexp.
        rows: jax.Array = lax.map(attend_row, (q, k, v, *segments))
        return rows[:, :seq]

    def _kernel(
        self, heads: int, queries: int, keys: int, mask: Mask, cap: float | None, fused: bool
    ) -> tuple[Any, str]:
        """Returns the kernel for a device's queries, and the number of blocks it visits.

        The kernel takes [heads, queries, head_dim]. It has a backward pass unless ``fused``. The
        number is for plans: "blocks_3_of_4"; "blocks_3_or_2_of_4" where a layer may have a window.
        """
        split = mask.split
        window = mask.window
        if window is not None and window >= keys:  # it hides nothing
            window = None
        if not mask.causal and window is None:  # each query sees all keys, on any device
            split = None
        parts = split.parts if split else 1
        band = _Band(parts * queries, keys, mask.causal, window, split)
        size, key_size = self._blocks(band)

        def make_kernel(band: _Band) -> Any:
            """Returns the kernel for a mask with or without the window."""
            sizes: dict[str, Any] = {"block_q": size, "block_kv": key_size}
            if not fused:
                sizes |= dict.fromkeys(("block_q_dkv", "block_q_dq"), size)
                sizes |= dict.fromkeys(("block_kv_dkv", "block_kv_dq"), key_size)
            hides = band.causal or band.window is not None
            kernel = kernels.make_splash_mha(
                kernels.MultiHeadMask(
                    [band if hides else kernels.FullMask((band.queries, band.keys))] * heads
                ),
                block_sizes=kernels.BlockSizes(**sizes),
                attn_logits_soft_cap=cap,
                head_shards=1,
                residual_checkpoint_name=KERNEL_OUTPUT,
                q_seq_shards=parts,
                interpret=self.interpret,
            )
            return jax.tree.map(lambda table: _take_device_part(table, split), kernel)

        n_visited, n_blocks = band.visits(size, key_size)
        if mask.windowed is None or window is None:  # the mask is the same in all layers
            return make_kernel(band), visits_scope([n_visited], n_blocks)
        # Layers with and without the window are one program, which selects a table at run time.
        windowed_band = dataclasses.replace(band, has_window=True)
        full_band = dataclasses.replace(band, has_window=False)
        select = functools.partial(_select_table, mask.windowed)
        kernel = jax.tree.map(select, make_kernel(windowed_band), make_kernel(full_band))
        n_visited_without_window, _ = full_band.visits(size, key_size)
        return kernel, visits_scope([n_visited_without_window, n_visited], n_blocks)

    def _blocks(self, band: _Band) -> tuple[int, int]:
        """Returns the numbers of queries and keys in a block."""
        chunk = band.queries
        if band.split is not None:
            chunk = _n_contiguous_queries(band.queries // band.split.parts, band.split)
        sizes = range(LANES, self.block + 1, LANES)
        query_size = max(size for size in sizes if chunk % size == 0)
        key_size = max(size for size in sizes if band.keys % size == 0)
        return query_size, key_size


def _branches_refusal(call: AttentionCall) -> str | None:
    """Returns the reason why the kernel cannot run a call with branches; None if it can."""
    if call.sinks:
        return "the sums of two calls, for prompts and completions, would each have the sinks"
    if call.split:
        return "the completions of a prompt lie on several devices"
    return missing_derivative()


def _n_contiguous_queries(queries: int, split: Split) -> int:
    """Returns the number of contiguous queries that a device has of a row."""
    return queries // 2 if split.paired else queries


def _take_device_part(table: jax.Array, split: Split | None) -> jax.Array:
    """Returns this device's slice of a kernel's table, [1, blocks, …] or [queries]."""
    if split is None:
        return table
    axis = 1 if table.ndim == 3 else 0
    size = table.shape[axis] // split.parts
    return lax.dynamic_slice_in_dim(table, lax.axis_index(split.axis) * size, size, axis)


def _select_table(
    windowed: jax.Array, windowed_table: jax.Array, full_table: jax.Array
) -> jax.Array:
    """Selects a table at run time, after padding both to one shape; padding means no visit."""
    shape = np.maximum(windowed_table.shape, full_table.shape)
    dtype = np.promote_types(windowed_table.dtype, full_table.dtype)

    def pad(table: jax.Array) -> jax.Array:
        padding = [(0, size) for size in shape - table.shape]
        return jnp.pad(table, padding).astype(dtype)

    return jnp.where(windowed, pad(windowed_table), pad(full_table))


@dataclasses.dataclass(frozen=True)
class _Band(kernels.Mask):
    """A mask by the distance between the slots of query and key, in the kernel's format.

    Attributes:
      queries, keys: the numbers of slots, on all devices together.
      causal, window, split: see ``lora_jax.models.layers.masks.Mask``.
      has_window: whether this layer has the window, where only some have; None where all do.
    """

    queries: int
    keys: int
    causal: bool
    window: int | None
    split: Split | None
    has_window: bool | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.queries, self.keys

    @functools.cached_property
    def slots(self) -> np.ndarray:
        """The slots of all queries, device by device: [queries] int32."""
        if self.split is None:
            return np.arange(self.queries, dtype=np.int32)
        return self.split.slots(self.queries).reshape(-1)

    @property
    def q_sequence(self) -> np.ndarray:
        """The slot of each query, with the window bit if this layer has the window."""
        return self.slots | np.int32(_WINDOWED) if self.has_window else self.slots

    @property
    def mask_function(self) -> _VisibilityFunction:
        return _VisibilityFunction(self.causal, self.window, self.has_window is not None)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        """Returns a block of the mask; all-True and all-False blocks are cheap."""
        rows, columns = index
        slots = self.slots[rows]
        start, stop, _ = columns.indices(self.keys)
        is_empty, is_full = find_empty_and_full(
            slots.min(), slots.max(), start, stop - 1, causal=self.causal, window=self._window
        )
        if is_empty or is_full:
            return _uniform_block(bool(is_full), (len(slots), stop - start))
        keys = np.arange(start, stop, dtype=np.int32)
        block: np.ndarray = self.mask_function(self.q_sequence[rows][:, None], keys[None])
        return block

    def visits(self, size: int, key_size: int) -> tuple[int, int]:
        """Returns the number of blocks that the kernel visits, and the number of all blocks."""
        sizes, keys = (size, key_size), np.arange(self.keys)
        visits = visited_blocks(self.slots, keys, sizes, causal=self.causal, window=self._window)
        return int(np.sum(visits)), visits.size

    @property
    def _window(self) -> int | None:
        return None if self.has_window is False else self.window


@dataclasses.dataclass(frozen=True)
class _VisibilityFunction:
    """A mask function that works on NumPy arrays and inside the kernel.

    Attributes:
      causal, window: see ``Mask``.
      reads_window_bit: whether the window holds for slots with the bit alone.
    """

    causal: bool
    window: int | None
    reads_window_bit: bool

    def __call__(self, slots: Slots, keys: Slots) -> Slots:
        queries = slots & (_WINDOWED - 1) if self.reads_window_bit else slots
        visible = queries >= keys if self.causal else queries == queries  # True for all queries
        if self.window is not None:
            is_in_window = queries - keys < self.window
            if self.reads_window_bit:
                is_in_window = is_in_window | (slots < _WINDOWED)
            visible = visible & is_in_window
        return visible


@functools.lru_cache(maxsize=16)
def _uniform_block(value: bool, shape: tuple[int, int]) -> np.ndarray:
    return np.full(shape, value)
