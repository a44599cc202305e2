"""Data sets in blocks, each of which is read without reading those before it."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.training.data.rows import Row
from train.console.errors import UserError, as_user_errors
from train.data.files import NO_PARQUET, files_of, load, rows_of, rows_of_arrow
from train.data.text_files import not_utf_8, parsed, placed

BLOCK = 2**18  # bytes of a block of lines
_ROWS = 1_000  # of a block, for data that `datasets` loads
_SPOTS, _SPOT = 64, 2**12  # samples of a file for its fingerprint, and their bytes
_PIECE = 2**20  # bytes that are read at a time where lines are counted
_LINES = (".jsonl", ".ndjson", ".json")

NumberedRow = tuple[int, Row]


class FilePart(NamedTuple):
    """One file, or another source of rows, in blocks.

    Attributes:
      name: its name in messages.
      where: what numbers its rows: "byte" or "row".
      sizes: [blocks] bytes.
      read: reads the rows of a block, with their numbers.
      digest: a fingerprint of its size and of samples of its content.
    """

    name: str
    where: str
    sizes: np.ndarray
    read: Callable[[int], list[NumberedRow]]
    digest: str


@dataclasses.dataclass(frozen=True)
class BytePosition:
    """The place of a line that begins at a byte of a file; its number is counted if asked for."""

    path: Path
    at: int

    def __str__(self) -> str:
        line, left = 1, self.at
        with self.path.open("rb") as file:
            while left and (piece := file.read(min(left, _PIECE))):
                line, left = line + piece.count(b"\n"), left - len(piece)
        return f"line {line:,} (byte {self.at:,})"


class DatasetBlocks:
    """The blocks of one or several data sets, one after the other."""

    def __init__(self, parts: Sequence[FilePart]) -> None:
        self.parts = parts
        self.sizes = np.concatenate([part.sizes for part in parts])
        self._ends = np.cumsum([len(part.sizes) for part in parts])

    def read(self, block: int) -> tuple[int, list[NumberedRow]]:
        """Returns the number of a block's part, and its rows with their numbers there."""
        part = int(np.searchsorted(self._ends, block, side="right"))
        first = int(self._ends[part]) - len(self.parts[part].sizes)
        return part, self.parts[part].read(block - first)

    def named(self, part: int, number: int) -> str:
        """Returns the name of a row in messages: "the row at byte 3,000 of a.jsonl"."""
        return f"the row at {self.parts[part].where} {number:,} of {self.parts[part].name}"

    def digest(self) -> str:
        """Returns a fingerprint, which reads little of each part."""
        return hashlib.sha256("".join(part.digest for part in self.parts).encode()).hexdigest()

    def __repr__(self) -> str:
        return self.digest()


def find_blocks(names: Sequence[str], *, split: str, subset: str | None) -> DatasetBlocks:
    """Returns the blocks of data sets; see `train.data.files.read_rows`.

    Raises:
      UserError: there is no such data set, it is empty, or it cannot be read block by block.
    """
    parts = []
    for name in names:
        paths = files_of(name, split)
        if paths is None:
            parts.append(_arrow_part(name, load(name, split=split, subset=subset)))
        else:
            parts += [_file_part(path) for path in paths]
    parts = [part for part in parts if len(part.sizes)]
    if not parts:
        raise UserError(f"--dataset {' '.join(names)} has no rows")
    return DatasetBlocks(parts)


def _file_part(path: Path) -> FilePart:
    if path.suffix.lower() == ".parquet":
        return _parquet_part(path)
    if path.suffix.lower() not in _LINES or path.suffix.lower() == ".json" and _is_array(path):
        raise UserError(
            f"--stream: {path} cannot be read from its middle; lines of JSON (.jsonl), Parquet "
            "and what `datasets` loads can. Unpack or convert it, or leave out --stream"
        )
    size = path.stat().st_size
    sizes = np.full(-(-size // BLOCK), BLOCK, np.int64)
    sizes[-1:] = size - BLOCK * (len(sizes) - 1)
    read = functools.partial(_read_lines, path, BLOCK)
    return FilePart(str(path), "byte", sizes, read, _fingerprint(path))


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["


def _read_lines(path: Path, size: int, block: int) -> list[NumberedRow]:
    """Returns the objects of the lines that begin in a block, with the byte that each begins at."""
    rows: list[NumberedRow] = []
    for at, line in _lines(path, block * size, (block + 1) * size):
        if not line.strip():
            continue
        where = BytePosition(path, at)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise not_utf_8(path, where, error) from None
        row = parsed(text, path, where)
        rows.append((at, placed(row, path, where)))
    return rows


def _lines(path: Path, first: int, last: int) -> Iterator[tuple[int, bytes]]:
    """Yields the lines that begin from byte `first` on and before `last`, and where they begin."""
    with path.open("rb") as file:
        at = first
        if first:  # the line before belongs to an earlier block
            at = first - 1
            file.seek(at)
            while at < last:
                skipped = file.readline(last - at)
                at += len(skipped)
                if not skipped or skipped.endswith(b"\n"):
                    break
            else:
                return  # one line is longer than the block
        while at < last and (line := file.readline()):
            if not at:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield at, line
            at = file.tell()


def _parquet_part(path: Path) -> FilePart:
    import pyarrow
    import pyarrow.parquet

    with (
        as_user_errors(pyarrow.ArrowException, OSError, prefix=f"{path} {NO_PARQUET}"),
        pyarrow.parquet.ParquetFile(path) as file,
    ):
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        sizes = np.array([group.total_byte_size for group in groups], np.int64)
        starts = np.cumsum([0, *(group.num_rows for group in groups)])

    def read(block: int) -> list[NumberedRow]:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = file.read_row_group(block).to_pylist()
        first = int(starts[block]) + 1
        return [
            (n, placed(rows_of_arrow(row), path, f"row {n}"))
            for n, row in enumerate(rows, start=first)
        ]

    return FilePart(str(path), "row", sizes, read, _fingerprint(path))


def _arrow_part(name: str, dataset: Any) -> FilePart:
    """Returns a data set that `datasets` maps into memory, which loads only the rows in use."""
    n = len(dataset)
    a_row = max(1, (dataset.data.nbytes or n) // max(n, 1))
    counts = [min(_ROWS, n - first) for first in range(0, n, _ROWS)]

    def read(block: int) -> list[NumberedRow]:
        here = range(block * _ROWS, block * _ROWS + counts[block])
        return list(enumerate(rows_of(dataset.select(here)), start=here.start + 1))

    spots = np.linspace(0, n - 1, min(n, _SPOTS)).astype(int).tolist()
    seen = [json.dumps(row, default=repr) for row in dataset.select(spots)]
    digest = hashlib.sha256(repr((n, seen)).encode()).hexdigest()
    return FilePart(name, "row", a_row * np.array(counts, np.int64), read, digest)


def _fingerprint(path: Path) -> str:
    """Returns a hash of a file's size and of samples from all over it."""
    size = path.stat().st_size
    made = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for at in np.linspace(0, max(0, size - _SPOT), _SPOTS).astype(int).tolist():
            file.seek(at)
            made.update(file.read(_SPOT))
    return made.hexdigest()
