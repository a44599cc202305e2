"""Folders that appear whole or not at all."""

import shutil
from pathlib import Path


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
