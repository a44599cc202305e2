"""Reads weights from a file or a folder into a plain parameter tree."""

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
    NONE,
    STORED,
    check_stored,
    count_forms,
    encode_row,
    read_stored,
    stored_shapes,
)
from lora_jax.hf.keys import Params, Row, WeightsError, absent_parts, check, nest_leaves
from lora_jax.hf.sources import FLOATS, HasCodes, Source
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
    table, absent = _check_source(source)
    held = [row for row in table if row.part not in absent]
    _check_dtypes(source, held)
    _check_aliases(source, held)
    if absent:
        begins = "freshly initialised, unless an adapter brings its own"
        print(f"{source.where} holds no {', '.join(absent)}: {begins}", file=sys.stderr)
    key = jax.random.key(0) if key is None else key
    if quantize is None and source.shipped:
        quantize = STORED
        print(f"{source.where}: {_shipped_note(len(source.shipped))}", file=sys.stderr)
    codings = codings_of(table, param_dtype, quantize, source)
    if quantize == STORED:
        check_stored(source, [row for row in held if row.path in codings])

    def read(row: Row) -> Leaf:
        place = None if sharding is None else sharding(row.path, row.stacked_shape)
        if row.path in codings and row.part not in absent:
            if (coded := read_codes(row, codings[row.path], place)) is not None:
                return coded
            unfit.append(row)
        if row.part in absent:
            fresh = _draw_parameter(row, source.config.initializer_range, key)
            return jax.device_put(fresh.astype(param_dtype), place)
        return _place_parameter(source, row, row.dtype_of(param_dtype), place)

    def read_codes(row: Row, coding: Coding | None, place: Sharding | None) -> Coded | None:
        if quantize == STORED:
            return read_stored(source, row, param_dtype, place)
        if coding is None:
            return None
        exact = functools.partial(_place_parameter, source, row, np.dtype(np.float32), place)
        return encode_row(row, coding, param_dtype, place, exact)

    unfit: list[Row] = []
    params = nest_leaves((row.path, read(row)) for row in table)
    if unfit:
        message = _unfit_message(source, unfit, len(codings), stored=quantize == STORED)
        warnings.warn(f"{source.where}: {message}", QuantizeWarning, stacklevel=3)
    return params


def _shipped_note(n_kernels: int) -> str:
    return (
        f"{n_kernels} kernels stay in the codes that they were shipped in; quantize='none' "
        "(--quantize none) reads arrays"
    )


def _unfit_message(source: Source, unfit: list[Row], n_kernels: int, *, stored: bool) -> str:
    """Returns the warning for kernels that were to be in codes, and are read as arrays."""
    if stored:
        return (
            f"{len(unfit)} of {n_kernels} kernels are read as floats: {unfit[0].path} lies "
            f"in {count_forms(source, unfit[:1])}. {source.kept_forms_note}"
        )
    return (
        f"{unfit[0].path} fits no blocks, nor do {len(unfit) - 1} other kernels of "
        f"{n_kernels}: they stay as they are"
    )


def shapes_of(
    table: Sequence[Row],
    dtype: DTypeLike,
    quantize: str | Codes | Sequence[QuantRule] | None = None,
    source: HasCodes | None = None,
) -> Params:
    """Returns the shapes of what `load_params` returns; reads no weights.

    Args:
      table: the parameters.
      dtype: dtype of the parameters.
      quantize: see ``models.from_pretrained``.
      source: the file whose codes are kept, for "stored".
    """
    quantize = STORED if quantize is None and source is not None and source.shipped else quantize
    codings = codings_of(table, dtype, quantize, source)

    def shape(row: Row) -> Leaf:
        array = jax.ShapeDtypeStruct(row.stacked_shape, row.dtype_of(dtype))
        coding = codings.get(row.path)
        if quantize == STORED and source is not None and row.path in codings:
            return stored_shapes(source, row, dtype) or array
        return array if coding is None else encode(array, coding)

    return nest_leaves((row.path, shape(row)) for row in table)


def codings_of(
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
    if quantize in (None, NONE):
        return {}
    if quantize == STORED and source is not None and source.shipped:
        return {r.path: None for r in table if not source.shipped.isdisjoint(r.hf_names)}
    shapes = nest_leaves(
        (row.path, jax.ShapeDtypeStruct(row.stacked_shape, dtype)) for row in table
    )
    kinds = {row.path: row.kind for row in table if row.kind is not None}
    if not isinstance(quantize, str | Codes):
        return plan(shapes, rules=quantize, kinds=kinds)
    return plan(shapes, "nf4" if quantize == STORED else quantize, kinds=kinds)


def absent_rows(source: Source) -> list[Row]:
    """Returns the parameters of optional parts, such as heads, that a source lacks entirely.

    Raises:
      WeightsError: other tensors are missing, left over or misshaped; one error lists all of them.
    """
    table, absent = _check_source(source)
    return [row for row in table if row.part in absent]


def _check_source(source: Source) -> tuple[list[Row], list[str]]:
    """Returns the key table that a source fits, and the optional parts that it lacks entirely."""
    table = source.format.table(source.config)
    absent = absent_parts(source.shapes, table)
    held = [row for row in table if row.part not in absent]
    check(source.shapes, held, source.where, source.format.ignored)
    return table, absent


def _draw_parameter(row: Row, std: float, key: jax.Array) -> jax.Array:
    """Draws a parameter as transformers does: kernels from N(0, std²), biases 0, scales 1."""
    leaf = row.path.rsplit("/", 1)[-1]
    if leaf == "kernel":
        own = jax.random.fold_in(key, zlib.crc32(row.path.encode()))
        return std * jax.random.normal(own, row.stacked_shape, jnp.float32)
    return jnp.full(row.stacked_shape, 1.0 if leaf == "scale" else 0.0, jnp.float32)


def _place_parameter(
    source: Source,
    row: Row,
    dtype: np.dtype,
    place: jax.sharding.Sharding | None,
    layers: range | None = None,
) -> jax.Array:
    """Reads a parameter onto its devices. Each part is read once, and freed before the next.

    Args:
      source, row: the parameter.
      dtype: dtype of the array.
      place: its sharding.
      layers: layers of a stack, those to read; all by default.
    """
    whole = tuple(range(size) for size in row.stacked_shape)
    if layers is not None:
        whole = (layers, *whole[1:])
    shape = tuple(map(len, whole))
    if place is None:
        array: jax.Array = jax.block_until_ready(jax.device_put(_part(source, row, whole, dtype)))
        return array
    try:
        indices = place.addressable_devices_indices_map(shape)
    except ValueError as error:
        raise ValueError(f"{row.path} {list(shape)} cannot be placed: {error}") from None
    devices: dict[tuple[range, ...], list[jax.Device]] = {}
    for device, slices in indices.items():
        box = tuple(axis[part] for part, axis in zip(slices or (), whole, strict=True))
        devices.setdefault(box, []).append(device)
    arrays: list[jax.Array] = []
    for box, holders in devices.items():
        part = _part(source, row, box, dtype)
        targets = [SingleDeviceSharding(d, memory_kind=place.memory_kind) for d in holders]
        arrays += jax.block_until_ready([jax.device_put(part, target) for target in targets])
    return jax.make_array_from_single_device_arrays(shape, place, arrays, dtype=dtype)


def _part(source: Source, row: Row, box: tuple[range, ...], dtype: np.dtype) -> np.ndarray:
    """Reads a box of the parameter: one range for each axis."""
    n = len(row.stack)
    out = np.empty([len(axis) for axis in box], dtype)
    within = tuple(slice(axis.start, axis.stop) for axis in box[n:])
    within = within[::-1] if row.transpose else within
    for member, name in zip(row.members, row.hf_names, strict=True):
        if all(i in axis for i, axis in zip(member, box, strict=False)):
            local = (i - axis.start for i, axis in zip(member, box, strict=False))
            at: tuple[int | EllipsisType, ...] = (*local, ...)
            view = out[at]
            source.read_into(view.T if row.transpose else view, name, within)
    return out


def _check_dtypes(source: Source, table: list[Row]) -> None:
    names = [name for row in table for name in (*row.hf_names, *row.aliases)]
    problems = [
        f"{name} is {source.dtypes[name]} ({source.locate(name)})"
        for name in names
        if source.dtypes.get(name, "F32") not in FLOATS
    ]
    if problems:
        raise WeightsError(
            f"{source.where}: weights have to be {', '.join(FLOATS)}\n  " + "\n  ".join(problems)
        )


def _check_aliases(source: Source, table: list[Row]) -> None:
    """Raises WeightsError if a file's second tensor of a tied pair differs from the first."""
    for row in table:
        for alias in row.aliases:
            if alias in source.shapes and not np.array_equal(
                source.read(alias), source.read(row.hf), equal_nan=True
            ):
                raise WeightsError(
                    f"{source.where}: {alias} differs from {row.hf}, but the configuration ties "
                    "them (tie_word_embeddings)"
                )
