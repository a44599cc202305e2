"""Folders that appear whole or not at all."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write to, which takes the place of `folder` at the end.

    After an error `folder` is as it was, and what was written is gone.
    """
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        put_in_place(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_of(folder: Path) -> Path:
    """Returns the path that a folder is written to before it is renamed: hidden, beside it."""
    return folder.with_name(f".{folder.name}.partial")


def put_in_place(partial: Path, folder: Path) -> None:
    """Renames `partial` to `folder`; deletes what was there once the new one is in place."""
    if not folder.exists():
        partial.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        if not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old)
