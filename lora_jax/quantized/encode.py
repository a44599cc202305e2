"""One array into codes: how its blocks lie, and the codes themselves."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from lora_jax.core.axes import AxisRoles
from lora_jax.core.base import along
from lora_jax.core.types import Forward, Leaf, Shaped, Tree
from lora_jax.quantized.coded import Coded, scales_of, stretched
from lora_jax.quantized.formats import Format, format_of
from lora_jax.sharding import sharding_for

_TINY = float(np.finfo(np.float32).tiny)
_SCALES_IN_A_BLOCK = 256  # of scales that are coded themselves
_LOST = 0.25  # a block is lost if its scale is off by this share


class QuantizeWarning(UserWarning):
    """Leaves that rules select stay as they are, or lose some of their weights."""


@dataclasses.dataclass(frozen=True)
class Coding:
    """A decision: in which format an array is stored, and how its blocks lie.

    Attributes:
      format: format of the codes.
      axis: the axis that blocks lie along, counted from the end.
      block: the number of weights in a block.
    """

    format: Format
    axis: int
    block: int


def coding_of(
    shape: Sequence[int], format: str | Format = "nf4", roles: AxisRoles | None = None
) -> Coding | None:
    """Returns the coding of an array of this shape; None where no blocks fit, so it stays float.

    Blocks lie along the last in axis that they fit. They are as long as the format says where that
    divides the axis, or else as long as the divisor of its size that comes closest: from a quarter
    of it (or the whole axis) to double of it.

    Args:
      shape: shape of the array.
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
    array: Shaped,
    format: str | Format | Coding = "nf4",
    roles: AxisRoles | None = None,
    *,
    dtype: DTypeLike | None = None,
    name: str = "the array",
) -> Coded:
    """Returns an array in codes. For readers of files, tensor by tensor; see also `quantize`.

    Args:
      array: a NumPy or JAX array, or a tracer; a `jax.ShapeDtypeStruct` gives a `Coded` of those.
        Codes and scales lie on a mesh as the array does.
      format: a format or its name, or the decision of `coding_of` or `plan`.
      roles: the array's axis roles; by default Flax's (the last axis out, the one before it in).
      dtype: that the codes stand for an array of; the array's own by default.
      name: what messages call the array.

    Raises:
      ValueError: no blocks fit the array, or it holds a NaN or an infinity (unless it is a tracer).

    Warns:
      QuantizeWarning: the format cannot hold the scales of some blocks.

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
            f"encode: no blocks of {format!r} fit {name} of shape {tuple(array.shape)} along its "
            "in axes: leave it as it is, or give a Format with another block"
        )
    dtype = np.dtype(array.dtype if dtype is None else dtype)
    if isinstance(array, jax.core.Tracer):
        return _encoded(array, coding, dtype)[0]
    if isinstance(array, jax.ShapeDtypeStruct):
        return _abstract(array, coding, dtype)
    coded, n_lost = encode_part(array, coding, dtype, name)
    warn_of_lost(n_lost, coded, name)
    return coded


def encode_part(array: Leaf, coding: Coding, dtype: Any, name: str) -> tuple[Coded, int]:
    """Returns an array, perhaps some layers of a stack, in codes; and how many blocks are lost.

    Raises:
      ValueError: it holds a NaN or an infinity.

    See `encode`.
    """
    sharding = getattr(array, "sharding", None)
    abstract = _abstract(array, coding, dtype)
    places = None
    if isinstance(sharding, NamedSharding):
        places = tuple(leaf.sharding for leaf in jax.tree.leaves(abstract))
    encoder = _encoder(coding, dtype, jax.tree.structure(abstract), places)
    if places or math.prod(array.shape[:-2]) == 1 or coding.axis == -len(array.shape):
        coded, faults = encoder(array)
    else:
        # Layer by layer: a CPU's compiler casts all of a bf16 array before it reduces it.
        layers = [encoder(array[i]) for i in range(array.shape[0])]
        coded, each = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
        faults = jnp.sum(each, axis=0)
    if isinstance(faults, jax.core.Tracer):  # within a trace, where no value is known
        return coded, 0
    not_finite, n_lost = np.asarray(faults).tolist()
    if not_finite:
        raise ValueError(
            f"{name}: {not_finite} of its {coded.arrays['scales'].size} blocks hold a NaN or an "
            "infinity, which no code stands for: mend the weights first"
        )
    return coded, n_lost


def warn_of_lost(n_lost: int, coded: Coded, name: str) -> None:
    """Warns of blocks whose scales the format cannot hold; see `encode`."""
    if n_lost:
        warnings.warn(
            f"{name}: {n_lost} of its {coded.arrays['scales'].size} blocks lose their weights in "
            f"{coded.format.name!r}, which cannot hold their scales: their largest magnitudes are "
            "too far from those of other blocks, or out of range. Keep this leaf as it is, or "
            "choose another format for it",
            QuantizeWarning,
            stacklevel=3,
        )


def _abstract(array: Shaped, coding: Coding, dtype: DTypeLike) -> Coded:
    """Returns the shapes of an array's codes, with shardings if the array lies on a mesh."""
    shape = jax.ShapeDtypeStruct(array.shape, array.dtype)
    coded: Coded = jax.eval_shape(lambda array: _encoded(array, coding, dtype)[0], shape)
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return coded
    return coded.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
        shardings_of(coded, sharding),
    )


def shardings_of(coded: Coded, of_array: NamedSharding) -> Coded:
    """Returns the sharding of each of the arrays of a `Coded`, from that of the array W.

    Args:
      coded: arrays, or their shapes.
      of_array: the sharding of W.
    """
    spec = [*of_array.spec, *[None] * (coded.ndim - len(of_array.spec))]
    mesh: Any = of_array.mesh

    def place(array: Shaped, axes: Sequence[int]) -> NamedSharding:
        picked = tuple(None if axis < 0 else spec[axis] for axis in axes)
        return sharding_for(picked, array.shape, mesh)

    shardings: Coded = along(coded, place)
    return shardings


@functools.lru_cache(maxsize=256)
def _encoder(
    coding: Coding, dtype: DTypeLike, treedef: jax.tree_util.PyTreeDef, places: Tree
) -> Forward:
    where = None if places is None else (treedef.unflatten(places), None)
    return jax.jit(lambda array: _encoded(array, coding, dtype), out_shardings=where)


def _encoded(array: jax.Array, coding: Coding, dtype: DTypeLike) -> tuple[Coded, jax.Array]:
    """Returns an array in codes, and the numbers of blocks not finite and lost: int32 [2]."""
    format, axis = coding.format, coding.axis % array.ndim
    n = array.shape[axis]
    apart = (*array.shape[:axis], n // coding.block, coding.block, *array.shape[axis + 1 :])
    blocks = array.reshape(apart)  # cast where each is read: no fp32 copy of the array
    absmax = jnp.max(jnp.abs(blocks), axis=axis + 1).astype(jnp.float32)
    exact = format.scales(absmax)
    scales = exact.astype(format.scale_dtype)
    divisor = jnp.expand_dims(jnp.maximum(scales.astype(jnp.float32), _TINY), axis + 1)
    scaled = jnp.clip(blocks.astype(jnp.float32) * (1 / divisor), -format.top, format.top)
    arrays = {"codes": format.codes(scaled).reshape(array.shape), "scales": scales}
    held = scales.astype(jnp.float32)
    if format.double:
        arrays |= _doubled(scales, coding)
        held = scales_of(arrays, format)
    is_held = (jnp.abs(held - exact) <= _LOST * exact) & (held < 1 / _TINY)
    is_lost = (absmax > _TINY) & jnp.isfinite(absmax) & ~is_held
    faults = jnp.stack([jnp.sum(~jnp.isfinite(absmax)), jnp.sum(is_lost)])
    return Coded(arrays, format, dtype), faults


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
