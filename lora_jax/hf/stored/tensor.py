"""One quantized tensor, and the stored tensors that it consists of."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from lora_jax.hf.keys import WeightsError
from lora_jax.hf.stored.raw import NUMPY_DTYPES, FetchRows, Header
from lora_jax.quantized import Coded, Format


class LazyArray(NamedTuple):
    """One array of a `Coded`: its shape, its dtype, and the function that reads its rows."""

    shape: tuple[int, ...]
    dtype: DTypeLike
    read: Callable[[slice | None], np.ndarray]


@dataclasses.dataclass(frozen=True)
class CodedTensor:
    """A quantized tensor of a folder.

    Attributes:
      name: its name, as if it were an array.
      format: the format of its codes.
      arrays: the arrays of its `Coded`, by name. Only of tensors of three axes, such as those of
        experts, are some rows of the first axis read.
      tensors: the names of the tensors that hold it, and of others that it makes useless.
    """

    name: str
    format: Format
    arrays: Mapping[str, LazyArray]
    tensors: Sequence[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dequantized array."""
        return self.arrays["codes"].shape

    def coded(self, dtype: DTypeLike, index: tuple[int | slice, ...] = ()) -> Coded:
        """Reads the codes of the tensor or of a slice.

        Args:
          dtype: dtype of the array that they stand for.
          index: the part: an index or a slice along each of the first axes.

        Raises:
          WeightsError: the part cuts through a block.
        """
        rows = None
        if index and isinstance(index[0], int):  # reads one member of a stack
            rows = slice(index[0], index[0] + 1)
            index = (0, *index[1:])
        arrays = {name: array.read(rows) for name, array in self.arrays.items()}
        return self._cut_codes(Coded(arrays, self.format, np.dtype(dtype)), index)

    def shapes(self, dtype: DTypeLike, index: tuple[int | slice, ...] = ()) -> Coded:
        """Returns the shapes of the result of `coded`."""
        empty_arrays = {
            name: np.broadcast_to(np.zeros((), array.dtype), array.shape)
            for name, array in self.arrays.items()
        }
        part = self._cut_codes(Coded(empty_arrays, self.format, np.dtype(dtype)), index)
        return part.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype))

    def _cut_codes(self, coded: Coded, index: tuple[int | slice, ...]) -> Coded:
        """Returns a slice of codes, with the scales of its blocks; see `coded`."""
        weight_shape = coded.shape

        def cut_array(array: np.ndarray) -> np.ndarray:
            """Slices one array of the codes."""
            array_index = list(index)
            for axis, axis_index in enumerate(index):
                n_weights = weight_shape[axis]
                n_elements = array.shape[axis]
                if n_elements == n_weights:
                    continue
                # These are scales, each of which belongs to several weights, or to all of them.
                takes_all = range(n_weights)[axis_index] == range(n_weights)
                if n_elements > 1 and not takes_all:
                    raise WeightsError(
                        f"{self.name} is a fused weight, and a block of its codes belongs to two "
                        "of its parts, so it cannot be split"
                    )
                array_index[axis] = slice(None) if isinstance(axis_index, slice) else 0
            return array[tuple(array_index)]

        return coded.map(cut_array)


class CodeSettings(NamedTuple):
    """The quantization settings that config.json gives for modules.

    Attributes:
      block: the size of blocks along both axes; None for one scale a row or a tensor.
      group: the number of weights along the inputs that share a scale; None for all.
      zero_is_less: zeros are stored less one.
      symmetric: no zeros are needed.
    """

    block: int | None = None
    group: int | None = None
    zero_is_less: bool = False
    symmetric: bool = True


class FolderTensors(NamedTuple):
    """The tensors of a folder, with the quantization settings of one of them.

    Attributes:
      tensors: what the files' headers say of each.
      fetch: reads one.
      settings: what config.json says.
    """

    tensors: Mapping[str, Header]
    fetch: FetchRows
    settings: CodeSettings = CodeSettings()

    def find(self, owner: str, dtypes: Sequence[str], *names: str) -> str:
        """Returns the first of these names that the folder contains.

        Raises:
          WeightsError: there is none, or its dtype is another; names `owner`, a tensor in codes.
        """
        stored_names = [name for name in names if name in self.tensors]
        if not stored_names:
            raise WeightsError(
                f"{owner} is quantized, but no file holds its {names[0]}. Download the checkpoint "
                "again."
            )
        name = stored_names[0]
        dtype = self.tensors[name].dtype
        if dtype not in dtypes:
            raise WeightsError(f"{name} has the dtype {dtype}, not {' or '.join(dtypes)}")
        return name

    def lazy_array(
        self, name: str, shape: tuple[int, ...], *file_shapes: tuple[int, ...], raw: bool = False
    ) -> LazyArray:
        """Returns a stored tensor as it is; powers of two (F8_E8M0) as bytes.

        Args:
          name: the tensor.
          shape: the shape of the array, and of the tensor.
          *file_shapes: shapes that the tensor may have as well.
          raw: whether each of its numbers is a byte, whatever it stands for.

        Raises:
          WeightsError: the file holds it in none of these shapes.
        """
        file_dtype, file_shape = self.tensors[name]
        expected_shapes = (shape, *file_shapes)
        if file_shape not in expected_shapes:
            listing = " or ".join(str(list(expected)) for expected in expected_shapes)
            raise WeightsError(
                f"{name} has the shape {list(file_shape)}, but config.json implies {listing}"
            )
        is_bytes = raw or file_dtype == "F8_E8M0"
        dtype = np.dtype(np.uint8) if is_bytes else NUMPY_DTYPES[file_dtype]

        def read(rows: slice | None) -> np.ndarray:
            if file_shape == shape:
                return self.fetch(name, rows).view(dtype)
            array = self.fetch(name, None).view(dtype).reshape(shape)
            return array if rows is None else array[rows]

        return LazyArray(shape, dtype, read)

    def groups(self, name: str, n_in: int) -> int:
        """Returns the number of input groups of a tensor.

        Raises:
          WeightsError: they do not come out even.
        """
        group_size = self.settings.group or n_in
        if n_in % group_size:
            raise WeightsError(
                f"{name} has {n_in} inputs, which cannot be divided into groups of {group_size}"
            )
        return n_in // group_size


_NIBBLES_OF_BYTE = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=-1)
_SIGNED_NIBBLES = (
    ((_NIBBLES_OF_BYTE ^ 8) - 8).astype(np.int8).astype(ml_dtypes.int4)
)  # the same four bits
_NIBBLES_LESS_8 = (_NIBBLES_OF_BYTE - 8).astype(np.int8).astype(ml_dtypes.int4)


def unpack_int4(array: np.ndarray, *, less_8: bool = False, high_first: bool = False) -> np.ndarray:
    """Returns the 4-bit numbers in an array's bytes, along its last axis, as int4.

    Args:
      array: array of bytes, or of words, whose lowest bits come first.
      less_8: take 8 from numbers of 0 to 15; by default, each keeps its four bits.
      high_first: the first number of a byte is in its high bits.
    """
    numbers_of_byte = _NIBBLES_LESS_8 if less_8 else _SIGNED_NIBBLES
    if high_first:
        numbers_of_byte = numbers_of_byte[:, ::-1]
    data = np.ascontiguousarray(array).view(np.uint8)
    return numbers_of_byte[data].reshape(*array.shape[:-1], -1)
