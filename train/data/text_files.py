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
_MAX_NESTING_DEPTH = (
    200  # of lists and objects in each other; Python's own recursion ends at a thousand
)
_WHITE_SPACE = re.compile(r"\s*")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path) -> list[PlacedRow]:
    """Reads a file with one JSON object per line, or with one array of objects.

    Raises:
      UserError: the file cannot be read; names the line.
    """
    with _open_text(path) as file:
        character = file.read(1)
        while character.isspace():
            character = file.read(1)
        file.seek(0)
        if character == "[":
            rows = _parse_array(path, file.read())
            if rows is not None:
                return rows
        file.seek(0)
        return list(_parse_lines(path, file))


def _parse_lines(path: Path, file: TextIO) -> Iterator[PlacedRow]:
    """Yields the object of each line that is not blank."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        yield with_position(parse_json_object(line, path, where), path, where)


def parse_json_object(text: str, path: Path, where: object) -> dict[str, Any]:
    """Parses a JSON object.

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
        raise _json_error(error, text, path, where) from None
    return _check_object(value, text, path, where)


def _json_error(error: Exception, text: str, path: Path, where: object) -> UserError:
    """Returns the UserError for a text that cannot be parsed as JSON."""
    location = f"{path}, {where}"
    excerpt = shown(text)
    if isinstance(error, json.JSONDecodeError):
        return UserError(
            f"{location} is not JSON ({error}): {excerpt}. Write one object per line, or one "
            "array of "
            "objects."
        )
    if isinstance(error, RecursionError):
        return UserError(
            f"{location} nests lists or objects more than {_MAX_NESTING_DEPTH} levels deep: "
            f"{excerpt}. Correct or remove the row."
        )
    return UserError(
        f"{location} has an integer of more than {sys.get_int_max_str_digits():,} digits: "
        f"{excerpt}. Put the number in quotes, or remove it."
    )


def _check_object(value: Any, text: str, path: Path, where: object) -> dict[str, Any]:
    """Raises a UserError if a value is not an object, too deep, or has an unpaired surrogate."""
    if not isinstance(value, dict):
        raise UserError(
            f"{path}, {where} is not a JSON object: {shown(text)}. Write each row as an object, "
            "such as "
            '{"prompt": "…", "completion": "…"}.'
        )
    if (
        text.count("[") + text.count("{") > _MAX_NESTING_DEPTH
        and _nesting_depth(value) > _MAX_NESTING_DEPTH
    ):
        raise _json_error(RecursionError(), text, path, where)
    # An escaped surrogate without its other half cannot be encoded as UTF-8.
    if _SURROGATE_ESCAPE.search(text):
        plain = json.dumps(value, ensure_ascii=False)
        try:
            plain.encode()
        except UnicodeEncodeError:
            with as_user_errors(TrainingError):
                check_text(plain, f"{path}, {where}")
    return value


def _nesting_depth(value: Any) -> int:
    """Returns the number of levels of nested lists and objects."""
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
    """Returns the values that are lists or dicts."""
    return [value for value in values if isinstance(value, dict | list)]


def _parse_array(path: Path, text: str) -> list[PlacedRow] | None:
    """Parses an array of objects; returns None if the text has one array per line."""
    decoder = json.JSONDecoder()
    breaks = [match.start() for match in re.finditer("\n", text)]
    rows: list[tuple[int, dict[str, Any]]] = []  # with the line in which each begins
    index = text.index("[") + 1
    while True:
        # Stop at the end of an empty array.
        index = _skip_white_space(text, index)
        if text[index : index + 1] == "]" and not rows:
            return []
        # Name the row by its line and, if the line has several rows, by its number.
        line = bisect.bisect_left(breaks, index) + 1
        where = f"line {line}"
        if rows and rows[-1][0] == line:
            where += f", row {len(rows) + 1}"
        try:
            row, end = decoder.raw_decode(text, index)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path} is not a JSON array ({error}). Correct the file at this place."
            ) from None
        except (ValueError, RecursionError) as error:
            raise _json_error(error, text[index : index + 100], path, where) from None
        if not rows and not isinstance(row, dict):
            return None  # its lines are read one by one, and refused
        rows.append((line, _check_object(row, text[index:end], path, where)))
        index = _skip_white_space(text, end)
        if text[index : index + 1] == "]":
            break
        if text[index : index + 1] != ",":
            raise UserError(
                f"{path}, line {bisect.bisect_left(breaks, index) + 1}: A comma or the end of the "
                f"array is missing before {shown(text[index : index + 40])}. Insert it."
            )
        index += 1
    rest = text[index + 1 :].strip()
    if rest:
        raise UserError(
            f"{path} has text after the end of its JSON array: {shown(rest[:40])}. Remove the text."
        )
    rows_of_line = Counter(line for line, _ in rows)
    placed_rows: list[PlacedRow] = []
    for number, (line, row) in enumerate(rows, start=1):
        where = f"line {line}"
        if rows_of_line[line] > 1:
            where += f", row {number}"
        placed_rows.append(with_position(row, path, where))
    return placed_rows


def _skip_white_space(text: str, start: int) -> int:
    """Returns the index of the first character from `start` on that is not white space."""
    space = _WHITE_SPACE.match(text, start)
    return space.end() if space else start


def with_position(row: dict[str, Any], path: Path, where: object) -> PlacedRow:
    """Returns a row together with its position in a file, which messages name."""
    placed_row = PlacedRow(row)
    placed_row.place = (str(path), where)
    return placed_row


def read_lines(path: Path) -> list[str]:
    """Reads the lines of a text file.

    Raises:
      UserError: the file cannot be read.
    """
    with _open_text(path) as file:
        return list(file)


def read_csv(path: Path) -> list[PlacedRow]:
    """Reads a CSV file with a header, separated by commas, semicolons or tabs.

    Raises:
      UserError: the file cannot be read; names the line.
    """
    limit = csv.field_size_limit(sys.maxsize)  # by default 131,072 characters
    try:
        with _open_text(path) as file:
            separator = _guess_separator(file.readline())
            file.seek(0)
            return list(_read_records(path, csv.reader(file, delimiter=separator, strict=True)))
    finally:
        csv.field_size_limit(limit)


def _guess_separator(header: str) -> str:
    """Returns the separator that splits a header into the most fields."""
    return max(_SEPARATORS, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))


def _read_records(path: Path, reader: Any) -> Iterator[PlacedRow]:
    """Yields the rows of a CSV file; errors name the line at which a row begins."""
    header: list[str] = []
    line = 1  # at which a record begins: fields may hold line breaks
    try:
        for fields in reader:
            if not header:
                header = fields
                repeated_names = [name for name in header if header.count(name) > 1]
                if repeated_names:
                    raise UserError(
                        f"{path}: The header has the field {repeated_names[0]!r} twice. Rename "
                        "one of them."
                    )
            elif fields and len(fields) != len(header):
                raise UserError(
                    f"{path}, line {line} has {len(fields)} fields, but the header has "
                    f"{len(header)} "
                    f"({', '.join(map(repr, header))}): {shown(fields)}. Put fields that contain "
                    f"the separator {reader.dialect.delimiter!r} in quotes."
                )
            elif fields:
                yield with_position(dict(zip(header, fields, strict=True)), path, f"line {line}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line} is not CSV ({error}). Correct the line.") from None


def _find_undecodable_line(file: Iterable[bytes]) -> tuple[int, UnicodeDecodeError]:
    """Finds the first line that is not UTF-8; returns its number and the error."""
    for number, line in enumerate(file, start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return number, error
    raise AssertionError("the text has been decoded")


def not_utf8_error(path: Path, where: object, error: UnicodeDecodeError) -> UserError:
    """Returns the UserError for a text that is not UTF-8."""
    return UserError(
        f"{path}, {where} is not UTF-8 text ({error}). Save the file as UTF-8, or convert it with "
        "iconv -t UTF-8."
    )


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """Opens a text file, plain or gzipped, and skips a byte order mark (BOM)."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError:
        with opened(path, "rb") as file:
            line, error = _find_undecodable_line(file)
        raise not_utf8_error(path, f"line {line}", error) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be unpacked ({error}). Compress or download the file again."
        ) from error
