"""Links, lists and measures folders whose files never change."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def link(source: Path, target: Path) -> None:
    """Copies a folder atomically by hard links, which need no disk space."""
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
    """Yields a linked copy of a folder, which the caller renames; otherwise it is removed."""
    folder = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    link(source, folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def list_folder(folder: Path) -> list[Path]:
    """Returns the paths in a folder; [] if the folder does not exist."""
    return list(folder.iterdir()) if folder.is_dir() else []


def size(folder: Path) -> int:
    """Returns the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def adapter_name(folder: Path | str, root: Path) -> str:
    """Returns the engine's name of an adapter: its folder relative to a root."""
    return str(Path(folder).relative_to(root))
