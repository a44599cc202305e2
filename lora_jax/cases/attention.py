"""Cases of attention: the masks that training uses, and their dense references.

Queries are rounded when they are scaled, then weights, the output and its cotangent, and the slopes
of scores, each by half a unit roundoff on average: four roundings are above what a result gets.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.cases.case import Case, normal
from lora_jax.models.layers.attend import Attend, Kernel, attend
from lora_jax.models.layers.attention import AttentionInputs, wide_dtype
from lora_jax.models.layers.cache import Cache
from lora_jax.models.layers.masks import Mask, bidirectional_mask
from lora_jax.models.layers.placement import UNPLACED, Placement
from lora_jax.models.layers.trunk import causal_mask, place_tokens

_ROUNDINGS = 4
_CACHED_TOKENS = 3  # tokens of a cache that are in use


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """A mask and the sizes of an attention call.

    Attributes:
      seq, batch, kv_heads, head_dim: sizes of the arrays; the batch is 2.
      group: heads of queries for each head of keys.
      causal, window, cap, scale: see ``attend``.
      padding: the side on which the second row is padded, "left" or "right"; None for none.
      packed: whether rows hold several texts.
      sinks: whether heads have sinks.
      branched: whether rows are prompts with three completions.
      slots: the number of slots of a cache; None for none.
    """

    seq: int
    batch: int = 2
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 7
    causal: bool = True
    padding: str | None = None
    packed: bool = False
    window: int | None = None
    cap: float | None = None
    scale: float | None = None
    sinks: bool = False
    branched: bool = False
    slots: int | None = None

    @property
    def present(self) -> np.ndarray:
        """[batch, seq] bool: the first row is whole, the second padded."""
        positions = np.arange(self.seq)
        n_padding = self.seq // 3
        is_padding = np.zeros(self.seq, bool)
        if self.padding == "left":
            is_padding = positions < n_padding
        if self.padding == "right":
            is_padding = positions >= self.seq - n_padding
        return np.stack([positions >= 0, ~is_padding])

    @property
    def branches(self) -> np.ndarray:
        """[batch, seq] int32: a prompt and three completions, of other lengths in each row."""
        ends = np.array([[3, 5, 8], [2, 6, 7]]) * self.seq // 10
        return _count_ends(ends, self.seq)

    @property
    def segments(self) -> np.ndarray:
        """[batch, seq] int32: several texts in each row."""
        middle = max(13, self.seq // 2)
        ends = np.array([[4, 11, middle, self.seq], [1, 9, self.seq, self.seq]])
        return _count_ends(ends, self.seq)

    def mask(self) -> Mask:
        """Returns the mask."""
        mask: Mask = _make_mask(self)
        return mask.branching(jnp.asarray(self.branches)) if self.branched else mask

    def arrays(self, dtype: DTypeLike = jnp.float32) -> tuple[np.ndarray, ...]:
        """Returns queries, keys and values."""
        n_heads = self.kv_heads * self.group
        key_shape = (self.batch, self.slots or self.seq, self.kv_heads, self.head_dim)
        q = normal(1, (self.batch, self.seq, n_heads, self.head_dim))
        return (
            (2 * q / np.sqrt(n_heads)).astype(dtype),
            (normal(2, key_shape) / np.sqrt(self.kv_heads)).astype(dtype),
            (normal(3, key_shape) / np.sqrt(self.kv_heads)).astype(dtype),
        )

    def head_sinks(self, dtype: DTypeLike = jnp.float32) -> np.ndarray | None:
        """Returns the sinks of heads, or None."""
        if not self.sinks:
            return None
        return (2 * normal(6, (self.kv_heads * self.group,))).astype(dtype)


def _count_ends(ends: np.ndarray, seq: int) -> np.ndarray:
    """Returns the number of ends before each position of each row, [batch, seq] int32."""
    positions = np.arange(seq)
    counts = [np.searchsorted(row_ends, positions, "right") for row_ends in ends]
    return np.stack(counts).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _make_mask(shape: AttentionShape) -> Mask:
    """Returns the mask without branches."""
    present = jnp.asarray(shape.present)
    if not shape.causal:
        return bidirectional_mask(present)
    segments = jnp.asarray(shape.segments) if shape.packed else None
    cache = None
    if shape.slots:
        positions = np.full((shape.batch, shape.slots), -1, np.int32)
        positions[:, :_CACHED_TOKENS] = [[0, 1, 2], [-1, 0, 1]]
        empty = jnp.zeros(())
        lengths = jnp.asarray([3, 2], jnp.int32)
        cache = Cache(empty, empty, jnp.asarray(positions), jnp.int32(_CACHED_TOKENS), lengths)
    ids = jnp.zeros(present.shape, jnp.int32)
    placed = place_tokens(ids, present, None, cache, segments)
    return causal_mask(placed, segments, cache).within(shape.window)


def shapes_of_masks(unit: int) -> dict[str, tuple[AttentionShape, bool | None]]:
    """Returns shapes by name, and whether a layer has the window where only some layers do.

    Args:
      unit: the number of tokens of the shortest row; a multiple of 16.
    """
    long = unit * 25 // 16  # is no multiple of a kernel's blocks
    grouped = functools.partial(AttentionShape, kv_heads=2, group=2)
    return {
        "causal": (AttentionShape(unit, kv_heads=2, group=1), None),
        "padded, packed, a window, capped": (
            AttentionShape(
                long,
                packed=True,
                padding="right",
                window=unit * 9 // 16,
                cap=1.5,
                kv_heads=1,
                group=3,
                sinks=True,
            ),
            None,
        ),
        "bidirectional": (
            grouped(unit * 19 // 16, causal=False, padding="left"),
            None,
        ),
        "prompts and completions": (
            AttentionShape(
                long,
                branched=True,
                packed=True,
                padding="right",
                cap=1.5,
                kv_heads=1,
                group=3,
            ),
            None,
        ),
        "a prompt and completions": (
            grouped(unit, branched=True, padding="left"),
            None,
        ),
        "a layer with a window": (
            AttentionShape(2 * unit, window=unit * 13 // 16, padding="left", kv_heads=1, group=2),
            True,
        ),
        "a layer without": (
            AttentionShape(2 * unit, window=unit * 13 // 16, padding="left", kv_heads=1, group=2),
            False,
        ),
        "padded": (grouped(unit, padding="left"), None),
        "packed": (grouped(unit, packed=True), None),
        "a window": (grouped(long, window=unit * 9 // 16), None),
        "capped": (grouped(unit, cap=1.5), None),
        "sinks": (grouped(unit, sinks=True), None),
        "grouped heads": (AttentionShape(unit, kv_heads=1, group=8), None),
    }


def values_and_gradients(
    shape: AttentionShape,
    attention: str | Attend,
    arrays: tuple[jax.Array, ...],
    sinks: jax.Array | None,
    *,
    mask: Mask | None = None,
    scale: float | jax.Array | None = None,
    placement: Placement = UNPLACED,
) -> tuple[jax.Array, ...]:
    """Returns attention of real tokens, and the gradients of queries, keys, values and sinks.

    Args:
      shape: the mask and the sizes.
      attention: an implementation; see ``attend``.
      arrays: queries, keys and values.
      sinks: the sinks, or None.
      mask: the mask; by default the shape's.
      scale: the factor of scores; see ``attend``.
      placement: see ``attend``.
    """
    mask = shape.mask() if mask is None else mask
    is_real = shape.present[..., None, None]
    # Its values are exact in bf16.
    exact = normal(4, arrays[0].shape, jnp.bfloat16).astype(np.float32)
    cotangent = np.where(is_real, exact / 4, 0.0).astype(np.float32)

    def weighted_sum(arrays: Any, sinks: Any) -> tuple[jax.Array, jax.Array]:
        q, k, v = arrays
        inputs = AttentionInputs(q, k, v, mask, scale, shape.cap, sinks)
        out = attend(inputs, attention=attention, placement=placement)
        wide = out.astype(wide_dtype(out.dtype))
        return jnp.sum(wide * cotangent), jnp.where(is_real, wide, 0.0)

    gradient = jax.value_and_grad(weighted_sum, argnums=(0, 1), has_aux=True)
    (_, out), (array_gradients, sink_gradient) = gradient(arrays, sinks)
    gradients = [*array_gradients]
    if sink_gradient is not None:
        gradients.append(sink_gradient)
    return out, *gradients


def attention_cases(
    kernel: Any, dtype: DTypeLike, *, unit: int = 1024, head_dim: int = 64
) -> list[Case]:
    """Returns the cases of an implementation of attention, the most important first.

    Args:
      kernel: an implementation, for its refusals; `Case.compare` takes it, too.
      dtype: the dtype of queries, keys and values.
      unit: the number of tokens of the shortest row.
      head_dim: the size of a head.
    """
    return [
        _attention_case(kernel, dtype, name, dataclasses.replace(shape, head_dim=head_dim), has)
        for name, (shape, has) in shapes_of_masks(unit).items()
    ]


def _attention_case(
    kernel: Any, dtype: DTypeLike, name: str, shape: AttentionShape, has_window: bool | None
) -> Case:
    """Returns the case of one shape; see `shapes_of_masks`."""

    def mask_of_layer() -> Mask:
        mask = shape.mask()
        if has_window is None:
            return mask
        return mask.within(shape.window, jnp.bool_(has_window))

    def compute(kernel: Any, arrays: Any, sinks: Any) -> Any:
        mask = mask_of_layer()
        return values_and_gradients(shape, kernel, arrays, sinks, mask=mask, scale=shape.scale)

    def compute_dense(arrays: Any, sinks: Any) -> Any:
        arrays, sinks = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, sinks))
        return compute("dense", arrays, sinks)

    arrays: Any = shape.arrays(dtype)
    sinks: Any = shape.head_sinks(dtype)
    q, k, v = arrays
    call = AttentionInputs(q, k, v, mask_of_layer(), None, shape.cap, sinks).call
    return Case(
        name=f"attention: {name}, {jnp.dtype(dtype).name}",
        arrays=(arrays, sinks),
        compute=compute,
        reference=compute_dense,
        dtype=dtype,
        roundings=_ROUNDINGS,
        terms=shape.seq * shape.group,
        refusal=kernel.refusal(call) if isinstance(kernel, Kernel) else None,
    )
