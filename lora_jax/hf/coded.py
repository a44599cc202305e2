"""Kernels of a file as codes, a layer at a time: the float kernel is never in memory whole."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from lora_jax.hf.fields import ConfigError
from lora_jax.hf.keys import Row, WeightsError
from lora_jax.hf.sources import HasCodes, Source
from lora_jax.quantized import Coded, Coding, encode
from lora_jax.quantized.encode import encode_part, shardings_of, warn_of_lost

# Values of `quantize=`: keep the codes of the file itself, and have arrays in any case.
STORED, NONE = "stored", "none"


def encode_row(
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
    lost = []

    def layer(i: int) -> Coded:
        coded, n_lost = encode_part(read(range(i, i + 1)), coding, dtype, f"{row.path}, layer {i}")
        lost.append(n_lost)
        return coded

    shapes = encode(jax.ShapeDtypeStruct(row.stacked_shape, jnp.float32), coding, dtype=dtype)
    where = shardings_of(shapes, place) if isinstance(place, NamedSharding) else place
    whole = _stack_layers(map(layer, range(row.stack[0])), shapes, where)
    warn_of_lost(sum(lost), whole, row.path)
    return whole


def check_alike(source: HasCodes, row: Row) -> None:
    """Raises a WeightsError if a stack's tensors lie in codes that stay so, and not all alike."""
    first, *others = _kinds(source, row)
    if others and not source.shipped.isdisjoint((first, *others)):
        raise WeightsError(
            f"{source.where}: {first} and {others[0]} lie in different codes, or one of them in "
            f"none, and {row.path} stacks them. quantize='none' (--quantize none) reads arrays"
        )


def check_stored(source: Source, kernels: Sequence[Row]) -> None:
    """Raises an error if kernels that are to stay in the codes of their file do not lie in any.

    Args:
      source: the file.
      kernels: the kernels.

    Raises:
      ConfigError: none lies in codes that stay so; says what they lie in.
      WeightsError: a stack's tensors lie in different codes, and those of the file always stay so.
    """
    for row in kernels:
        check_alike(source, row)
    if any([stored_shapes(source, row, np.float32) for row in kernels]):
        return
    codes = "in codes"
    if source.kept_forms_note:
        codes = f"in codes that stay so: they lie in {count_forms(source, kernels)}. "
        codes += source.kept_forms_note
    raise ConfigError(
        f"{source.where}: quantize='stored' keeps the codes of a file, and no kernel here is "
        f"{codes}: choose a format, such as quantize='nf4'"
    )


def count_forms(source: Source, kernels: Iterable[Row]) -> str:
    """Returns the forms that kernels lie in, and how many of their layers do: "Q5_K (12)"."""
    forms = Counter(source.form(name) for row in kernels for name in row.hf_names)
    return ", ".join(f"{form} ({n})" for form, n in forms.most_common())


def _kinds(source: HasCodes, row: Row) -> list[str]:
    """Returns the first tensor of a stack in each form that they lie in."""
    kinds: dict[object, str] = {}  # of codes -> the first tensor in them
    for name in row.hf_names:
        shapes = source.code_shapes(name, np.float32)
        leaves = jax.tree.leaves(shapes)
        kind = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        kinds.setdefault((kind, jax.tree.structure(shapes)), name)
    return list(kinds.values())


def stored_shapes(source: HasCodes, row: Row, dtype: DTypeLike) -> Coded | None:
    """Returns the shapes of what `read_stored` returns."""
    first, *others = _kinds(source, row)
    coded = source.code_shapes(first, dtype)
    if coded is None or others:
        return None

    def stacked(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = array.shape[::-1] if row.transpose else array.shape
        return jax.ShapeDtypeStruct((*row.stack, *shape), array.dtype)

    return coded.map(stacked)


def read_stored(source: Source, row: Row, dtype: DTypeLike, place: Sharding | None) -> Coded | None:
    """Reads a kernel in the codes of the file, a layer at a time, into its place.

    Args:
      source: the file.
      row: the kernel.
      dtype: dtype of the array that the codes stand for.
      place: the sharding of that array.

    Returns:
      The codes; None if not all of it is in codes of one format.
    """
    shapes = stored_shapes(source, row, dtype)
    if shapes is None:
        return None
    where = shardings_of(shapes, place) if isinstance(place, NamedSharding) else place
    if not row.stack:
        return _put(_read(source, row, row.hf_names, dtype), where)
    names = np.array(row.hf_names).reshape(row.stack[0], -1).tolist()
    layers = (_put(_read(source, row, some, dtype), _layer_shardings(where)) for some in names)
    return _stack_layers(layers, shapes, where)


def _read(source: Source, row: Row, names: Sequence[str], dtype: DTypeLike) -> Coded:
    """Returns a kernel, or a layer of a stack with an axis for itself, of NumPy arrays."""
    first, *others = [cast(Coded, source.codes(name, dtype)) for name in names]

    def joined(*arrays: np.ndarray) -> np.ndarray:
        each = [array.T if row.transpose else array for array in arrays]
        shape = (*(1 for _ in row.stack[:1]), *row.stack[1:], *each[0].shape)
        return (np.stack(each) if len(each) > 1 else each[0]).reshape(shape)

    return first.map(joined, *others)


def _put(coded: Coded, where: Coded | Sharding | None) -> Coded:
    """Returns codes on their devices: `where` has the sharding of each array, or one for all."""
    if not isinstance(where, Coded):
        return coded.map(lambda array: jax.device_put(array, where))

    def placed(array: np.ndarray, where: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, where, array.__getitem__)

    return coded.map(placed, where)


def _layer_shardings(where: Coded | Sharding | None) -> Coded | Sharding | None:
    """Returns the shardings of one layer of a stack, which has an axis for itself."""
    if not isinstance(where, Coded):
        return where
    return where.map(lambda old: NamedSharding(old.mesh, PartitionSpec(None, *old.spec[1:])))


def _stack_layers(layers: Iterable[Coded], shapes: Coded, where: Coded | Sharding | None) -> Coded:
    """Returns a stack in its place, written a layer at a time: there is no second copy of it.

    Args:
      layers: each with an axis for itself.
      shapes: shapes of the whole.
      where: the sharding of each array, or one for all.
    """
    places = where if isinstance(where, Coded) else shapes.map(lambda _: where)
    write = jax.jit(_write_layer, donate_argnums=0, out_shardings=where)
    whole = shapes.map(lambda x, place: jnp.zeros(x.shape, x.dtype, device=place), places)
    for i, layer in enumerate(layers):
        whole = jax.block_until_ready(write(whole, layer, i))
    return whole


def _write_layer(whole: Coded, layer: Coded, i: jax.Array) -> Coded:
    return whole.map(lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, i, 0), layer)
