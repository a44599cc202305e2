"""A weight as codes and scales: a `lora_jax.core.base.Base`.

    W = s·v(c)              c the codes, v their values (`lora_jax.quantized.formats`)
    W = s·v(c) + m          of formats with a minimum for each block

All arrays have W's axes in W's order. Codes have W's shape. Of another array, an element stands for
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
from lora_jax.quantized.rows import RowsKernel, find_kernel

_TILE = 8  # rows that a TPU holds side by side


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Coded:
    """A weight in codes.

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
    """

    arrays: dict[str, Leaf]
    format: Format = field(metadata=STATIC)
    dtype: DTypeLike = field(metadata=STATIC)

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
        pairs = zip(self.shape, self.arrays["scales"].shape, strict=True)
        return tuple(self.format.span(n, m) for n, m in pairs)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, two codes of 4 bits in one, as accelerators hold them."""
        return sum(bytes_of(array) for array in jax.tree.leaves(self))

    def as_array(self) -> jax.Array:
        """Returns W."""
        whole: jax.Array = _decoded(self.arrays, self.format, self.dtype)
        return whole

    def map(self, fn: Forward, *others: "Coded") -> "Coded":
        """Returns the codes with ``fn(array, …)`` in the place of each array."""
        mapped: Coded = jax.tree.map(fn, self, *others)
        return mapped

    def along(self, move: Move, touched: frozenset[int]) -> "Coded | None":
        """Returns the codes after a move of all arrays; see `lora_jax.core.base.Base.along`."""
        whole = self.shape
        touched_sizes = ((x.shape[a], whole[a]) for x in self.arrays.values() for a in touched)
        if any(1 != n != size for n, size in touched_sizes):
            return None  # an element stands for a block along a touched axis

        def moved(array: Leaf) -> Leaf:
            sizes = array.shape
            if any(sizes[axis] != whole[axis] for axis in touched):
                sizes = [whole[a] if a in touched else n for a, n in enumerate(sizes)]
                array = jnp.broadcast_to(array, sizes)
            # What only places axes places blocks as well, if they are all of one size.
            pairs = list(zip(sizes, whole, strict=True))
            even = [not touched and m != 1 and n == m * self.format.span(n, m) for m, n in pairs]
            held = [m == n or is_even for (m, n), is_even in zip(pairs, even, strict=True)]
            return move(array, tuple(a if is_held else -1 for a, is_held in enumerate(held)))

        return self.map(moved)

    def rows_kernel(
        self, rows: Shaped, casts: tuple[DTypeLike, ...], params: EqnParams
    ) -> RowsKernel | None:
        """Returns the TPU's kernel for rows and a layer of this stack; see `find_kernel`."""
        return find_kernel(self, rows, casts, params)

    def __repr__(self) -> str:
        shape = getattr(self.arrays.get("codes"), "shape", None)
        return f"Coded({self.format.name!r}, shape={shape}, dtype={np.dtype(self.dtype).name})"


def bytes_of(array: Shaped) -> int:
    """Returns the bytes of an array, two numbers of 4 bits in one."""
    bits: int = 4 if is_of_4_bits(array) else 8 * array.dtype.itemsize
    size: int = array.size
    return -(-size * bits // 8)


@functools.partial(jax.jit, static_argnames=("format", "dtype"), inline=True)
def _decoded(arrays: Mapping[str, jax.Array], format: Format, dtype: DTypeLike) -> jax.Array:
    if "scale_divisor" in arrays:  # XLA multiplies by the inverse of a single number
        each = jnp.broadcast_to(arrays["scale_divisor"], arrays["scales"].shape)
        arrays = {**arrays, "scale_divisor": lax.optimization_barrier(each)}
    formed = _formed(format.values(arrays["codes"]), arrays, format, stretched)
    whole: jax.Array = formed.astype(dtype)
    return whole


def host_array(coded: Coded) -> np.ndarray:
    """Returns W of a `Coded` of NumPy arrays, in fp32: the exact product, rounded once.

    XLA gives zero for what is below 2⁻¹²⁶, and NumPy does not.

    Args:
      coded: its codes are int4, or of 8 bits.
    """
    codes = coded.arrays["codes"]
    if is_of_4_bits(codes):
        every = ((np.arange(16) ^ 8) - 8).astype(np.int8).astype(codes.dtype)
    else:
        every = np.arange(256, dtype=np.uint8).view(codes.dtype)
    table = np.asarray(coded.format.values(jnp.asarray(every)))
    with np.errstate(all="ignore"):
        values = table[codes.view(np.uint8) & (len(table) - 1)]
        return np.asarray(_formed(values, coded.arrays, coded.format, _repeated))


def _formed(values: Leaf, arrays: Mapping[str, Leaf], format: Format, stretch: Forward) -> Leaf:
    """Returns W in fp32 from the values of its codes, by the functions of JAX or NumPy."""
    if "zeros" in arrays:
        values = values - stretch(arrays["zeros"].astype(np.float32), values.shape)
    block = format.block if format.partial else None
    values = values * stretch(scales_of(arrays, format, stretch), values.shape, block)
    if "mins" in arrays:
        values = values + stretch(arrays["mins"].astype(np.float32), values.shape)
    return values


def scales_of(arrays: Mapping[str, Leaf], format: Format, stretch: Forward | None = None) -> Leaf:
    """Returns the scales of a `Coded`'s blocks, fp32, from its arrays; by default, JAX's."""
    scales, table = arrays["scales"], format.scale_table
    of = np if isinstance(scales, np.ndarray) else jnp
    if table is not None:
        scales = of.take(of.asarray(table, np.float32), scales.astype(np.int32), mode="clip")
    elif scales.dtype == np.uint8:
        scales = scales.view(jnp.float8_e8m0fnu)
    scales = scales.astype(np.float32)
    if "scale_divisor" in arrays:
        scales = scales / arrays["scale_divisor"]
    if "scale_steps" in arrays:
        steps = (stretch or stretched)(arrays["scale_steps"], scales.shape)
        # Compilers join a product and a sum, and round once; a minimum between keeps them apart.
        scales = of.minimum(steps * scales, np.finfo(np.float32).max)
    return scales + arrays["scale_mean"] if "scale_mean" in arrays else scales


def _repeated(array: np.ndarray, shape: Sequence[int], block: int | None = None) -> np.ndarray:
    """Returns the result of `stretched`, by NumPy."""
    for axis, (n, m) in enumerate(zip(shape, array.shape, strict=True)):
        if 1 < m < n:
            array = np.repeat(array, block or n // m, axis)
            array = array[(*[slice(None)] * axis, slice(n))]
    return array


def stretched(array: jax.Array, shape: Sequence[int], block: int | None = None) -> jax.Array:
    """Returns an array with each element repeated over its block, of size one where all share it.

    Args:
      array: its sizes divide `shape`, unless a block is given.
      shape: shape of the result.
      block: the size of blocks along each axis that has several, the last of which may be smaller.
    """
    pairs = enumerate(zip(shape, array.shape, strict=True))
    axes = [axis for axis, (n, m) in pairs if 1 < m < n]
    is_one = sum(n > 1 for n in shape) <= 2  # kernels of several experts are written anyway
    # Last along an axis of partial blocks: a TPU lays whole ones along its lanes.
    for axis in sorted(reversed(axes), key=lambda axis: shape[axis] % (block or 1) > 0):
        size, n_blocks = shape[axis], array.shape[axis]
        over = block or size // n_blocks
        unit = math.gcd(size, over)
        if unit < over:  # a partial block: by parts of blocks, of which the axis has whole ones
            array = _spread(array, axis, over // unit)
            array = lax.slice_in_dim(array, 0, size // unit, axis=axis)
        if len(axes) > 1 or unit < over:  # the product's own kernel does the last step, and no more
            array = lax.optimization_barrier(array)
        if unit % _TILE == 0 and is_one:
            array = lax.platform_dependent(
                array,
                tpu=functools.partial(_spread_tiles, axis=axis, times=unit),
                default=functools.partial(_spread, axis=axis, times=unit),
            )
        else:
            array = _spread(array, axis, unit)
    return array


def _spread_tiles(array: jax.Array, axis: int, times: int) -> jax.Array:
    """Returns the array of `_spread`, for TPUs: in memory up to whole tiles, then in the product.

    The TPU's compiler forms W within a product if the part of the scales that it takes at a time
    has whole tiles. Otherwise it writes arrays of W's size: W, its scales, or codes laid out anew.
    """
    tiles: jax.Array = lax.optimization_barrier(_spread(array, axis, times // _TILE))
    return _spread(tiles, axis, _TILE)


def _spread(array: jax.Array, axis: int, times: int) -> jax.Array:
    """Returns an array with each element repeated along an axis."""
    apart = (*array.shape[: axis + 1], times, *array.shape[axis + 1 :])
    kept = [i for i in range(len(apart)) if i != axis + 1]
    joined = (*array.shape[:axis], array.shape[axis] * times, *array.shape[axis + 1 :])
    return lax.broadcast_in_dim(array, apart, kept).reshape(joined)


def _written(values: Sequence[Leaf]) -> bytes:
    format, dtype = values
    known = FORMATS.get(format.name)
    own = {"block": format.block, "scale_table": format.scale_table}
    if known is None or dataclasses.replace(known, **own) != format:
        raise ValueError(
            f"jax.export cannot write {format!r}, whose functions are your own; it writes "
            f"{', '.join(FORMATS)}"
        )
    return json.dumps([format.name, own, np.dtype(dtype).name]).encode()


def _read(text: bytes | bytearray) -> tuple[Format, jnp.dtype]:
    name, own, dtype = json.loads(bytes(text))
    table = own["scale_table"] and tuple(own["scale_table"])
    return dataclasses.replace(FORMATS[name], **own | {"scale_table": table}), jnp.dtype(dtype)


export.register_pytree_node_serialization(
    Coded,
    serialized_name="lora_jax.quantized.Coded",
    serialize_auxdata=_written,
    deserialize_auxdata=_read,
    from_children=lambda static, children: Coded(*children, *static),
)
