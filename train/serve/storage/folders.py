"""Links, lists and measures folders of files that never change."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def link(source: Path, target: Path) -> None:
    """Makes a folder of the same files, which take no room of their own; it appears whole."""
    partial_folder = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    try:
        shutil.copytree(source, partial_folder, copy_function=os.link)
    except (OSError, shutil.Error):  # another file system, or one without links
        shutil.rmtree(partial_folder, ignore_errors=True)
        shutil.copytree(source, partial_folder)
    os.rename(partial_folder, target)


@contextmanager
def link_beside(source: Path, target: Path) -> Iterator[Path]:
    """Makes a folder of the same files, to be renamed to its target; removes it if it was not."""
    folder = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    link(source, folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def list_folder(folder: Path) -> list[Path]:
    """Returns the paths in a folder; none if it is not there."""
    return list(folder.iterdir()) if folder.is_dir() else []


def size(folder: Path) -> int:
    """Returns the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def adapter_name(folder: Path | str, root: Path) -> str:
    """Returns the name by which the engine knows the adapter in a folder beneath a root."""
    return str(Path(folder).relative_to(root))
