"""Reads and writes safetensors tensors as bytes, for 8-bit and 4-bit floats that NumPy lacks."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

# By safetensors' names. Two numbers of F4 share a byte, so they are read as bytes.
NUMPY_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F4": np.uint8,
        "U8": np.uint8,
        "I8": np.int8,
        "I32": np.int32,
        "I64": np.int64,
    }.items()
}

SAFETENSORS_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


class Header(NamedTuple):
    """The entry of a tensor in the header of its file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The number of bytes of the tensor in its file."""
        return math.prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


# (a tensor's name, rows) -> these rows of it, all for None.
FetchRows = Callable[[str, slice | None], np.ndarray]


class RawFile:
    """A safetensors file that another reader has checked already.

    Args:
      path: the file.
    """

    def __init__(self, path: Path):
        self._path = path
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            self._header = json.loads(file.read(header_bytes))
        self._data_start = 8 + header_bytes

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Reads a tensor.

        Args:
          name: the tensor.
          rows: along its first axis, with a start and a stop; all by default.

        Raises:
          OSError: the file cannot be read, or is shorter than its header says.
        """
        header = self._header[name]
        dtype = NUMPY_DTYPES[header["dtype"]]
        shape = list(header["shape"])
        if header["dtype"] == "F4":  # two numbers a byte
            shape[-1] //= 2
        start = self._data_start + header["data_offsets"][0]
        if rows is not None:
            row_bytes = math.prod(shape[1:]) * dtype.itemsize
            start += rows.start * row_bytes
            shape[0] = rows.stop - rows.start
        n_bytes = math.prod(shape) * dtype.itemsize
        data = np.empty(n_bytes, np.uint8)
        n_read = 0
        with self._path.open("rb", buffering=0) as file:
            file.seek(start)
            while n_read < n_bytes:
                chunk_bytes = file.readinto(data.data[n_read:])
                if not chunk_bytes:
                    raise OSError(f"{self._path} ends within {name}")
                n_read += chunk_bytes
        return data.view(dtype).reshape(shape)


class TensorEntry(NamedTuple):
    """A tensor to write: its header entry, and a function that reads it."""

    header: Header
    read: Callable[[], np.ndarray]


def entry_of_array(array: np.ndarray) -> TensorEntry:
    """Returns the entry of an array."""
    return TensorEntry(Header(SAFETENSORS_NAMES[array.dtype], array.shape), lambda: array)


def write_tensors(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    """Writes a safetensors file with PyTorch's metadata, one tensor at a time.

    Args:
      path: the file.
      tensors: by name; they are read in this order, and lie in the file by the size of an element,
        so that each begins at a multiple of it.

    Raises:
      OSError: if the file cannot be written.
    """

    def element_bytes(name: str) -> int:
        return NUMPY_DTYPES[tensors[name].header.dtype].itemsize

    file_header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    offset = 0
    for name in sorted(tensors, key=lambda name: (-element_bytes(name), name)):
        header = tensors[name].header
        offsets[name] = offset
        offset += header.nbytes
        file_header[name] = {
            "dtype": header.dtype,
            "shape": list(header.shape),
            "data_offsets": [offsets[name], offset],
        }
    text = json.dumps(file_header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    data_start = 8 + len(text)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, entry in tensors.items():
                file.seek(data_start + offsets[name])
                array = np.ascontiguousarray(entry.read())
                file.write(array.reshape(-1).view(np.uint8).data)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
