"""The copies of folders in buckets on this machine: which are in use, and which go.

A process holds a shared lock on each copy that it reads, until it ends. Before another copy is
made, those that nobody holds, and that nobody has asked for in a month, make room; so does what a
kill left of one. Working copies go at once where their process is gone. On Windows, which has no
such locks, all stay.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_UNUSED_SECONDS = 30 * 24 * 3600.0  # without a use, after which a copy makes room
_USE = "in_use"  # in each copy: the file that is locked, whose time is that of the last use
_GONE = ".gone-"  # how names begin of what is being deleted
_MAX_HELD = 200  # copies, each by an open file: those that were asked for last
_held: dict[Path, int] = {}  # the open file of each root, the newest last
_working: dict[Path, int] = {}  # those of working copies


def hold(root: Path) -> bool:
    """Keeps a copy while this process lives; returns False if it is not there."""
    if sys.platform != "win32" and root.is_dir():
        with contextlib.suppress(OSError):  # in a cache that cannot be written, nothing makes room
            if root not in _held:
                _held[root] = os.open(root / _USE, os.O_RDWR | os.O_CREAT, 0o644)
                fcntl.flock(_held[root], fcntl.LOCK_SH)
            _held[root] = _held.pop(root)  # moves it to the end
            os.utime(_held[root])
        if len(_held) > _MAX_HELD:
            oldest_root = next(iter(_held))
            os.close(_held.pop(oldest_root))
    if root.is_dir():
        return True
    file = _held.pop(root, None)
    if file is not None:  # the copy made room while this process waited
        os.close(file)
    return False


def make_working_folder(prefix: str) -> Path:
    """Makes a folder for a working copy; deletes those of processes that are gone.

    Args:
      prefix: Beginning of the names of such folders, among the temporary ones.
    """
    if sys.platform == "win32":
        return Path(tempfile.mkdtemp(prefix=prefix))
    temporary_folder = Path(tempfile.gettempdir())
    for deleted_root in temporary_folder.glob(f"{_GONE}{prefix}*"):  # a kill interrupted it
        shutil.rmtree(deleted_root, ignore_errors=True)
    for root in temporary_folder.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # it is held, gone, or another user's
            if (root / _USE).exists():
                _delete(root)
    while True:
        root = Path(tempfile.mkdtemp(prefix=prefix))
        file = os.open(root / _USE, os.O_RDWR | os.O_CREAT, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks: nobody deletes it
            fcntl.flock(file, fcntl.LOCK_SH)
        if root.is_dir():  # no other process was faster than the lock
            _working[root] = file
            return root
        os.close(file)


def drop_working_folder(root: Path) -> None:
    """Deletes a folder that `make_working_folder` made."""
    shutil.rmtree(root, ignore_errors=True)
    file = _working.pop(root, None)
    if file is not None:
        os.close(file)


def make_room(folder: Path) -> None:
    """Deletes the copies in a folder that nobody holds, and nobody has asked for in a month."""
    for root in folder.iterdir():
        with contextlib.suppress(OSError):  # it is held, or gone
            use_file = root / _USE
            dated_path = use_file if use_file.exists() else root
            unused_seconds = time.time() - dated_path.stat().st_mtime
            if unused_seconds > _UNUSED_SECONDS:
                _delete(root)


def _delete(root: Path) -> None:
    """Deletes a copy; raises an OSError if a process holds it."""
    if sys.platform == "win32":
        return
    file = os.open(root / _USE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        deleted_root = root.with_name(f"{_GONE}{root.name}")
        root.rename(deleted_root)  # so that nobody sees a part of it
        shutil.rmtree(deleted_root)
    finally:
        os.close(file)
