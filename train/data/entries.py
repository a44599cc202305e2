"""Reads the texts and the rows that a command takes from a file or from standard input."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from lora_jax.training.data.rows import name_of
from train.console.errors import UserError, as_user_errors
from train.data.files import read_file
from train.data.text_files import read_lines
from train.options.paths import kind_of

# A name for messages ("rows.csv, line 3"), and the row; or the line without space around it.
Entry: TypeAlias = tuple[str, Any]


def read_entries(path: str, option: str) -> list[Entry]:
    """Reads the rows of a data file (such as .jsonl or .csv), or the lines of another text file.

    Args:
      path: the file.
      option: the option that names it.

    Raises:
      UserError: there is no such file, it cannot be read, or it has no rows.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"{option} {path} is a folder. Name a file in it.")
    if not file.is_file():
        raise UserError(f"{option} {path} does not exist. Check the path.")
    if kind_of(path) is None:
        return name_lines(read_lines(file), path)
    rows = read_file(file)
    if not rows:
        raise UserError(f"{option} {path} has no rows. Name a file with rows.")
    return [(name_of(row, path, number), row) for number, row in enumerate(rows, start=1)]


def name_lines(lines: Iterable[str], source: str) -> list[Entry]:
    """Names each line by its number in the source."""
    return [(f"{source}, line {n}", line.strip()) for n, line in enumerate(lines, start=1)]


def read_typed_lines(content: str) -> Iterator[str]:
    """Yields the lines of standard input as they arrive.

    Args:
      content: what a line holds, for the person who types it.

    Raises:
      UserError: they are not UTF-8 text.
    """
    if sys.stdin.isatty():
        print(f"Type one {content} per line. End with Ctrl-D.", file=sys.stderr)
    with as_user_errors(
        UnicodeDecodeError, prefix="Standard input is not UTF-8 text. Convert it to UTF-8. "
    ):
        yield from sys.stdin
