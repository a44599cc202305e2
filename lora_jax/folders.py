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


def check_free(folder: Path, overwrite: bool, marker: str, kind: str) -> None:
    """Checks that a folder may be written, or replaced.

    Args:
      folder: the folder.
      overwrite: whether one that is there may be replaced.
      marker: the file that every folder of this kind has; one without it is not replaced.
      kind: "model's" or "adapter's", for messages.

    Raises:
      FileExistsError: the folder exists, or is of another kind.
    """
    if not folder.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder} exists; name another folder, or give overwrite=True to replace it"
        )
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / marker).exists()):
        raise FileExistsError(
            f"{folder} holds no {marker}, so it is no {kind} folder, and overwrite=True would "
            "delete what is there; name another folder"
        )


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
