"""One tensor in codes, and the tensors of the files that hold it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from lora_jax.hf.keys import WeightsError
from lora_jax.hf.stored.raw import DTYPES, Fetch, Header
from lora_jax.quantized import Coded, Format


class LazyArray(NamedTuple):
    """One array of a `Coded`: its shape, its dtype, and what reads it (all rows for None)."""

    shape: tuple[int, ...]
    dtype: DTypeLike
    read: Callable[[slice | None], np.ndarray]


@dataclasses.dataclass(frozen=True)
class CodedTensor:
    """A tensor that files hold in codes.

    Attributes:
      name: its name, as if it were an array.
      format: the format of its codes.
      pieces: the arrays of its `Coded`, by name. Only of tensors of three axes, such as those of
        experts, are some rows of the first axis read.
      tensors: the names of the tensors that hold it, and of others that it makes useless.
    """

    name: str
    format: Format
    pieces: Mapping[str, LazyArray]
    tensors: Sequence[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that the codes stand for."""
        return self.pieces["codes"].shape

    def coded(self, dtype: DTypeLike, at: tuple[int | slice, ...] = ()) -> Coded:
        """Reads the codes of a part.

        Args:
          dtype: dtype of the array that they stand for.
          at: the part: an index or a slice along each of the first axes.

        Raises:
          WeightsError: the part cuts through a block.
        """
        rows = None
        if at and isinstance(at[0], int):
            rows, at = slice(at[0], at[0] + 1), (0, *at[1:])
        arrays = {name: piece.read(rows) for name, piece in self.pieces.items()}
        return self._cut(Coded(arrays, self.format, np.dtype(dtype)), at)

    def shapes(self, dtype: DTypeLike, at: tuple[int | slice, ...] = ()) -> Coded:
        """Returns the shapes of what `coded` returns."""
        empty = {
            name: np.broadcast_to(np.zeros((), piece.dtype), piece.shape)
            for name, piece in self.pieces.items()
        }
        part = self._cut(Coded(empty, self.format, np.dtype(dtype)), at)
        return part.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))

    def _cut(self, coded: Coded, at: tuple[int | slice, ...]) -> Coded:
        whole = coded.shape

        def inside(array: np.ndarray) -> np.ndarray:
            index = list(at)
            for axis, cut in enumerate(at):
                if array.shape[axis] == whole[axis]:
                    continue
                if array.shape[axis] > 1 and range(whole[axis])[cut] != range(whole[axis]):
                    raise WeightsError(
                        f"{self.name}: its parts cut through the blocks of its codes"
                    )
                index[axis] = slice(None) if isinstance(cut, slice) else 0
            return array[tuple(index)]

        return coded.map(inside)


class CodeFacts(NamedTuple):
    """The numbers that config.json gives for the codes of a module, or of all.

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


class Files(NamedTuple):
    """The tensors of a folder, and what config.json says of the codes of one.

    Attributes:
      tensors: what the files' headers say of each.
      fetch: reads one.
      facts: what config.json says.
    """

    tensors: Mapping[str, Header]
    fetch: Fetch
    facts: CodeFacts = CodeFacts()

    def find(self, whose: str, dtypes: Sequence[str], *names: str) -> str:
        """Returns the first of these names that there is.

        Raises:
          WeightsError: there is none, or its dtype is another; names `whose` it is.
        """
        name = next((name for name in names if name in self.tensors), None)
        if name is None:
            raise WeightsError(f"{whose} is in codes, and no file holds its {names[0]}")
        if (dtype := self.tensors[name].dtype) not in dtypes:
            raise WeightsError(f"{name} is {dtype}, expected {' or '.join(dtypes)}")
        return name

    def piece(
        self, name: str, shape: tuple[int, ...], *others: tuple[int, ...], raw: bool = False
    ) -> LazyArray:
        """Returns a tensor as it lies in its file; powers of two (F8_E8M0) as bytes.

        Args:
          name: the tensor.
          shape: its shape, and that of the piece.
          *others: shapes that the file may hold it in as well.
          raw: whether each of its numbers is a byte, whatever it stands for.

        Raises:
          WeightsError: the file holds it in none of these shapes.
        """
        dtype, own = self.tensors[name]
        if own not in (shape, *others):
            wanted = " or ".join(str(list(shape)) for shape in (shape, *others))
            raise WeightsError(f"{name} is {list(own)}, expected {wanted} by config.json")
        kind = np.dtype(np.uint8) if raw or dtype == "F8_E8M0" else DTYPES[dtype]

        def read(rows: slice | None) -> np.ndarray:
            if own == shape:
                return self.fetch(name, rows).view(kind)
            whole = self.fetch(name, None).view(kind).reshape(shape)
            return whole if rows is None else whole[rows]

        return LazyArray(shape, kind, read)

    def groups(self, whose: str, n_in: int) -> int:
        """Returns the number of groups of inputs.

        Raises:
          WeightsError: they do not come out even.
        """
        if n_in % (group := self.facts.group or n_in):
            raise WeightsError(f"{whose} has {n_in} inputs, which are no groups of {group}")
        return n_in // group


_NIBBLES = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=-1)
_SIGNED = ((_NIBBLES ^ 8) - 8).astype(np.int8).astype(ml_dtypes.int4)  # the same four bits
_LESS_8 = (_NIBBLES - 8).astype(np.int8).astype(ml_dtypes.int4)


def unpack(array: np.ndarray, *, less_8: bool = False, high_first: bool = False) -> np.ndarray:
    """Returns the numbers of 4 bits in an array's bytes, along its last axis, as int4.

    Args:
      array: array of bytes, or of words, whose lowest bits come first.
      less_8: take 8 from numbers of 0 to 15; by default, each keeps its four bits.
      high_first: the first number of a byte is in its high bits.
    """
    table = _LESS_8 if less_8 else _SIGNED
    table = table[:, ::-1] if high_first else table
    raw = np.ascontiguousarray(array).view(np.uint8)
    return table[raw].reshape(*array.shape[:-1], -1)
