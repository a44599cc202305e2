"""The lock of a run's folder, to which only one run may write at a time.

The lock is a file that names its holder, which touches it every few seconds. It is stale if its
holder is a dead process of this host, or if it was not touched for a minute (its host was restarted
or is gone); then the next run takes it over. So a run that was killed can go on, on this host or
another.
"""

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lora_jax.training.errors import TrainingError

LOCK = "run.lock"
_TOUCH_SECONDS = 10.0  # seconds between touches
_STALE_SECONDS = 60.0  # seconds without a touch
_POLL_SECONDS = 1.0  # seconds between looks at a lock that may be stale


Holder = dict[str, Any]  # a process, as a lock names it


class HeldLock(NamedTuple):
    """The state of an existing lock.

    Attributes:
      holder: the process that holds the lock.
      version: changes with each touch.
      age: the seconds since the last touch, where they are known; else 0.
    """

    holder: Holder
    version: Any
    age: float = 0.0


class LockFile(Protocol):
    """The file or bucket object that locks a run's folder."""

    folder: Any

    def place(self) -> bool:
        """Creates the lock; returns False if there is one already."""

    def read(self) -> HeldLock | None:
        """Returns the existing lock, or None."""

    def touch(self) -> None:
        """Updates the lock, to show that this process still runs."""

    def remove(self, lock: HeldLock | None = None) -> None:
        """Removes the given lock, by default this process's, but no other run's lock."""


class RunLock:
    """Holds the lock of a folder, as a context manager.

    Args:
      file: the lock's file, in a folder that exists, or its object in a bucket.
      notice: is called with a line before a wait.

    Raises:
      TrainingError: another run holds the lock; names its host and process.
    """

    def __init__(self, file: LockFile, notice: Callable[[str], object] = lambda line: None) -> None:
        self._file = file
        self._notice = notice
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> "RunLock":
        while not self._file.place():
            lock = self._file.read()
            if lock is None:
                continue  # it was released in the meantime
            if not self._is_stale(lock):
                raise TrainingError(
                    f"another run, {name_of_holder(lock.holder)}, is writing to the folder "
                    f"{self._file.folder}. Wait until it ends, or choose another folder."
                )
            self._file.remove(lock)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._thread.join(_TOUCH_SECONDS)  # a touch may be under way
        self._file.remove()

    def _is_stale(self, lock: HeldLock) -> bool:
        """Returns True if the holder has died; may wait to see if it touches the lock."""
        is_dead = is_dead_process(lock.holder)
        if is_dead is not None:
            return is_dead
        if lock.age > _STALE_SECONDS:
            return True
        self._notice(
            f"{name_of_holder(lock.holder)} holds {self._file.folder / LOCK}. Waiting up to "
            f"{_STALE_SECONDS:.0f} s to see whether that process still runs"
        )
        deadline = time.monotonic() + _STALE_SECONDS - lock.age
        while time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            latest = self._file.read()
            if latest is None:
                return True
            if latest.version != lock.version:
                return False
        return True

    def _beat(self) -> None:
        while not self._released.wait(_TOUCH_SECONDS):
            self._file.touch()


class FolderLock:
    """The lock of a folder on a disk; see `LockFile`. Its version is the time of the last touch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / LOCK
        self._holder = describe_this_process()

    def place(self) -> bool:
        """Creates the lock; returns False if there is one already."""
        with _temporary_file(self._path, self._holder) as complete_file:
            try:
                os.link(complete_file, self._path)
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                try:
                    with self._path.open("x") as file:
                        json.dump(self._holder, file)
                except FileExistsError:
                    return False
        return True

    def read(self) -> HeldLock | None:
        """Returns the existing lock, or None."""
        with _temporary_file(self._path, {}) as file:
            file_system_time = file.stat().st_mtime
        try:
            touch_time = self._path.stat().st_mtime
            holder = _read_holder(self._path)
        except FileNotFoundError:
            return None
        return HeldLock(holder=holder, version=touch_time, age=file_system_time - touch_time)

    def touch(self) -> None:
        """Updates the lock, to show that this process still runs."""
        with contextlib.suppress(OSError):
            os.utime(self._path)

    def remove(self, lock: HeldLock | None = None) -> None:
        """Removes the given lock, by default this process's, but no other run's lock."""
        expected_holder = self._holder if lock is None else lock.holder
        # Renaming is atomic, so only one process gets the file. Only then is its holder compared.
        removed_path = self._path.with_name(f".{LOCK}.{self._holder['host']}.{os.getpid()}")
        with contextlib.suppress(OSError):
            os.rename(self._path, removed_path)
            if _read_holder(removed_path) != expected_holder:
                # Another run took the lock over in the meantime: give the lock back to that run.
                os.link(removed_path, self._path)
            removed_path.unlink()


def _read_holder(path: Path) -> Holder:
    """Returns the holder named in a lock file; {} if the file cannot be read."""
    try:
        return parse_holder(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError:
        return {}


def parse_holder(content: str | bytes) -> Holder:
    """Returns the holder named in a lock; {} if the lock is damaged."""
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


@contextlib.contextmanager
def _temporary_file(path: Path, content: Holder) -> Any:
    """Yields a temporary file with this content, and deletes it."""
    descriptor, name = tempfile.mkstemp(prefix=f".{LOCK}.", dir=path.parent)
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file)
    try:
        yield Path(name)
    finally:
        os.unlink(name)


def _describe_process(pid: int) -> Holder:
    """Returns a process's id and start time, if known; {} if it does not exist."""
    if os.name != "posix":  # elsewhere, a signal of 0 would end the process
        return {"pid": pid, "started": None}
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return {}
    except PermissionError:  # another user's
        pass
    started = None
    with contextlib.suppress(OSError, IndexError):  # only Linux has this file
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in "ZX":  # it ended, and only its parent was not told yet
            return {}
        started = fields[19]
    return {"pid": pid, "started": started}


def _describe_host() -> Holder:
    """Returns the host, boot and container, in which a process id is valid."""
    boot = container = None
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        container = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "container": container}


def describe_this_process() -> Holder:
    """Returns the fields that identify this process in a lock."""
    return {**_describe_host(), **_describe_process(os.getpid())}


def is_dead_process(holder: Holder) -> bool | None:
    """Returns True for a dead process of this host; None for a process of another host."""
    is_of_this_host = {**holder, **_describe_host()} == holder
    if os.name != "posix" or "pid" not in holder or not is_of_this_host:
        return None
    process = _describe_process(holder["pid"])
    # A later process may have the number: it started at another time.
    return not process or {**holder, **process} != holder


def name_of_holder(holder: Holder) -> str:
    """Returns the process and host named in a lock, for messages."""
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"
