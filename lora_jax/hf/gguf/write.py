"""Writes GGUF files one tensor at a time; a file appears complete or not at all."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from lora_jax.folders import partial_folder_of
from lora_jax.hf.keys import WeightsError, write_converted

# The types that are written, and the numbers by which `general.file_type` has them.
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2}
FLOAT_TYPES = ("f32", "f16", "bf16")
_ADVICE = "llama.cpp's llama-quantize makes the others, such as Q4_K_M, of an f32 or f16 file"


class GGUFTensor(NamedTuple):
    """A tensor to write.

    Attributes:
      name: the name of the tensor in the file, a text.
      shape: rows first, as NumPy has it.
      kind: the name of its GGUF type, such as "F16".
      read: makes its values, fp32, or the bytes of its codes.
      is_raw: True if `read` makes the bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], np.ndarray]
    is_raw: bool = False


def write_gguf(
    path: Path,
    fields: Mapping[str, Any],
    entries: Sequence[GGUFTensor],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a GGUF file, with one tensor at a time in the host's memory.

    Args:
      path: the file; the folder is made.
      fields: the metadata; `general.architecture` is among them.
      entries: the tensors, in the order of the file.
      progress: called with the bytes that are written, and with those of all tensors.

    Raises:
      ImportError: if the gguf package is not installed.
      WeightsError: for values that a type cannot hold; names the tensor.
    """
    gguf = import_gguf()
    partial_file = partial_folder_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write_file(gguf, partial_file, fields, entries, progress)
        os.replace(partial_file, path)
    finally:
        partial_file.unlink(missing_ok=True)


def import_gguf() -> ModuleType:
    """Returns the module gguf; an ImportError says how to install it."""
    try:
        import gguf
    except ImportError:
        raise ImportError(
            "Writing a GGUF file needs the package gguf. Run pip install 'lora_jax[models]'."
        ) from None
    return gguf


def check_gguf_type(asked: str, allowed: Sequence[str] = tuple(FILE_TYPES)) -> None:
    """Raises a ValueError for a type that cannot be written; lists the others."""
    if asked not in allowed:
        raise ValueError(
            f"lora_jax cannot write the GGUF type {asked!r}. Choose one of {', '.join(allowed)}. "
            f"{_ADVICE}"
        )


def gguf_type_for_shape(kind: str, shape: Sequence[int]) -> str:
    """Returns the type, or F16 if the type's blocks do not divide a row."""
    gguf = import_gguf()
    block_weights, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    has_whole_blocks = shape[-1] % block_weights == 0
    return kind if has_whole_blocks else "F16"


def _write_file(
    gguf: ModuleType,
    path: Path,
    fields: Mapping[str, Any],
    entries: Sequence[GGUFTensor],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Writes the file in place, as part of `write_gguf`."""
    writer = gguf.GGUFWriter(None, fields["general.architecture"])
    try:
        for name, value in fields.items():
            if name != "general.architecture":
                _add_metadata_field(gguf, writer, name, value)
        entry_bytes = [_count_bytes(gguf, entry) for entry in entries]
        for entry, n_bytes in zip(entries, entry_bytes, strict=True):
            kind = gguf.GGMLQuantizationType[entry.kind]
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), n_bytes, kind)
        writer.write_header_to_file(path=path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        written_bytes = 0
        for entry, n_bytes in zip(entries, entry_bytes, strict=True):
            writer.write_tensor_data(_encode_tensor(gguf, entry))
            written_bytes += n_bytes
            if progress is not None:
                progress(written_bytes, sum(entry_bytes))
    finally:
        if writer.fout is not None:
            writer.close()


def _add_metadata_field(gguf: ModuleType, writer: Any, name: str, value: Any) -> None:
    """Adds a metadata pair: uint32 for ints, int32 for negative ones, fp32 for floats."""
    value_types = gguf.GGUFValueType
    if not isinstance(value, list):
        writer.add_key_value(name, value, _value_type(value_types, value))
        return
    element_type = _value_type(value_types, value[0]) if value else value_types.STRING
    if element_type == value_types.UINT32:
        element_type = value_types.INT32  # as llama.cpp's converters write the types of tokens
    writer.add_key_value(name, value, value_types.ARRAY, sub_type=element_type)


def _value_type(value_types: Any, value: Any) -> Any:
    """Returns gguf's type of a metadata value."""
    if isinstance(value, bool):
        return value_types.BOOL
    if isinstance(value, int):
        return value_types.UINT32 if value >= 0 else value_types.INT32
    return value_types.FLOAT32 if isinstance(value, float) else value_types.STRING


def _count_bytes(gguf: ModuleType, entry: GGUFTensor) -> int:
    block_weights, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[entry.kind]]
    return int(math.prod(entry.shape) // block_weights * block_bytes)


def _encode_tensor(gguf: ModuleType, entry: GGUFTensor) -> np.ndarray:
    """Returns the bytes of a tensor in its GGUF type."""
    array = entry.read()
    if entry.is_raw:
        return np.ascontiguousarray(array)
    if array.shape != entry.shape:
        raise WeightsError(
            f"{entry.name} has the shape {list(array.shape)}, not {list(entry.shape)}"
        )
    if entry.kind == "F16":
        fp16_array = np.empty(array.shape, np.float16)
        write_converted(array, fp16_array, entry.name)
        return fp16_array
    array = np.ascontiguousarray(array, np.float32)
    codes: np.ndarray = gguf.quants.quantize(array, gguf.GGMLQuantizationType[entry.kind])
    return codes
