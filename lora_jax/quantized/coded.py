"""A weight as codes and scales: a `lora_jax.core.base.Base`.

    W = s·v(c)              c the codes, v their values (`lora_jax.quantized.formats`)
    W = s·v(c) + m          of formats with a minimum for each block

All arrays have W's axes in W's order. Codes have W's shape. Of another array, an element stands for
as many elements of W along an axis as their sizes say: a scale for a block of 64, a mean for a
whole axis. So an array's shape says all about its blocks, and whatever cuts, indexes, stacks or
shards W's other axes does so to every array alike.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.typing import DTypeLike

from lora_jax.core.base import Move, is_of_4_bits
from lora_jax.core.parts import STATIC
from lora_jax.core.types import Shaped
from lora_jax.quantized.formats import FORMATS, Format


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Coded:
    """A weight in codes.

    Nothing is checked on construction: None, masks, shardings and tracers pass through.

    Attributes:
      arrays: by name:
        codes: codes of W's shape.
        scales: one for each block; where they are coded themselves (`Format.double`), int8.
        mins: one for each block, of a format that has them.
        scale_steps, scale_mean: fp32, where the scales are coded: s = step·code + mean.
      format: the format of the codes.
      dtype: dtype of W.
    """

    arrays: dict[str, Any]
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
        return tuple(n // m if m else 1 for n, m in pairs)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, two codes of 4 bits in one, as accelerators hold them."""
        return sum(bytes_of(array) for array in jax.tree.leaves(self))

    def as_array(self) -> jax.Array:
        """Returns W."""
        whole: jax.Array = _decoded(self.arrays, self.format, self.dtype)
        return whole

    def map(self, fn: Callable[..., Any], *others: "Coded") -> "Coded":
        """Returns the codes with ``fn(array, …)`` in the place of each array."""
        mapped: Coded = jax.tree.map(fn, self, *others)
        return mapped

    def along(self, move: Move, touched: frozenset[int]) -> "Coded | None":
        """Returns the codes after a move of all arrays; see `lora_jax.core.base.Base.along`."""
        whole = self.shape
        touched_sizes = ((x.shape[a], whole[a]) for x in self.arrays.values() for a in touched)
        if any(1 != n != size for n, size in touched_sizes):
            return None  # an element stands for a block along a touched axis

        def moved(array: Any) -> Any:
            sizes = array.shape
            if any(sizes[axis] != whole[axis] for axis in touched):
                sizes = [whole[a] if a in touched else n for a, n in enumerate(sizes)]
                array = jnp.broadcast_to(array, sizes)
            # What only places axes places blocks as well.
            held = [n == whole[a] or (not touched and n != 1) for a, n in enumerate(sizes)]
            return move(array, tuple(a if is_held else -1 for a, is_held in enumerate(held)))

        return self.map(moved)

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
    codes = arrays["codes"]
    values = format.values(codes) * stretched(scales_of(arrays), codes.shape)
    if "mins" in arrays:
        values += stretched(arrays["mins"].astype(jnp.float32), codes.shape)
    return values.astype(dtype)


def scales_of(arrays: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the scales of a `Coded`'s blocks, fp32, from its arrays."""
    scales = arrays["scales"].astype(jnp.float32)
    if "scale_steps" in arrays:
        steps = stretched(arrays["scale_steps"], scales.shape)
        scales = steps * scales + arrays["scale_mean"]
    return scales


def stretched(array: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Returns an array with each element repeated over its block, of size one where all share it.

    Args:
      array: its sizes divide `shape`.
      shape: shape of the result.
    """
    over = [n // m if 1 < m < n else 1 for n, m in zip(shape, array.shape, strict=True)]
    if all(n == 1 for n in over):
        return array
    sizes = [(m, n) if n > 1 else (m,) for m, n in zip(array.shape, over, strict=True)]
    apart = [n for pair in sizes for n in pair]
    first = [sum(map(len, sizes[:axis])) for axis in range(array.ndim)]
    spread = lax.broadcast_in_dim(array, apart, first)
    return spread.reshape([math.prod(pair) for pair in sizes])


def _written(values: Sequence[Any]) -> bytes:
    format, dtype = values
    if FORMATS.get(format.name) != format:
        raise ValueError(
            f"jax.export cannot write {format!r}, whose functions are your own; it writes "
            f"{', '.join(FORMATS)}"
        )
    return json.dumps([format.name, np.dtype(dtype).name]).encode()


def _read(text: bytes | bytearray) -> tuple[Format, Any]:
    name, dtype = json.loads(bytes(text))
    return FORMATS[name], jnp.dtype(dtype)


export.register_pytree_node_serialization(
    Coded,
    serialized_name="lora_jax.quantized.Coded",
    serialize_auxdata=_written,
    deserialize_auxdata=_read,
    from_children=lambda static, children: Coded(*children, *static),
)
