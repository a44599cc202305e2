"""Protects local copies of bucket folders while processes use them, and deletes old ones.

A process holds a shared lock on each copy that it reads, until the process ends. Before another
copy is made, unused copies are deleted: no process holds them, and none has asked for them in a
month. Working copies are deleted as soon as their process has ended. Windows has no such locks, so
all copies stay there.
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

_MAX_UNUSED_SECONDS = 30 * 24 * 3600.0  # a copy that was unused for longer is deleted
_LOCK_FILE = "in_use"  # the locked file of each copy; its time is that of the last use
_DELETED_PREFIX = ".gone-"  # begins the names of folders that are being deleted
_MAX_HELD_COPIES = 200  # one open file each; the copies that were asked for last are held
_lock_files_of_copies: dict[Path, int] = {}  # file descriptor by root, the newest last
_lock_files_of_working_copies: dict[Path, int] = {}  # file descriptor by root


def hold_copy(root: Path) -> bool:
    """Protects a copy until this process ends; returns False if the copy does not exist."""
    if sys.platform != "win32" and root.is_dir():
        with contextlib.suppress(OSError):  # in a read-only cache, nothing is deleted anyway
            if root not in _lock_files_of_copies:
                _lock_files_of_copies[root] = os.open(
                    root / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644
                )
                fcntl.flock(_lock_files_of_copies[root], fcntl.LOCK_SH)
            _lock_files_of_copies[root] = _lock_files_of_copies.pop(root)  # moves it to the end
            os.utime(_lock_files_of_copies[root])
        if len(_lock_files_of_copies) > _MAX_HELD_COPIES:
            oldest_root = next(iter(_lock_files_of_copies))
            os.close(_lock_files_of_copies.pop(oldest_root))
    if root.is_dir():
        return True
    file = _lock_files_of_copies.pop(root, None)
    if file is not None:  # another process deleted the copy while this one waited for the lock
        os.close(file)
    return False


def make_working_folder(prefix: str) -> Path:
    """Makes a folder for a working copy; deletes the folders of processes that have ended.

    Args:
      prefix: Beginning of the names of such folders, among the temporary ones.
    """
    if sys.platform == "win32":
        return Path(tempfile.mkdtemp(prefix=prefix))
    temporary_folder = Path(tempfile.gettempdir())
    for deleted_root in temporary_folder.glob(
        f"{_DELETED_PREFIX}{prefix}*"
    ):  # a kill interrupted it
        shutil.rmtree(deleted_root, ignore_errors=True)
    for root in temporary_folder.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # it is held, gone, or another user's
            if (root / _LOCK_FILE).exists():
                _delete_copy(root)
    while True:
        root = Path(tempfile.mkdtemp(prefix=prefix))
        file = os.open(root / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks: nobody deletes it
            fcntl.flock(file, fcntl.LOCK_SH)
        if root.is_dir():  # no other process was faster than the lock
            _lock_files_of_working_copies[root] = file
            return root
        os.close(file)


def drop_working_folder(root: Path) -> None:
    """Deletes a folder that `make_working_folder` made."""
    shutil.rmtree(root, ignore_errors=True)
    file = _lock_files_of_working_copies.pop(root, None)
    if file is not None:
        os.close(file)


def delete_unused_copies(folder: Path) -> None:
    """Deletes the copies in a folder that no process uses, and that are a month old."""
    for root in folder.iterdir():
        with contextlib.suppress(OSError):  # it is held, or gone
            use_file = root / _LOCK_FILE
            dated_path = use_file if use_file.exists() else root
            unused_seconds = time.time() - dated_path.stat().st_mtime
            if unused_seconds > _MAX_UNUSED_SECONDS:
                _delete_copy(root)


def _delete_copy(root: Path) -> None:
    """Deletes a copy; raises an OSError if a process uses it."""
    if sys.platform == "win32":
        return
    file = os.open(root / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        deleted_root = root.with_name(f"{_DELETED_PREFIX}{root.name}")
        root.rename(deleted_root)  # so that nobody sees a part of it
        shutil.rmtree(deleted_root)
    finally:
        os.close(file)
