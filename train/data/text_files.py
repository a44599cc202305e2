"""Reads rows from files of text: JSON lines, JSON arrays, CSV and TSV, plain or gzipped."""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from lora_jax.training.data.rows import PlacedRow, shown
from train.run.errors import UserError

_SEPARATORS = ",;\t"


def read_json(path: Path) -> list[PlacedRow]:
    """Reads one object a line, or an array of objects.

    Raises:
      UserError: the file cannot be read; names the line.
    """
    with _opened(path) as file:
        begin = file.read(1)
        while begin.isspace():
            begin = file.read(1)
        file.seek(0)
        if begin == "[" and (rows := _array(path, file.read())) is not None:
            return rows
        file.seek(0)
        return list(_lines(path, file))


def _lines(path: Path, file: TextIO) -> Iterator[PlacedRow]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number} is not JSON ({error}): {shown(line)}. A file has one "
                "object a line, or is one array of objects"
            ) from None
        yield _placed(row, path, number, line)


def _array(path: Path, text: str) -> list[PlacedRow] | None:
    """Returns the objects of a JSON array; None if the text has one array a line."""
    decoder = json.JSONDecoder()
    rows: list[PlacedRow] = []
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = _after_space(text, at)
        if text[at : at + 1] == "]" and not rows:
            return rows
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not a JSON array ({error})") from None
        if not rows and not isinstance(row, dict):
            return None  # its lines are read one by one, and refused
        rows.append(_placed(row, path, line, text[at:end]))
        at = _after_space(text, end)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            line += text.count("\n", counted, at)
            raise UserError(
                f"{path}, line {line}: a comma or the array's end is missing before "
                f"{shown(text[at : at + 40])}"
            )
        at += 1
    if rest := text[at + 1 :].strip():
        raise UserError(f"{path} has text after the end of its JSON array: {shown(rest[:40])}")
    return rows


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _placed(row: Any, path: Path, line: int, text: str) -> PlacedRow:
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {line} is not a JSON object: {shown(text)}")
    return placed(row, path, f"line {line}")


def placed(row: dict[str, Any], path: Path, where: str) -> PlacedRow:
    """Returns a row that knows its place, for messages."""
    made = PlacedRow(row)
    made.place = (str(path), where)
    return made


def read_lines(path: Path) -> list[str]:
    """Reads the lines of a text.

    Raises:
      UserError: the file cannot be read.
    """
    with _opened(path) as file:
        return list(file)


def read_csv(path: Path) -> list[PlacedRow]:
    """Reads a table with a header, whose separator is a comma, a semicolon or a tab.

    Raises:
      UserError: the file cannot be read; names the line.
    """
    limit = csv.field_size_limit(sys.maxsize)  # by default 131,072 characters
    try:
        with _opened(path) as file:
            separator = _separator(file.readline())
            file.seek(0)
            return list(_records(path, csv.reader(file, delimiter=separator, strict=True)))
    finally:
        csv.field_size_limit(limit)


def _separator(header: str) -> str:
    """Returns the separator that splits a header into the most fields."""
    return max(_SEPARATORS, key=lambda one: len(next(csv.reader([header], delimiter=one), [])))


def _records(path: Path, reader: Any) -> Iterator[PlacedRow]:
    header: list[str] = []
    line = 1  # at which a record begins: fields may hold line breaks
    try:
        for fields in reader:
            if not header:
                header = fields
                if twice := [name for name in header if header.count(name) > 1]:
                    raise UserError(f"{path}: the header has the field {twice[0]!r} twice")
            elif fields and len(fields) != len(header):
                raise UserError(
                    f"{path}, line {line} has {len(fields)} fields and the header {len(header)} "
                    f"({', '.join(map(repr, header))}): {shown(fields)}. Quote fields that hold "
                    f"the separator {reader.dialect.delimiter!r}"
                )
            elif fields:
                yield placed(dict(zip(header, fields, strict=True)), path, f"line {line}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line} is not CSV: {error}") from None


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Opens a text, without the mark that some programs begin it with (BOM)."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: {error}. Save it as UTF-8, or convert it (iconv -t UTF-8)"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked: {error}") from error
