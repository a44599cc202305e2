"""Kernels of a file as codes, a layer at a time: the float kernel is never in memory whole."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.typing import DTypeLike

from lora_jax.hf.keys import Row
from lora_jax.hf.sources import Source
from lora_jax.quantized import Coded, Coding, encode
from lora_jax.quantized.encode import encode_part, shardings_of, warn_of_lost

# A `quantize=` that keeps the codes of the file itself.
STORED = "stored"


def encoded(
    row: Row,
    coding: Coding,
    dtype: DTypeLike,
    place: Sharding | None,
    read: Callable[[range | None], jax.Array],
) -> Coded:
    """Reads a kernel and encodes it; of a stack, one layer after another.

    Args:
      row: the kernel.
      coding: how it is stored.
      dtype: dtype of the array that the codes stand for.
      place: the sharding of that array.
      read: returns the fp32 array of these layers, or of all for None.

    Raises:
      ValueError: it holds a NaN or an infinity.
    """
    whole_stack = isinstance(place, NamedSharding) and any(place.spec[:1])  # layers are sharded
    if not row.stack or whole_stack:
        return encode(read(None), coding, dtype=dtype, name=row.path)
    layers, lost = [], 0
    for i in range(row.stack[0]):
        layer = read(range(i, i + 1))
        coded, n_lost = encode_part(layer, coding, dtype, f"{row.path}, layer {i}")
        layers.append(jax.block_until_ready(coded))
        lost += n_lost
    where = None
    if isinstance(place, NamedSharding):
        shape = jax.ShapeDtypeStruct(row.stacked_shape, jnp.float32)
        where = shardings_of(encode(shape, coding, dtype=dtype), place)
    whole: Coded = jax.block_until_ready(jax.jit(_joined, out_shardings=where)(layers))
    warn_of_lost(lost, whole, row.path)
    return whole


def _joined(layers: Sequence[Coded]) -> Coded:
    return layers[0].map(lambda *arrays: jnp.concatenate(arrays), *layers[1:])


def shapes_as_stored(source: Source, row: Row, dtype: DTypeLike) -> Coded | None:
    """Returns the shapes of what `as_stored` returns."""
    parts = _alike([source.code_shapes(name, dtype) for name in row.hf_names])
    if parts is None:
        return None

    def stacked(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = array.shape[::-1] if row.transpose else array.shape
        return jax.ShapeDtypeStruct((*row.stack, *shape), array.dtype)

    return parts[0].map(stacked)


def _alike(parts: Sequence[Coded | None]) -> list[Coded] | None:
    """Returns the tensors of a stack; None if not all of them are in codes of one format."""
    whole = [part for part in parts if part is not None]
    same = len(whole) == len(parts) and len({part.format for part in whole}) == 1
    return whole if same else None


def as_stored(source: Source, row: Row, dtype: DTypeLike, place: Sharding | None) -> Coded | None:
    """Returns a kernel in the codes of the file; None if not all of it is in codes of one format.

    Args:
      source: the file.
      row: the kernel.
      dtype: dtype of the array that the codes stand for.
      place: the sharding of that array.
    """
    whole = _alike([source.codes(name, dtype) for name in row.hf_names])
    if whole is None:
        return None

    def stacked(*arrays: np.ndarray) -> np.ndarray:
        members = [array.T if row.transpose else array for array in arrays]
        return np.stack(members).reshape(*row.stack, *members[0].shape)

    coded = whole[0].map(stacked, *whole[1:])
    if not isinstance(place, NamedSharding):
        return coded.map(lambda array: jax.block_until_ready(jax.device_put(array, place)))
    return coded.map(
        lambda array, where: jax.make_array_from_callback(array.shape, where, array.__getitem__),
        shardings_of(coded, place),
    )
