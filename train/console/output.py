"""Writes results to a file atomically or to standard output, and lines and tables for people."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Column, Table

from lora_jax.buckets.copies import replace_copy_paths
from train.console.errors import UserError


@contextmanager
def opened(out: str | None, overwrite: bool, option: str = "--out") -> Iterator[TextIO]:
    """Opens the output. A file is written under a temporary name, and renamed at the end.

    Args:
      out: the file; None for standard output.
      overwrite: replace a file that is there.
      option: the option that names the file, for messages.

    Raises:
      UserError: the file cannot be written, or is there.
    """
    if out is None:
        yield sys.stdout
        return
    path = Path(out).expanduser()
    check_free(out, overwrite, option)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("x", encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(
            f"{option} {out} cannot be written: {error.strerror or error}. Pass another file."
        ) from error
    try:
        with file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_other(output: str | None, source: str | None, option: str, source_option: str) -> None:
    """Raises a UserError if a command would overwrite the file that it reads.

    Args:
      output, source: the files; None for none.
      option, source_option: the options that name them.
    """
    if output is None or source is None:
        return
    output_path = Path(output).expanduser()
    source_path = Path(source).expanduser()
    both_exist = output_path.exists() and source_path.exists()
    if both_exist and output_path.samefile(source_path):
        raise UserError(
            f"{option} {output} is also the file of {source_option}. Pass another file."
        )


def check_free(out: str, overwrite: bool, option: str = "--out") -> None:
    """Raises a UserError if a file exists and must not be replaced, or is a folder."""
    path = Path(out).expanduser()
    if path.is_dir():
        raise UserError(f"{option} {out} is a folder. Pass a file.")
    if path.exists() and not overwrite:
        raise UserError(
            f"{option} {out} exists already. Pass another file, or replace it with --overwrite."
        )


def shorten(text: str, max_chars: int) -> str:
    """Returns a text as one line with a maximum number of characters."""
    line = " ".join(text.split())
    return line if len(line) <= max_chars else f"{line[: max_chars - 1]}…"


def tell(console: Console, *lines: str) -> None:
    """Prints lines on a console without markup, colours and wrapping."""
    for line in lines:
        console.print(replace_copy_paths(line), highlight=False, soft_wrap=True, markup=False)


def say(text: str) -> None:
    """Prints a line for people on stderr, because programs may read standard output."""
    print(replace_copy_paths(text), file=sys.stderr, flush=True)


def print_figures(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Prints a table whose first column names its rows."""
    table = Table(columns[0], *(Column(name, justify="right") for name in columns[1:]), title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
