"""Reads weights from a file or a folder into a plain parameter tree.

A *row* is a parameter of the key table. A row is *absent* if it belongs to an optional part of the
model, such as a head, that the file lacks entirely. A *box* is a slice of a parameter, as one range
for each axis.
"""

import functools
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from types import EllipsisType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from lora_jax.core.types import Leaf
from lora_jax.hf.coded import (
    QUANTIZE_NONE,
    QUANTIZE_STORED,
    check_kernels_have_codes,
    describe_forms,
    read_and_encode_kernel,
    read_stored_codes,
    shapes_of_stored_codes,
)
from lora_jax.hf.keys import (
    Params,
    Row,
    WeightsError,
    check_tensors,
    find_absent_parts,
    nest_leaves,
    reorder_axes,
)
from lora_jax.hf.sources import FLOAT_DTYPES, HasCodes, Source
from lora_jax.quantized import Coded, Coding, QuantizeWarning, QuantRule, encode, plan
from lora_jax.quantized import Format as Codes

ShardingOf = Callable[[str, tuple[int, ...]], Sharding | None]


def load_params(
    source: Source,
    param_dtype: DTypeLike = jnp.float32,
    sharding: ShardingOf | None = None,
    key: jax.Array | None = None,
    quantize: str | Codes | Sequence[QuantRule] | None = None,
) -> Params:
    """Reads the parameter tree of a source, one parameter at a time.

    Args:
      source: an open folder or file.
      param_dtype: the dtype of the parameters.
      sharding: (path, shape) -> the sharding of that parameter; None for the default device.
      key: random key for freshly initialised heads; see ``models.from_pretrained``.
      quantize: kernels to keep in codes, and how; see ``models.from_pretrained``.

    Returns:
      A plain nested dict.

    Raises:
      WeightsError: for tensors that cannot be read or do not fit; one error lists all of them.
    """
    table, absent = _match_source_to_table(source)
    stored_rows = [row for row in table if row.part not in absent]
    _check_dtypes(source, stored_rows)
    _check_aliases(source, stored_rows)
    if absent:
        begins = "freshly initialised, unless an adapter brings its own"
        print(f"{source.where} holds no {', '.join(absent)}: {begins}", file=sys.stderr)
    key = jax.random.key(0) if key is None else key
    if quantize is None and source.coded_names:
        quantize = QUANTIZE_STORED
        print(f"{source.where}: {_stored_codes_message(len(source.coded_names))}", file=sys.stderr)
    keeps_codes = quantize == QUANTIZE_STORED
    codings = select_codings(table, param_dtype, quantize, source)
    if keeps_codes:
        check_kernels_have_codes(source, [row for row in stored_rows if row.path in codings])

    def read_codes(row: Row, row_sharding: Sharding | None) -> Coded | None:
        """Returns a row's quantized kernel; None if it stays an array."""
        if keeps_codes:
            return read_stored_codes(source, row, param_dtype, row_sharding)
        coding = codings[row.path]
        if coding is None:
            return None
        fp32 = np.dtype(np.float32)
        read_layers = functools.partial(_read_parameter, source, row, fp32, row_sharding)
        return read_and_encode_kernel(row, coding, param_dtype, row_sharding, read_layers)

    float_kernels: list[Row] = []  # those that were to be in codes
    leaves: list[tuple[str, Leaf]] = []
    for row in table:
        row_sharding = None if sharding is None else sharding(row.path, row.stacked_shape)
        leaf: Leaf = None
        if row.part in absent:
            values = _draw_parameter(row, source.config.initializer_range, key)
            leaf = jax.device_put(values.astype(param_dtype), row_sharding)
        elif row.path in codings:
            leaf = read_codes(row, row_sharding)
            if leaf is None:
                float_kernels.append(row)
        if leaf is None:
            leaf = _read_parameter(source, row, row.dtype_of(param_dtype), row_sharding)
        leaves.append((row.path, leaf))
    if float_kernels:
        message = _float_kernels_message(source, float_kernels, len(codings), stored=keeps_codes)
        warnings.warn(f"{source.where}: {message}", QuantizeWarning, stacklevel=3)
    return nest_leaves(leaves)


def _stored_codes_message(n_kernels: int) -> str:
    return (
        f"{n_kernels} kernels stay in the codes that they were shipped in; quantize='none' "
        "(--quantize none) reads arrays"
    )


def _float_kernels_message(
    source: Source, float_kernels: list[Row], n_kernels: int, *, stored: bool
) -> str:
    """Returns the warning for kernels that should be quantized but are read as floats."""
    path = float_kernels[0].path
    if stored:
        return (
            f"{len(float_kernels)} of {n_kernels} kernels are read as floats: {path} lies "
            f"in {describe_forms(source, float_kernels[:1])}. {source.kept_forms_note}"
        )
    return (
        f"{path} fits no blocks, nor do {len(float_kernels) - 1} other kernels of "
        f"{n_kernels}: they stay as they are"
    )


def param_shapes(
    table: Sequence[Row],
    dtype: DTypeLike,
    quantize: str | Codes | Sequence[QuantRule] | None = None,
    source: HasCodes | None = None,
) -> Params:
    """Returns the shapes that `load_params` would return, without reading weights.

    Args:
      table: the parameters.
      dtype: dtype of the parameters.
      quantize: see ``models.from_pretrained``.
      source: the file whose codes are kept, for "stored".
    """
    if quantize is None and source is not None and source.coded_names:
        quantize = QUANTIZE_STORED
    codings = select_codings(table, dtype, quantize, source)

    def leaf_shape(row: Row) -> Leaf:
        """Returns the shapes of one parameter."""
        array = jax.ShapeDtypeStruct(row.stacked_shape, row.dtype_of(dtype))
        if row.path not in codings:
            return array
        if quantize == QUANTIZE_STORED and source is not None:
            return shapes_of_stored_codes(source, row, dtype) or array
        coding = codings[row.path]
        return array if coding is None else encode(array, coding)

    return nest_leaves((row.path, leaf_shape(row)) for row in table)


def select_codings(
    table: Sequence[Row],
    dtype: DTypeLike,
    quantize: str | Codes | Sequence[QuantRule] | None,
    source: HasCodes | None = None,
) -> dict[str, Coding | None]:
    """Returns the coding of each kernel that ``quantize`` selects, by path; see `quantized.plan`.

    Args:
      table: the parameters.
      dtype: dtype of the parameters.
      quantize: see ``models.from_pretrained``.
      source: the file, for "stored".
    """
    if quantize in (None, QUANTIZE_NONE):
        return {}
    if quantize == QUANTIZE_STORED and source is not None and source.coded_names:
        kernels = [row for row in table if not source.coded_names.isdisjoint(row.hf_names)]
        return dict.fromkeys(row.path for row in kernels)
    shapes = nest_leaves(
        (row.path, jax.ShapeDtypeStruct(row.stacked_shape, dtype)) for row in table
    )
    kinds = {row.path: row.kind for row in table if row.kind is not None}
    if not isinstance(quantize, str | Codes):
        return plan(shapes, rules=quantize, kinds=kinds)
    # For "stored", any format selects the kernels.
    return plan(shapes, "nf4" if quantize == QUANTIZE_STORED else quantize, kinds=kinds)


def find_absent_parameters(source: Source) -> list[Row]:
    """Returns the parameters of optional parts, such as heads, that a source lacks.

    Raises:
      WeightsError: other tensors are missing, left over or misshaped; one error lists all of them.
    """
    table, absent = _match_source_to_table(source)
    return [row for row in table if row.part in absent]


def _match_source_to_table(source: Source) -> tuple[list[Row], list[str]]:
    """Returns the key table that matches a source, and the optional parts it lacks."""
    table = source.format.table(source.config)
    absent = find_absent_parts(source.shapes, table)
    stored_rows = [row for row in table if row.part not in absent]
    check_tensors(source.shapes, stored_rows, source.where, source.format.ignored_tensors)
    return table, absent


def _draw_parameter(row: Row, std: float, key: jax.Array) -> jax.Array:
    """Initialises a parameter as transformers does: kernels N(0, std²), biases 0, scales 1."""
    name = row.path.rsplit("/", 1)[-1]
    if name == "kernel":
        path_key = jax.random.fold_in(key, zlib.crc32(row.path.encode()))
        return std * jax.random.normal(path_key, row.stacked_shape, jnp.float32)
    constant = 1.0 if name == "scale" else 0.0
    return jnp.full(row.stacked_shape, constant, jnp.float32)


def _read_parameter(
    source: Source,
    row: Row,
    dtype: np.dtype,
    sharding: Sharding | None,
    layers: range | None = None,
) -> jax.Array:
    """Reads a parameter onto its devices, one block at a time.

    Args:
      source, row: the parameter.
      dtype: dtype of the array.
      sharding: the sharding of the array.
      layers: layers of a stack, those to read; all by default.
    """
    array_box = tuple(range(size) for size in row.stacked_shape)
    if layers is not None:
        array_box = (layers, *array_box[1:])
    shape = tuple(map(len, array_box))
    if sharding is None:
        values = _read_box(source, row, array_box, dtype)
        array: jax.Array = jax.block_until_ready(jax.device_put(values))
        return array
    try:
        slices_of_device = sharding.addressable_devices_indices_map(shape)
    except ValueError as error:
        raise ValueError(f"{row.path} of shape {list(shape)} cannot be sharded: {error}") from None
    devices_of_box: dict[tuple[range, ...], list[jax.Device]] = {}
    for device, slices in slices_of_device.items():
        axis_slices = zip(array_box, slices or (), strict=True)
        box = tuple(axis_range[axis_slice] for axis_range, axis_slice in axis_slices)
        devices_of_box.setdefault(box, []).append(device)
    shards: list[jax.Array] = []
    for box, devices in devices_of_box.items():
        values = _read_box(source, row, box, dtype)
        placements = [SingleDeviceSharding(d, memory_kind=sharding.memory_kind) for d in devices]
        copies = [jax.device_put(values, placement) for placement in placements]
        shards += jax.block_until_ready(copies)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=dtype)


def _read_box(source: Source, row: Row, box: tuple[range, ...], dtype: np.dtype) -> np.ndarray:
    """Reads a block of a parameter, given by one range for each axis."""
    values = np.empty([len(axis_range) for axis_range in box], dtype)
    n_stack_axes = len(row.stack)
    stack_ranges = box[:n_stack_axes]
    member_slices = tuple(slice(r.start, r.stop) for r in box[n_stack_axes:])
    tensor_slices = member_slices
    if row.transpose:
        n_leading = row.n_leading_axes
        tensor_slices = (*member_slices[:n_leading], *member_slices[n_leading:][::-1])
    for member, name in zip(row.members, row.hf_names, strict=True):
        indices_and_ranges = list(zip(member, stack_ranges, strict=True))
        is_in_box = all(index in axis_range for index, axis_range in indices_and_ranges)
        if not is_in_box:
            continue
        index_in_box = [index - axis_range.start for index, axis_range in indices_and_ranges]
        member_index: tuple[int | EllipsisType, ...] = (*index_in_box, ...)
        # Views of `values`, which the source fills.
        member_view = values[member_index]
        tensor_view = reorder_axes(row, member_view)
        source.read_into(tensor_view, name, tensor_slices)
    return values


def _check_dtypes(source: Source, table: list[Row]) -> None:
    """Raises a WeightsError that lists tensors which are not floats."""
    problems = []
    for row in table:
        for name in (*row.hf_names, *row.aliases):
            if source.dtypes.get(name, "F32") not in FLOAT_DTYPES:
                problems.append(f"{name} is {source.dtypes[name]} ({source.locate(name)})")
    if problems:
        raise WeightsError(
            f"{source.where}: weights must have one of the dtypes {', '.join(FLOAT_DTYPES)}, but "
            "some have another dtype. Convert these, or use another checkpoint:\n  "
            + "\n  ".join(problems)
        )


def _check_aliases(source: Source, table: list[Row]) -> None:
    """Raises WeightsError if the two stored tensors of a tied pair differ."""
    for row in table:
        for alias in row.aliases:
            if alias not in source.shapes:
                continue
            values = source.read(row.hf)
            alias_values = source.read(alias)
            if not np.array_equal(alias_values, values, equal_nan=True):
                raise WeightsError(
                    f"{source.where}: {alias} differs from {row.hf}, but config.json ties them. "
                    "Set tie_word_embeddings to false there, or correct the weights."
                )
