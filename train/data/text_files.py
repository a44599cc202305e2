"""Reads rows from files of text: JSON lines, JSON arrays, CSV and TSV, plain or gzipped."""

import bisect
import csv
import gzip
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from lora_jax.training.data.rows import PlacedRow, check_text
from lora_jax.training.data.turns import shown
from lora_jax.training.errors import TrainingError
from train.console.errors import UserError, as_user_errors

_SEPARATORS = ",;\t"
_MOST_LEVELS = 200  # of lists and objects in each other; Python's own recursion ends at a thousand
_SPACE = re.compile(r"\s*")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path) -> list[PlacedRow]:
    """Reads one object a line, or an array of objects.

    Raises:
      UserError: the file cannot be read; names the line.
    """
    with _opened(path) as file:
        character = file.read(1)
        while character.isspace():
            character = file.read(1)
        file.seek(0)
        if character == "[":
            rows = _array(path, file.read())
            if rows is not None:
                return rows
        file.seek(0)
        return list(_lines(path, file))


def _lines(path: Path, file: TextIO) -> Iterator[PlacedRow]:
    """Yields the object of each line that is not blank."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        yield placed(parsed(line, path, where), path, where)


def parsed(text: str, path: Path, where: object) -> dict[str, Any]:
    """Returns the object that a text in JSON says.

    Args:
      text: the text.
      path: the file that has it.
      where: the place in the file, for messages, whose `str` is not taken without an error.

    Raises:
      UserError: it is not a JSON object, or holds what no row can.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(error, text, path, where) from None
    return _object(value, text, path, where)


def _unreadable(error: Exception, text: str, path: Path, where: object) -> UserError:
    """Returns the error of a text that cannot be parsed."""
    what = f"{path}, {where}"
    excerpt = shown(text)
    if isinstance(error, json.JSONDecodeError):
        return UserError(
            f"{what} is not JSON ({error}): {excerpt}. A file has one object a line, or is one "
            "array of objects"
        )
    if isinstance(error, RecursionError):
        return UserError(
            f"{what} has lists or objects in each other, more than {_MOST_LEVELS} levels deep: "
            f"{excerpt}. Correct it or take the row out"
        )
    return UserError(
        f"{what} has a whole number of more than {sys.get_int_max_str_digits():,} digits: "
        f"{excerpt}. Write it as a text, in quotes, or take it out"
    )


def _object(value: Any, text: str, path: Path, where: object) -> dict[str, Any]:
    """Returns an object; raises UserError if it is none, too deep, or has half a character."""
    if not isinstance(value, dict):
        raise UserError(f"{path}, {where} is not a JSON object: {shown(text)}")
    if text.count("[") + text.count("{") > _MOST_LEVELS and _depth(value) > _MOST_LEVELS:
        raise _unreadable(RecursionError(), text, path, where)
    if _HALF.search(text):
        plain = json.dumps(value, ensure_ascii=False)
        try:
            plain.encode()
        except UnicodeEncodeError:
            with as_user_errors(TrainingError):
                check_text(plain, f"{path}, {where}")
    return value


def _depth(value: Any) -> int:
    """Returns the depth to which lists and objects are nested."""
    depth = 0
    level = _containers([value])
    while level:
        depth += 1
        children: list[Any] = []
        for container in level:
            children += container.values() if isinstance(container, dict) else container
        level = _containers(children)
    return depth


def _containers(values: Iterable[Any]) -> list[Any]:
    """Returns the lists and the objects among values."""
    return [value for value in values if isinstance(value, dict | list)]


def _array(path: Path, text: str) -> list[PlacedRow] | None:
    """Returns the objects of a JSON array; None if the text has one array a line."""
    decoder = json.JSONDecoder()
    breaks = [match.start() for match in re.finditer("\n", text)]
    rows: list[tuple[int, dict[str, Any]]] = []  # with the line in which each begins
    index = text.index("[") + 1
    while True:
        index = _after_space(text, index)
        if text[index : index + 1] == "]" and not rows:
            return []
        line = bisect.bisect_left(breaks, index) + 1
        where = f"line {line}"
        if rows and rows[-1][0] == line:
            where += f", row {len(rows) + 1}"
        try:
            row, end = decoder.raw_decode(text, index)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not a JSON array ({error})") from None
        except (ValueError, RecursionError) as error:
            raise _unreadable(error, text[index : index + 100], path, where) from None
        if not rows and not isinstance(row, dict):
            return None  # its lines are read one by one, and refused
        rows.append((line, _object(row, text[index:end], path, where)))
        index = _after_space(text, end)
        if text[index : index + 1] == "]":
            break
        if text[index : index + 1] != ",":
            raise UserError(
                f"{path}, line {bisect.bisect_left(breaks, index) + 1}: a comma or the array's end "
                f"is missing before {shown(text[index : index + 40])}"
            )
        index += 1
    rest = text[index + 1 :].strip()
    if rest:
        raise UserError(f"{path} has text after the end of its JSON array: {shown(rest[:40])}")
    rows_of_line = Counter(line for line, _ in rows)
    placed_rows: list[PlacedRow] = []
    for number, (line, row) in enumerate(rows, start=1):
        where = f"line {line}"
        if rows_of_line[line] > 1:
            where += f", row {number}"
        placed_rows.append(placed(row, path, where))
    return placed_rows


def _after_space(text: str, start: int) -> int:
    """Returns the index of the first character from `start` on that is no white space."""
    space = _SPACE.match(text, start)
    return space.end() if space else start


def placed(row: dict[str, Any], path: Path, where: object) -> PlacedRow:
    """Returns a row that knows its place, for messages."""
    placed_row = PlacedRow(row)
    placed_row.place = (str(path), where)
    return placed_row


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
    return max(_SEPARATORS, key=lambda by: len(next(csv.reader([header], delimiter=by), [])))


def _records(path: Path, reader: Any) -> Iterator[PlacedRow]:
    """Yields the records of a table; an error names the line at which a record begins."""
    header: list[str] = []
    line = 1  # at which a record begins: fields may hold line breaks
    try:
        for fields in reader:
            if not header:
                header = fields
                repeated_names = [name for name in header if header.count(name) > 1]
                if repeated_names:
                    raise UserError(f"{path}: the header has the field {repeated_names[0]!r} twice")
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


def _undecodable(file: Iterable[bytes]) -> tuple[int, UnicodeDecodeError]:
    """Returns the number of the first line that is not UTF-8, and the error."""
    for number, line in enumerate(file, start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return number, error
    raise AssertionError("the text has been decoded")


def not_utf_8(path: Path, where: object, error: UnicodeDecodeError) -> UserError:
    """Returns the error of a text in another encoding."""
    return UserError(
        f"{path}, {where} is not UTF-8 text: {error}. Save the file as UTF-8, or convert it (iconv "
        "-t UTF-8)"
    )


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Opens a text, without the mark that some programs begin it with (BOM)."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError:
        with opened(path, "rb") as file:
            line, error = _undecodable(file)
        raise not_utf_8(path, f"line {line}", error) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked: {error}") from error
