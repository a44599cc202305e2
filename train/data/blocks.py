"""Data sets in blocks, which can be read independently of each other."""

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
from train.data.files import (
    NOT_PARQUET,
    find_data_files,
    load_dataset,
    read_dataset_rows,
    without_arrow_nulls,
)
from train.data.text_files import not_utf8_error, parse_json_object, with_position

BLOCK_BYTES = 2**18  # bytes of a block of lines
_BLOCK_ROWS = 1_000  # of a block, for data that `datasets` loads
_FINGERPRINT_SAMPLES = 64  # of a file, for its fingerprint
_SAMPLE_BYTES = 2**12
_READ_BYTES = 2**20  # that are read at a time where lines are counted
_LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")

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
    """The place of a line in a file, by its first byte.

    Only `str` counts the lines before it, which means to read the file that far.
    """

    path: Path
    byte: int

    def __str__(self) -> str:
        """Returns the position as a line number and a byte."""
        line = 1
        remaining = self.byte
        with self.path.open("rb") as file:
            while remaining > 0:
                content = file.read(min(remaining, _READ_BYTES))
                if not content:
                    break
                line += content.count(b"\n")
                remaining -= len(content)
        return f"line {line:,} (byte {self.byte:,})"


class DatasetBlocks:
    """The blocks of several data sets in order."""

    def __init__(self, parts: Sequence[FilePart]) -> None:
        self.parts = parts
        self.sizes = np.concatenate([part.sizes for part in parts])
        self._ends = np.cumsum([len(part.sizes) for part in parts])

    def read(self, block: int) -> tuple[int, list[NumberedRow]]:
        """Returns the index of a block's data set, and its rows with their row numbers."""
        part = int(np.searchsorted(self._ends, block, side="right"))
        first_block = int(self._ends[part]) - len(self.parts[part].sizes)
        return part, self.parts[part].read(block - first_block)

    def named(self, part: int, number: int) -> str:
        """Describes a row for messages: "the row at byte 3,000 of a.jsonl"."""
        return f"the row at {self.parts[part].where} {number:,} of {self.parts[part].name}"

    def digest(self) -> str:
        """Returns one hash of the fingerprints of all data sets."""
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
        paths = find_data_files(name, split)
        if paths is None:
            parts.append(
                _split_arrow_into_blocks(name, load_dataset(name, split=split, subset=subset))
            )
        else:
            parts += [_split_file_into_blocks(path) for path in paths]
    parts = [part for part in parts if len(part.sizes)]
    if not parts:
        raise UserError(f"--dataset {' '.join(names)} has no rows. Name a data set with rows.")
    return DatasetBlocks(parts)


def _split_file_into_blocks(path: Path) -> FilePart:
    """Splits a file of JSON lines or a Parquet file into blocks."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _split_parquet_into_blocks(path)
    has_lines = suffix in _LINE_SUFFIXES and not (suffix == ".json" and _begins_as_json_array(path))
    if not has_lines:
        raise UserError(
            f"--stream cannot start reading {path} in its middle. Unpack the file, convert it to "
            "JSON lines (.jsonl) or Parquet, or remove --stream."
        )
    file_bytes = path.stat().st_size
    # All blocks have the same size, except for the last one.
    sizes = np.full(-(-file_bytes // BLOCK_BYTES), BLOCK_BYTES, np.int64)
    sizes[-1:] = file_bytes - BLOCK_BYTES * (len(sizes) - 1)
    return FilePart(
        name=str(path),
        where="byte",
        sizes=sizes,
        read=functools.partial(_read_lines, path, BLOCK_BYTES),
        digest=_fingerprint_file(path),
    )


def _begins_as_json_array(path: Path) -> bool:
    """Returns True if the first character of a file opens a JSON array."""
    with path.open("rb") as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["


def _read_lines(path: Path, block_bytes: int, block: int) -> list[NumberedRow]:
    """Returns the objects of the lines that begin in a block, with the byte that each begins at."""
    rows: list[NumberedRow] = []
    for byte, line in _lines_beginning_between(
        path, block * block_bytes, (block + 1) * block_bytes
    ):
        if not line.strip():
            continue
        where = BytePosition(path, byte)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise not_utf8_error(path, where, error) from None
        row = parse_json_object(text, path, where)
        rows.append((byte, with_position(row, path, where)))
    return rows


def _lines_beginning_between(path: Path, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yields each line that begins at a byte from `start` on and before `end`, with that byte."""
    with path.open("rb") as file:
        byte = start
        if start > 0:  # a line that begins before `start` belongs to an earlier block
            byte = start - 1
            file.seek(byte)
            while byte < end:
                skipped = file.readline(end - byte)
                byte += len(skipped)
                if not skipped or skipped.endswith(b"\n"):
                    break
            else:
                return  # one line is longer than the block
        while byte < end:
            line = file.readline()
            if not line:
                return
            if byte == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield byte, line
            byte = file.tell()


def _split_parquet_into_blocks(path: Path) -> FilePart:
    """Splits a Parquet file into its row groups."""
    import pyarrow
    import pyarrow.parquet

    with (
        as_user_errors(pyarrow.ArrowException, OSError, prefix=f"{path} {NOT_PARQUET}"),
        pyarrow.parquet.ParquetFile(path) as file,
    ):
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        sizes = np.array([group.total_byte_size for group in groups], np.int64)
        starts = np.cumsum([0, *(group.num_rows for group in groups)])

    def read(block: int) -> list[NumberedRow]:
        """Reads the rows of a row group, with their row numbers."""
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = file.read_row_group(block).to_pylist()
        first_number = int(starts[block]) + 1
        return [
            (number, with_position(without_arrow_nulls(row), path, f"row {number}"))
            for number, row in enumerate(rows, start=first_number)
        ]

    return FilePart(
        name=str(path), where="row", sizes=sizes, read=read, digest=_fingerprint_file(path)
    )


def _split_arrow_into_blocks(name: str, dataset: Any) -> FilePart:
    """Splits a data set of the `datasets` library into blocks, which are loaded when read."""
    n_rows = len(dataset)
    row_bytes = max(1, (dataset.data.nbytes or n_rows) // max(n_rows, 1))
    rows_of_blocks = [min(_BLOCK_ROWS, n_rows - i) for i in range(0, n_rows, _BLOCK_ROWS)]

    def read(block: int) -> list[NumberedRow]:
        start = block * _BLOCK_ROWS
        indices = range(start, start + rows_of_blocks[block])
        return list(enumerate(read_dataset_rows(dataset.select(indices)), start=start + 1))

    # The fingerprint depends on the number of rows and on rows from all over the data set.
    sample_indices = (
        np.linspace(0, n_rows - 1, min(n_rows, _FINGERPRINT_SAMPLES)).astype(int).tolist()
    )
    samples = [json.dumps(row, default=repr) for row in dataset.select(sample_indices)]
    return FilePart(
        name=name,
        where="row",
        sizes=row_bytes * np.array(rows_of_blocks, np.int64),
        read=read,
        digest=hashlib.sha256(repr((n_rows, samples)).encode()).hexdigest(),
    )


def _fingerprint_file(path: Path) -> str:
    """Hashes the size of a file and samples at even distances in it."""
    file_bytes = path.stat().st_size
    digest = hashlib.sha256(str(file_bytes).encode())
    last_start = max(0, file_bytes - _SAMPLE_BYTES)
    with path.open("rb") as file:
        for start in np.linspace(0, last_start, _FINGERPRINT_SAMPLES).astype(int).tolist():
            file.seek(start)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
