"""A quantized weight, as codes and scales: a `lora_jax.core.base.Base`.

    W = s·v(c)              c the codes, v their values (`lora_jax.quantized.formats`)
    W = s·v(c) + m          of formats with a minimum for each block

A code is the small number that is stored for an element of W. A block is a run of elements that
share a scale. To decode is to compute W from codes and scales; to expand an array is to repeat each
of its elements over the elements of W that it stands for.

All arrays have W's axes in W's order. Codes have W's shape. An element of another array stands for
as many elements of W along an axis as their sizes say: a scale for a block of 64, a mean for a
whole axis. So an array's shape says all about its blocks (beside `Format.partial`, where the last
block may have fewer elements), and whatever cuts, indexes, stacks or shards W's other axes does so
to every array alike.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import field

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.typing import DTypeLike

from lora_jax.core.base import Move, is_of_4_bits
from lora_jax.core.parts import STATIC
from lora_jax.core.types import EqnParams, Forward, Leaf, Shaped
from lora_jax.quantized.formats import FORMATS, Format
from lora_jax.quantized.ragged import RaggedKernel, find_ragged_kernel
from lora_jax.quantized.rows import RowsKernel, find_kernel

_TILE = 8  # rows of a TPU's register


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Coded:
    """A quantized weight: codes, scales and their format.

    Nothing is checked on construction: None, masks, shardings and tracers pass through.

    Attributes:
      arrays: by name:
        codes: codes of W's shape.
        scales: one for each block; where they are coded themselves, int8 (`Format.double`) or fp8;
            uint8 are places in `Format.scale_table`, or exponents of powers of two, E8M0's bits.
        mins: one for each block, of a format that has them.
        zeros: one for each block, of files that have them: W = s·(v(c) − zero).
        scale_steps, scale_mean: fp32, where the scales are coded: s = step·v(code) (+ mean).
        scale_divisor: fp32, in the place of steps: s = code / divisor.
      format: the format of the codes.
      dtype: dtype of W.
      allows_kernel: whether a kernel may read the codes; see `rows_kernel` and `ragged_kernel`.
    """

    arrays: dict[str, Leaf]
    format: Format = field(metadata=STATIC)
    dtype: DTypeLike = field(metadata=STATIC)
    allows_kernel: bool = field(metadata=STATIC, default=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W."""
        return tuple(self.arrays["codes"].shape)

    @property
    def ndim(self) -> int:
        """The number of axes of W."""
        return len(self.shape)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The size of a block along each axis of W."""
        axis_sizes = zip(self.shape, self.arrays["scales"].shape, strict=True)
        return tuple(self.format.span(size, n_blocks) for size, n_blocks in axis_sizes)

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays; two 4-bit codes take one byte, as on accelerators."""
        return sum(bytes_of(array) for array in jax.tree.leaves(self))

    def as_array(self) -> jax.Array:
        """Returns W."""
        weight: jax.Array = _decode(self.arrays, self.format, self.dtype)
        return weight

    def map(self, fn: Forward, *others: "Coded") -> "Coded":
        """Returns a `Coded` with ``fn(array, …)`` in place of each array."""
        mapped: Coded = jax.tree.map(fn, self, *others)
        return mapped

    def along(self, move: Move, touched: frozenset[int]) -> "Coded | None":
        """Returns the codes after a move of all arrays; see `lora_jax.core.base.Base.along`."""
        for array in self.arrays.values():
            if any(array.shape[axis] not in (1, self.shape[axis]) for axis in touched):
                return None  # an element stands for a block along a touched axis

        def move_array(array: Leaf) -> Leaf:
            """Moves one array, after broadcasting it along touched axes."""
            # Along a touched axis, an array of single elements is written out.
            if any(array.shape[axis] != self.shape[axis] for axis in touched):
                sizes = list(array.shape)
                for axis in touched:
                    sizes[axis] = self.shape[axis]
                array = jnp.broadcast_to(array, sizes)
            has_axis = [
                n_elements == size or (not touched and self._has_equal_blocks(n_elements, size))
                for n_elements, size in zip(array.shape, self.shape, strict=True)
            ]
            return move(array, tuple(axis if has_axis[axis] else -1 for axis in range(self.ndim)))

        return self.map(move_array)

    def _has_equal_blocks(self, n_blocks: int, size: int) -> bool:
        """Returns True if an axis of W has several blocks, which all have the same size.

        A move that only places axes may place such blocks, too.
        """
        return n_blocks != 1 and size == n_blocks * self.format.span(size, n_blocks)

    def rows_kernel(
        self, rows: Shaped, casts: tuple[DTypeLike, ...], params: EqnParams
    ) -> RowsKernel | None:
        """Returns the TPU kernel for few rows and a layer of this stack; see `find_kernel`."""
        return find_kernel(self, rows, casts, params) if self.allows_kernel else None

    def ragged_kernel(
        self, x: Shaped, casts: tuple[DTypeLike, ...], params: EqnParams
    ) -> RaggedKernel | None:
        """Returns the TPU kernel for sorted rows and these experts; see `find_ragged_kernel`."""
        return find_ragged_kernel(self, x, casts, params) if self.allows_kernel else None

    def __repr__(self) -> str:
        shape = getattr(self.arrays.get("codes"), "shape", None)
        return f"Coded({self.format.name!r}, shape={shape}, dtype={np.dtype(self.dtype).name})"


def bytes_of(array: Shaped) -> int:
    """Returns the bytes of an array; two 4-bit numbers take one byte."""
    bits: int = 4 if is_of_4_bits(array) else 8 * array.dtype.itemsize
    size: int = array.size
    return -(-size * bits // 8)


@functools.partial(jax.jit, static_argnames=("format", "dtype"), inline=True)
def _decode(arrays: Mapping[str, jax.Array], format: Format, dtype: DTypeLike) -> jax.Array:
    """Returns W from the arrays of a `Coded`."""
    if "scale_divisor" in arrays:  # XLA multiplies by the inverse of a single number
        divisors = jnp.broadcast_to(arrays["scale_divisor"], arrays["scales"].shape)
        arrays = {**arrays, "scale_divisor": lax.optimization_barrier(divisors)}
    values = format.values(arrays["codes"])
    weight: jax.Array = _scale_values(values, arrays, format, expand).astype(dtype)
    return weight


def host_array(coded: Coded) -> np.ndarray:
    """Returns W of a `Coded` of NumPy arrays, in fp32, rounded once.

    XLA returns zero for magnitudes below 2⁻¹²⁶, and NumPy does not.

    Args:
      coded: its codes are int4, or of 8 bits.
    """
    codes = coded.arrays["codes"]
    if is_of_4_bits(codes):
        all_codes = ((np.arange(16) ^ 8) - 8).astype(np.int8).astype(codes.dtype)
    else:
        all_codes = np.arange(256, dtype=np.uint8).view(codes.dtype)
    table = np.asarray(coded.format.values(jnp.asarray(all_codes)))
    with np.errstate(all="ignore"):
        values = table[codes.view(np.uint8) & (len(table) - 1)]
        return np.asarray(_scale_values(values, coded.arrays, coded.format, _expand_in_numpy))


def _scale_values(
    values: Leaf, arrays: Mapping[str, Leaf], format: Format, expand_fn: Forward
) -> Leaf:
    """Returns W in fp32, from the values of its codes and their scales.

    Args:
      values: fp32, of W's shape.
      arrays: arrays of a `Coded`.
      format: the format of the codes.
      expand_fn: `expand`, or `_expand_in_numpy` for arrays of NumPy.
    """
    if "zeros" in arrays:
        values = values - expand_fn(arrays["zeros"].astype(np.float32), values.shape)
    block = format.block if format.partial else None
    values = values * expand_fn(scales_of(arrays, format, expand_fn), values.shape, block)
    if "mins" in arrays:
        values = values + expand_fn(arrays["mins"].astype(np.float32), values.shape)
    return values


def scales_of(arrays: Mapping[str, Leaf], format: Format, expand_fn: Forward | None = None) -> Leaf:
    """Returns the scales of a `Coded`'s blocks, fp32.

    Args:
      arrays: arrays of the `Coded`, of JAX or NumPy.
      format: its format.
      expand_fn: `expand` by default, or `_expand_in_numpy` for arrays of NumPy.
    """
    scales = arrays["scales"]
    numpy_like = np if isinstance(scales, np.ndarray) else jnp
    if format.scale_table is not None:
        table = numpy_like.asarray(format.scale_table, np.float32)
        scales = numpy_like.take(table, scales.astype(np.int32), mode="clip")
    elif scales.dtype == np.uint8:
        scales = scales.view(jnp.float8_e8m0fnu)
    scales = scales.astype(np.float32)
    if "scale_divisor" in arrays:
        scales = scales / arrays["scale_divisor"]
    if "scale_steps" in arrays:
        steps = (expand_fn or expand)(arrays["scale_steps"], scales.shape)
        # A compiler would fuse a product and a sum and round once. The minimum prevents this.
        scales = numpy_like.minimum(steps * scales, np.finfo(np.float32).max)
    if "scale_mean" in arrays:
        scales = scales + arrays["scale_mean"]
    return scales


def _expand_in_numpy(
    array: np.ndarray, shape: Sequence[int], block: int | None = None
) -> np.ndarray:
    """Repeats each element over its block, as `expand` does, with NumPy."""
    for axis, size in enumerate(shape):
        n_blocks = array.shape[axis]
        if 1 < n_blocks < size:
            array = np.repeat(array, block or size // n_blocks, axis)
            array = array[(*[slice(None)] * axis, slice(size))]
    return array


def expand(array: jax.Array, shape: Sequence[int], block: int | None = None) -> jax.Array:
    """Repeats each element over its block, along every axis that has several blocks.

    An axis of size one stays as it is: it broadcasts.

    Args:
      array: an element for each block; its sizes divide `shape`, unless a block is given.
      shape: shape of W.
      block: the size of blocks along each axis that has several, the last of which may be smaller.
    """
    sizes = zip(shape, array.shape, strict=True)
    axes = [axis for axis, (size, n_blocks) in enumerate(sizes) if 1 < n_blocks < size]
    is_matrix = sum(n > 1 for n in shape) <= 2  # kernels of several experts are written anyway

    def has_partial_block(axis: int) -> bool:
        return shape[axis] % (block or 1) > 0

    # An axis with a partial block comes last: a TPU lays whole blocks along its lanes.
    for axis in sorted(reversed(axes), key=has_partial_block):
        size = shape[axis]
        span = block or size // array.shape[axis]
        piece = math.gcd(size, span)  # whole blocks and a partial block consist of such pieces
        if piece < span:
            array = _repeat(array, axis, span // piece)
            array = lax.slice_in_dim(array, 0, size // piece, axis=axis)
        if len(axes) > 1 or piece < span:  # the product's own kernel fuses the last step only
            array = lax.optimization_barrier(array)
        if piece % _TILE == 0 and is_matrix:
            array = lax.platform_dependent(
                array,
                tpu=functools.partial(_repeat_by_tiles, axis=axis, times=piece),
                default=functools.partial(_repeat, axis=axis, times=piece),
            )
        else:
            array = _repeat(array, axis, piece)
    return array


def _repeat_by_tiles(array: jax.Array, axis: int, times: int) -> jax.Array:
    """Repeats like `_repeat`, for TPUs: to whole tiles in memory, then within the product.

    The TPU's compiler decodes W within a product if the part of the scales that it takes at a time
    has whole tiles. Otherwise it writes arrays of W's size: W, its scales, or codes laid out anew.
    """
    tiles: jax.Array = lax.optimization_barrier(_repeat(array, axis, times // _TILE))
    return _repeat(tiles, axis, _TILE)


def _repeat(array: jax.Array, axis: int, times: int) -> jax.Array:
    """Repeats each element along an axis, like `jnp.repeat`."""
    shape = (*array.shape[: axis + 1], times, *array.shape[axis + 1 :])
    array_axes = [i for i in range(len(shape)) if i != axis + 1]
    repeated_shape = (*array.shape[:axis], array.shape[axis] * times, *array.shape[axis + 1 :])
    return lax.broadcast_in_dim(array, shape, array_axes).reshape(repeated_shape)


def _serialize(static: Sequence[Leaf]) -> bytes:
    """Returns the static fields of a `Coded` as JSON, for `jax.export`."""
    format, dtype, allows_kernel = static
    known = FORMATS.get(format.name)
    settings = {"block": format.block, "scale_table": format.scale_table}
    if known is None or dataclasses.replace(known, **settings) != format:
        raise ValueError(
            f"jax.export cannot write {format!r}, because its functions are your own. It can "
            f"write {', '.join(FORMATS)}."
        )
    return json.dumps([format.name, settings, np.dtype(dtype).name, allows_kernel]).encode()


def _deserialize(text: bytes | bytearray) -> tuple[Format, jnp.dtype, bool]:
    """Returns the static fields that `_serialize` wrote."""
    name, settings, dtype, *further = json.loads(bytes(text))
    if settings["scale_table"] is not None:
        settings["scale_table"] = tuple(settings["scale_table"])
    allows_kernel = all(further)  # earlier releases wrote three fields
    return dataclasses.replace(FORMATS[name], **settings), jnp.dtype(dtype), allows_kernel


export.register_pytree_node_serialization(
    Coded,
    serialized_name="lora_jax.quantized.Coded",
    serialize_auxdata=_serialize,
    deserialize_auxdata=_deserialize,
    from_children=lambda static, children: Coded(*children, *static),
)
