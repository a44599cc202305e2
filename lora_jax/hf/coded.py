"""Reads quantized kernels one layer at a time, so that no whole float kernel is in memory.

The *form* of a tensor is the format of its codes and their shapes, or none for floats. `Coded`
stands for codes, their scales, and the dtype of the array that they encode.
"""

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
QUANTIZE_STORED, QUANTIZE_NONE = "stored", "none"


def read_and_encode_kernel(
    row: Row,
    coding: Coding,
    dtype: DTypeLike,
    sharding: Sharding | None,
    read_layers: Callable[[range | None], jax.Array],
) -> Coded:
    """Reads a kernel and quantizes it. A stack is quantized one layer after another.

    Args:
      row: the kernel.
      coding: the format to quantize to.
      dtype: dtype of the array that the codes stand for.
      sharding: the sharding of that array.
      read_layers: returns the fp32 array of some layers; of all layers for None.

    Raises:
      ValueError: the kernel holds a NaN or an infinity.
    """
    # A single kernel, or a stack whose layers lie on different devices, is quantized at once.
    has_sharded_layers = isinstance(sharding, NamedSharding) and any(sharding.spec[:1])
    if not row.stack or has_sharded_layers:
        return encode(read_layers(None), coding, dtype=dtype, name=row.path)
    lost_counts = []

    def encode_layer(layer: int) -> Coded:
        array = read_layers(range(layer, layer + 1))
        coded_layer, n_lost = encode_part(array, coding, dtype, f"{row.path}, layer {layer}")
        lost_counts.append(n_lost)
        return coded_layer

    shapes = encode(jax.ShapeDtypeStruct(row.stacked_shape, jnp.float32), coding, dtype=dtype)
    layers = map(encode_layer, range(row.stack[0]))
    stack = _write_layers_into_stack(layers, shapes, _shardings_of_codes(shapes, sharding))
    warn_of_lost(sum(lost_counts), stack, row.path)
    return stack


def check_stack_has_one_form(source: HasCodes, row: Row) -> None:
    """Raises a WeightsError if a stack's tensors differ in their quantized form."""
    tensors = _first_tensor_of_each_form(source, row)
    if len(tensors) == 1 or source.coded_names.isdisjoint(tensors):
        return
    raise WeightsError(
        f"{source.where}: {row.path} stacks {tensors[0]} and {tensors[1]}, which are quantized "
        "differently. Use quantize='none' (--quantize none) to read them as floats."
    )


def check_kernels_have_codes(source: Source, kernels: Sequence[Row]) -> None:
    """Checks that quantize='stored' keeps at least one kernel quantized.

    Args:
      source: the file.
      kernels: the kernels.

    Raises:
      ConfigError: no kernel is in codes that can stay; the message names the forms of the kernels.
      WeightsError: the tensors of a stack are quantized differently.
    """
    for kernel in kernels:
        check_stack_has_one_form(source, kernel)
    # One kernel with codes is enough. The others are read as floats.
    for kernel in kernels:
        if shapes_of_stored_codes(source, kernel, np.float32) is not None:
            return
    problem = "no kernel of this file is quantized."
    if source.kept_forms_note:
        forms = describe_forms(source, kernels)
        problem = f"the kernels of this file are {forms}. {source.kept_forms_note}"
    raise ConfigError(
        f"{source.where}: quantize='stored' keeps the codes of a file, but {problem} Choose a "
        "format, such as quantize='nf4'."
    )


def describe_forms(source: Source, kernels: Iterable[Row]) -> str:
    """Returns the forms of kernels with their numbers of tensors, as text: "Q5_K (12)"."""
    counts: Counter[str] = Counter()
    for kernel in kernels:
        counts.update(source.form(name) for name in kernel.hf_names)
    return ", ".join(f"{form} ({count})" for form, count in counts.most_common())


def _first_tensor_of_each_form(source: HasCodes, row: Row) -> list[str]:
    """Returns the first tensor of a stack for each form that occurs in it."""
    tensor_of_form: dict[object, str] = {}
    for name in row.hf_names:
        shapes = source.code_shapes(name, np.float32)
        arrays = tuple((array.shape, array.dtype) for array in jax.tree.leaves(shapes))
        form = (arrays, jax.tree.structure(shapes))
        tensor_of_form.setdefault(form, name)
    return list(tensor_of_form.values())


def shapes_of_stored_codes(source: HasCodes, row: Row, dtype: DTypeLike) -> Coded | None:
    """Returns the shapes of the result of `read_stored_codes`, or None."""
    tensors = _first_tensor_of_each_form(source, row)
    tensor_shapes = source.code_shapes(tensors[0], dtype)
    if tensor_shapes is None or len(tensors) > 1:
        return None

    def stack_shape(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = array.shape[::-1] if row.transpose else array.shape
        return jax.ShapeDtypeStruct((*row.stack, *shape), array.dtype)

    return tensor_shapes.map(stack_shape)


def read_stored_codes(
    source: Source, row: Row, dtype: DTypeLike, sharding: Sharding | None
) -> Coded | None:
    """Reads a kernel's codes, unchanged from the file, onto devices, one layer at a time.

    Args:
      source: the file.
      row: the kernel.
      dtype: dtype of the array that the codes stand for.
      sharding: the sharding of that array.

    Returns:
      The codes; None unless all tensors of the kernel are in codes of one format.
    """
    shapes = shapes_of_stored_codes(source, row, dtype)
    if shapes is None:
        return None
    shardings = _shardings_of_codes(shapes, sharding)
    if not row.stack:
        return _put_on_devices(_read_codes_on_host(source, row, row.hf_names, dtype), shardings)
    names_of_layers = np.array(row.hf_names).reshape(row.stack[0], -1).tolist()
    layer_shardings = _layer_shardings(shardings)

    def read_layer(names: Sequence[str]) -> Coded:
        return _put_on_devices(_read_codes_on_host(source, row, names, dtype), layer_shardings)

    return _write_layers_into_stack(map(read_layer, names_of_layers), shapes, shardings)


def _read_codes_on_host(source: Source, row: Row, names: Sequence[str], dtype: DTypeLike) -> Coded:
    """Returns the codes of a kernel, or of one layer [1, ...], as NumPy arrays."""
    tensors = [cast(Coded, source.codes(name, dtype)) for name in names]

    def join_members(*arrays: np.ndarray) -> np.ndarray:
        """Stacks the arrays of all members of a stack."""
        members = [array.T if row.transpose else array for array in arrays]
        if not row.stack:
            return members[0]
        shape = (1, *row.stack[1:], *members[0].shape)
        joined = np.stack(members) if len(members) > 1 else members[0]
        return joined.reshape(shape)

    return tensors[0].map(join_members, *tensors[1:])


def _shardings_of_codes(shapes: Coded, sharding: Sharding | None) -> Coded | Sharding | None:
    """Returns the sharding of each code array, or one sharding on a single device."""
    return shardings_of(shapes, sharding) if isinstance(sharding, NamedSharding) else sharding


def _put_on_devices(coded: Coded, shardings: Coded | Sharding | None) -> Coded:
    """Puts codes on devices, with a sharding for each array or one for all."""
    if not isinstance(shardings, Coded):
        return coded.map(lambda array: jax.device_put(array, shardings))

    def put_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return coded.map(put_array, shardings)


def _layer_shardings(stack_shardings: Coded | Sharding | None) -> Coded | Sharding | None:
    """Returns the shardings of one layer [1, ...] of a stack."""
    if not isinstance(stack_shardings, Coded):
        return stack_shardings

    def layer_sharding(sharding: NamedSharding) -> NamedSharding:
        return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))

    return stack_shardings.map(layer_sharding)


def _write_layers_into_stack(
    layers: Iterable[Coded], shapes: Coded, shardings: Coded | Sharding | None
) -> Coded:
    """Writes layers one by one into a stack on devices, without a second copy.

    Args:
      layers: the layers, each [1, ...].
      shapes: shapes of the stack.
      shardings: the sharding of each array, or one for all.
    """

    def zeros(array: jax.ShapeDtypeStruct, sharding: Sharding | None) -> jax.Array:
        return jnp.zeros(array.shape, array.dtype, device=sharding)

    if isinstance(shardings, Coded):
        stack = shapes.map(zeros, shardings)
    else:
        stack = shapes.map(lambda array: zeros(array, shardings))
    write = jax.jit(_write_layer, donate_argnums=0, out_shardings=shardings)
    for layer_index, layer in enumerate(layers):
        stack = jax.block_until_ready(write(stack, layer, layer_index))
    return stack


def _write_layer(stack: Coded, layer: Coded, layer_index: jax.Array) -> Coded:
    def write_array(stack_array: jax.Array, layer_array: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(stack_array, layer_array, layer_index, 0)

    return stack.map(write_array, layer)
