"""Quantizes one array: chooses its blocks, and computes their scales and the codes.

A block is lost if the format cannot hold its scale, so that its weights are lost.
"""

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
from lora_jax.quantized.coded import Coded, expand, scales_of
from lora_jax.quantized.formats import Format, format_of
from lora_jax.sharding import sharding_for

_TINY = float(np.finfo(np.float32).tiny)
_SCALES_IN_A_BLOCK = 256  # of scales that are coded themselves
_LOST_ERROR = 0.25  # a block is lost if the relative error of its scale is larger


class QuantizeWarning(UserWarning):
    """Warns of selected leaves that stay unquantized, or that lose some weights."""


@dataclasses.dataclass(frozen=True)
class Coding:
    """A format, and the blocks of one array.

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
    """Returns the coding of an array of this shape; None if no blocks fit, so that it stays float.

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
        if -axis > len(shape):
            continue
        block = _closest_divisor(shape[axis], format.block)
        if block is not None:
            return Coding(format, axis, block)
    return None


def _closest_divisor(size: int, block: int) -> int | None:
    """Returns the divisor of an axis' size that is closest to a block size, or None."""
    if 1 < size <= block:
        return size
    divisors = [n for n in range(max(2, block // 4), 2 * block + 1) if size % n == 0]
    return min(divisors, key=lambda n: abs(math.log(n / block)), default=None)


def encode(
    array: Shaped,
    format: str | Format | Coding = "nf4",
    roles: AxisRoles | None = None,
    *,
    dtype: DTypeLike | None = None,
    name: str = "the array",
) -> Coded:
    """Quantizes one array, such as a tensor of a file; see also `quantize`.

    Args:
      array: a NumPy or JAX array, or a tracer; a `jax.ShapeDtypeStruct` gives a `Coded` of those.
        Codes and scales lie on a mesh as the array does.
      format: a format or its name, or the decision of `coding_of` or `plan`.
      roles: the array's axis roles; by default Flax's (the last axis out, the one before it in).
      dtype: dtype of the array that the codes stand for; the array's own by default.
      name: name of the array in messages.

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
            f"encode: {name} of shape {tuple(array.shape)} cannot be divided into blocks of "
            f"{format!r} along its in axes. Do not quantize it, or give a Format with "
            "another block size."
        )
    dtype = np.dtype(array.dtype if dtype is None else dtype)
    if isinstance(array, jax.core.Tracer):
        return _encode(array, coding, dtype)[0]
    if isinstance(array, jax.ShapeDtypeStruct):
        return _coded_shapes(array, coding, dtype)
    coded, n_lost = encode_part(array, coding, dtype, name)
    warn_of_lost(n_lost, coded, name)
    return coded


def encode_part(array: Leaf, coding: Coding, dtype: Any, name: str) -> tuple[Coded, int]:
    """Quantizes an array, or some layers of a stack; see `encode`.

    Returns:
      The codes, and the number of blocks that are lost.

    Raises:
      ValueError: the array holds a NaN or an infinity.
    """
    sharding = getattr(array, "sharding", None)
    abstract = _coded_shapes(array, coding, dtype)
    shardings = None
    if isinstance(sharding, NamedSharding):
        shardings = tuple(leaf.sharding for leaf in jax.tree.leaves(abstract))
    encoder = _compiled_encoder(coding, dtype, jax.tree.structure(abstract), shardings)
    is_stack = math.prod(array.shape[:-2]) != 1 and coding.axis != -len(array.shape)
    if shardings or not is_stack:
        coded, faults = encoder(array)
    else:
        # Layer by layer: a CPU's compiler casts all of a bf16 array before it reduces it.
        layers = [encoder(array[i]) for i in range(array.shape[0])]
        coded, faults_of_layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        faults = jnp.sum(faults_of_layers, axis=0)
    if isinstance(faults, jax.core.Tracer):  # within a trace, where no value is known
        return coded, 0
    n_not_finite, n_lost = np.asarray(faults).tolist()
    if n_not_finite:
        raise ValueError(
            f"{name}: {n_not_finite} of its {coded.arrays['scales'].size} blocks contain a "
            "NaN or an infinity, which cannot be quantized. Repair the weights first."
        )
    return coded, n_lost


def warn_of_lost(n_lost: int, coded: Coded, name: str) -> None:
    """Warns of blocks whose scales the format cannot represent; see `encode`."""
    if n_lost:
        warnings.warn(
            f"{name}: {n_lost} of its {coded.arrays['scales'].size} blocks would lose their "
            f"weights in {coded.format.name!r}, which cannot represent their scales. Their "
            "largest magnitudes are out of range, or too far from those of the other "
            "blocks. Do not quantize this leaf, or choose another format for it.",
            QuantizeWarning,
            stacklevel=3,
        )


def _coded_shapes(array: Shaped, coding: Coding, dtype: DTypeLike) -> Coded:
    """Returns the shapes of an array's codes, with shardings if the array is on a mesh."""
    struct = jax.ShapeDtypeStruct(array.shape, array.dtype)
    coded: Coded = jax.eval_shape(lambda array: _encode(array, coding, dtype)[0], struct)
    weight_sharding = getattr(array, "sharding", None)
    if not isinstance(weight_sharding, NamedSharding):
        return coded

    def with_sharding(struct: Shaped, sharding: NamedSharding) -> Shaped:
        return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)

    return coded.map(with_sharding, shardings_of(coded, weight_sharding))


def shardings_of(coded: Coded, weight_sharding: NamedSharding) -> Coded:
    """Returns the sharding of each array of a `Coded`, derived from the sharding of W.

    Args:
      coded: arrays, or their shapes.
      weight_sharding: the sharding of W.
    """
    weight_spec = [*weight_sharding.spec, *[None] * (coded.ndim - len(weight_sharding.spec))]
    mesh: Any = weight_sharding.mesh

    def array_sharding(array: Shaped, axes: Sequence[int]) -> NamedSharding:
        spec = tuple(None if axis < 0 else weight_spec[axis] for axis in axes)
        return sharding_for(spec, array.shape, mesh)

    shardings: Coded = along(coded, array_sharding)
    return shardings


@functools.lru_cache(maxsize=256)
def _compiled_encoder(
    coding: Coding, dtype: DTypeLike, treedef: jax.tree_util.PyTreeDef, shardings: Tree
) -> Forward:
    """Returns `_encode`, compiled for codes and scales with these shardings."""
    out_shardings = None if shardings is None else (treedef.unflatten(shardings), None)
    return jax.jit(lambda array: _encode(array, coding, dtype), out_shardings=out_shardings)


def _encode(array: jax.Array, coding: Coding, dtype: DTypeLike) -> tuple[Coded, jax.Array]:
    """Quantizes an array.

    Returns:
      The codes; and int32 [2], the numbers of blocks that are not finite and that are lost.
    """
    format = coding.format
    axis = coding.axis % array.ndim
    blocks = _split_axis(array, axis, coding.block)
    # Each use of the blocks casts them: no fp32 copy of the array is made.
    absmax = jnp.max(jnp.abs(blocks), axis=axis + 1).astype(jnp.float32)
    exact_scales = format.scales(absmax)
    scales = exact_scales.astype(format.scale_dtype)
    divisor = jnp.expand_dims(jnp.maximum(scales.astype(jnp.float32), _TINY), axis + 1)
    # The largest weight of a block gets the format's largest value.
    scaled = jnp.clip(blocks.astype(jnp.float32) * (1 / divisor), -format.top, format.top)
    arrays = {"codes": format.codes(scaled).reshape(array.shape), "scales": scales}
    stored_scales = scales.astype(jnp.float32)
    if format.double:
        arrays |= _encode_scales(scales, coding)
        stored_scales = scales_of(arrays, format)
    # A block is lost if its stored scale is far from the exact one.
    is_close = jnp.abs(stored_scales - exact_scales) <= _LOST_ERROR * exact_scales
    is_close &= stored_scales < 1 / _TINY
    is_lost = (absmax > _TINY) & jnp.isfinite(absmax) & ~is_close
    faults = jnp.stack([jnp.sum(~jnp.isfinite(absmax)), jnp.sum(is_lost)])
    return Coded(arrays, format, dtype), faults


def _encode_scales(scales: jax.Array, coding: Coding) -> dict[str, jax.Array]:
    """Quantizes scales as int8 steps from their mean along the block axis."""
    axis = coding.axis % scales.ndim
    n_scales = scales.shape[axis]
    mean = jnp.mean(scales, axis=axis, keepdims=True)
    blocks = _split_axis(
        scales - mean, axis, _closest_divisor(n_scales, _SCALES_IN_A_BLOCK) or n_scales
    )
    steps = jnp.max(jnp.abs(blocks), axis=axis + 1) / 127
    codes = jnp.round((scales - mean) / expand(jnp.maximum(steps, _TINY), scales.shape))
    codes = jnp.clip(codes, -127, 127).astype(jnp.int8)
    return {"scales": codes, "scale_steps": steps, "scale_mean": mean}


def _split_axis(array: jax.Array, axis: int, block: int) -> jax.Array:
    """Returns an array with one axis split in two: blocks, and elements of a block."""
    shape = (*array.shape[:axis], array.shape[axis] // block, block, *array.shape[axis + 1 :])
    return array.reshape(shape)
