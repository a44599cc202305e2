"""One array into codes: how its blocks lie, and the codes themselves."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lora_jax.axes import AxisRoles
from lora_jax.base import along
from lora_jax.quantized.coded import Coded, stretched
from lora_jax.quantized.formats import Format, format_of
from lora_jax.sharding import fitted

_TINY = float(np.finfo(np.float32).tiny)
_SCALES_IN_A_BLOCK = 256  # of scales that are coded themselves


@dataclasses.dataclass(frozen=True)
class Coding:
    """A decision: in which format an array is stored, and how its blocks lie.

    Attributes:
      format: of the codes.
      axis: the axis that blocks lie along, counted from the end.
      block: the number of weights in a block.
    """

    format: Format
    axis: int
    block: int


def coding_of(
    shape: Sequence[int], format: str | Format = "nf4", roles: AxisRoles | None = None
) -> Coding | None:
    """Returns how an array of this shape is stored; None where no blocks fit, so it stays float.

    Blocks lie along the last in axis that they fit. They are as long as the format says where that
    divides the axis, or else as long as the divisor of its size that comes closest: from a quarter
    of it (or the whole axis) to double of it.

    Args:
      shape: of the array.
      format: a name, or a format of your own.
      roles: its axis roles; by default Flax's (the last axis out, the one before it in).

    Raises:
      ValueError: there is no such format.
    """
    format = format_of(format)
    in_axes = (-2,) if roles is None else roles.in_axes
    for axis in reversed(in_axes):
        if -axis <= len(shape) and (block := _block_of(shape[axis], format.block)):
            return Coding(format, axis, block)
    return None


def _block_of(size: int, wanted: int) -> int | None:
    if 1 < size <= wanted:
        return size
    fitting = [n for n in range(max(2, wanted // 4), 2 * wanted + 1) if size % n == 0]
    return min(fitting, key=lambda n: abs(math.log(n / wanted)), default=None)


def encode(
    array: Any,
    format: str | Format | Coding = "nf4",
    roles: AxisRoles | None = None,
    *,
    dtype: Any = None,
) -> Coded:
    """Returns an array in codes. For readers of files, tensor by tensor; see also `quantize`.

    Args:
      array: a NumPy or JAX array, or a tracer; a `jax.ShapeDtypeStruct` gives a `Coded` of those.
        Codes and scales lie on a mesh as the array does.
      format: a format or its name, or the decision of `coding_of` or `plan`.
      roles: the array's axis roles; by default Flax's (the last axis out, the one before it in).
      dtype: that the codes stand for an array of; the array's own by default.

    Raises:
      ValueError: no blocks fit the array.

    >>> kernel = jax.random.normal(jax.random.key(1), (128, 3))
    >>> coded = lj.quantized.encode(kernel, "int8")
    >>> coded
    Coded('int8', shape=(128, 3), dtype=float32)
    >>> jax.tree.map(jnp.shape, coded.arrays)
    {'codes': (128, 3), 'scales': (2, 3)}
    """
    coding = format if isinstance(format, Coding) else coding_of(array.shape, format, roles)
    if coding is None:
        raise ValueError(
            f"encode: no blocks of {format!r} fit an array of shape {tuple(array.shape)} along its "
            "in axes: leave it as it is, or give a Format with another block"
        )
    dtype = np.dtype(array.dtype if dtype is None else dtype)
    if isinstance(array, jax.core.Tracer):
        return _encoded(array, coding, dtype)
    abstract = jax.ShapeDtypeStruct(array.shape, array.dtype)
    result = jax.eval_shape(lambda array: _encoded(array, coding, dtype), abstract)
    sharding = getattr(array, "sharding", None)
    where = shardings_of(result, sharding) if isinstance(sharding, NamedSharding) else None
    if not isinstance(array, jax.ShapeDtypeStruct):
        places = None if where is None else tuple(jax.tree.leaves(where))
        encoder = _encoder(coding, dtype, jax.tree.structure(result), places)
        if places or len(array.shape) < 3 or coding.axis == -len(array.shape):
            return encoder(array)
        # Layer by layer: a CPU's compiler casts all of a bf16 array before it reduces it.
        layers = [encoder(array[i]) for i in range(array.shape[0])]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
    if where is None:
        return result
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), result, where
    )


def shardings_of(coded: Coded, of_array: NamedSharding) -> Coded:
    """Returns the sharding of each of the arrays of a `Coded`, from that of the array W.

    Args:
      coded: arrays, or their shapes.
      of_array: the sharding of W.
    """
    spec = [*of_array.spec, *[None] * (coded.ndim - len(of_array.spec))]
    mesh: Any = of_array.mesh

    def place(array: Any, axes: Sequence[int]) -> NamedSharding:
        picked = tuple(None if axis < 0 else spec[axis] for axis in axes)
        return fitted(picked, array.shape, mesh)

    return along(coded, place)


@functools.lru_cache(maxsize=256)
def _encoder(coding: Coding, dtype: Any, treedef: Any, places: Any) -> Any:
    how = {} if places is None else {"out_shardings": treedef.unflatten(places)}
    return jax.jit(lambda array: _encoded(array, coding, dtype), **how)


def _encoded(array: jax.Array, coding: Coding, dtype: Any) -> Coded:
    format, axis = coding.format, coding.axis % array.ndim
    n = array.shape[axis]
    apart = (*array.shape[:axis], n // coding.block, coding.block, *array.shape[axis + 1 :])
    blocks = array.reshape(apart)  # cast where each is read: no fp32 copy of the array
    scales = format.scales(jnp.max(jnp.abs(blocks), axis=axis + 1).astype(jnp.float32))
    divisor = jnp.expand_dims(jnp.maximum(scales.astype(jnp.float32), _TINY), axis + 1)
    scaled = jnp.clip(blocks.astype(jnp.float32) * (1 / divisor), -format.top, format.top)
    arrays = {"codes": format.codes(scaled).reshape(array.shape), "scales": scales}
    if format.double:
        arrays |= _doubled(scales, coding)
    return Coded(arrays, format, dtype)


def _doubled(scales: jax.Array, coding: Coding) -> dict[str, jax.Array]:
    """Returns scales as int8 steps from their mean along the axis of the blocks."""
    axis, n = coding.axis % scales.ndim, scales.shape[coding.axis]
    size = _block_of(n, _SCALES_IN_A_BLOCK) or n
    mean = jnp.mean(scales, axis=axis, keepdims=True)
    apart = (*scales.shape[:axis], n // size, size, *scales.shape[axis + 1 :])
    steps = jnp.max(jnp.abs((scales - mean).reshape(apart)), axis=axis + 1) / 127
    codes = jnp.round((scales - mean) / stretched(jnp.maximum(steps, _TINY), scales.shape))
    codes = jnp.clip(codes, -127, 127).astype(jnp.int8)
    return {"scales": codes, "scale_steps": steps, "scale_mean": mean}
