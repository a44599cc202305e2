"""The lock of a run's folder: one run at a time writes to it.

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
from typing import Any

from lora_jax.training.errors import TrainingError

LOCK = "run.lock"
_BEAT = 10.0  # seconds between touches
_STALE = 60.0  # seconds without a touch


class FolderLock:
    """Holds the lock of a folder; a context manager.

    Args:
      folder: the folder of a run; it exists.
      notice: is called with a line before a wait.

    Raises:
      TrainingError: another run holds the lock; names its host and process.
    """

    def __init__(self, folder: Path, notice: Callable[[str], object] = lambda line: None) -> None:
        self._path = folder / LOCK
        self._own = holder_here()
        self._notice = notice
        self._released = threading.Event()

    def __enter__(self) -> "FolderLock":
        while not self._placed():
            holder = _read(self._path)
            if holder is None:
                continue  # it was released in the meantime
            if not self._is_stale(holder):
                raise TrainingError(
                    f"another run, {name_of_holder(holder)}, is writing to the folder "
                    f"{self._path.parent}: let it end, or choose another folder"
                )
            self._remove(holder)
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._remove(self._own)

    def _placed(self) -> bool:
        """Places the lock, with its content at once; returns False where there is one."""
        with _temporary(self._path, self._own) as ours:
            try:
                os.link(ours, self._path)
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                try:
                    with self._path.open("x") as file:
                        json.dump(self._own, file)
                except FileExistsError:
                    return False
        return True

    def _is_stale(self, holder: dict[str, Any]) -> bool:
        """Returns True if the holder is gone; may wait to see whether it touches the lock."""
        if (gone := is_gone(holder)) is not None:
            return gone
        age = self._age()
        if age is None or age > _STALE:
            return True
        self._notice(
            f"{name_of_holder(holder)} holds {self._path}: waiting up to {_STALE:.0f} s to see "
            "whether it still runs"
        )
        first = self._touched()
        until = time.monotonic() + _STALE - age
        while time.monotonic() < until:
            time.sleep(0.5)
            if self._touched() != first:
                return self._touched() is None
        return True

    def _age(self) -> float | None:
        """Returns the seconds since the last touch, by the clock of the file system."""
        with _temporary(self._path, {}) as fresh:
            now = fresh.stat().st_mtime
        touched = self._touched()
        return None if touched is None else now - touched

    def _touched(self) -> float | None:
        try:
            return self._path.stat().st_mtime
        except FileNotFoundError:
            return None

    def _remove(self, holder: dict[str, Any]) -> None:
        """Removes the lock of a holder, and no other."""
        aside = self._path.with_name(f".{LOCK}.{self._own['host']}.{os.getpid()}")
        with contextlib.suppress(OSError):
            os.rename(self._path, aside)
            if _read(aside) != holder:  # another run took it over in the meantime
                os.link(aside, self._path)
            aside.unlink()

    def _beat(self) -> None:
        while not self._released.wait(_BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._path)


def _read(path: Path) -> dict[str, Any] | None:
    """Returns the holder, {} where the file is damaged; None where there is no lock."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def _temporary(path: Path, content: dict[str, Any]) -> Any:
    number, name = tempfile.mkstemp(prefix=f".{LOCK}.", dir=path.parent)
    with os.fdopen(number, "w") as file:
        json.dump(content, file)
    try:
        yield Path(name)
    finally:
        os.unlink(name)


def _process(pid: int) -> dict[str, Any]:
    """Returns a process's number and when it started, where that is known; {} if there is none."""
    if os.name != "posix":  # where a signal of 0 is none
        return {"pid": pid, "started": None}
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return {}
    except PermissionError:  # another user's
        pass
    started = None
    with contextlib.suppress(OSError, IndexError):  # Linux alone tells it so
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in "ZX":  # it ended, and only its parent was not told yet
            return {}
        started = fields[19]
    return {"pid": pid, "started": started}


def _here() -> dict[str, Any]:
    """Returns the host, boot and container, without which a process number says nothing."""
    boot = container = None
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        container = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "container": container}


def holder_here() -> dict[str, Any]:
    """Returns this process, as a lock names its holder."""
    return {**_here(), **_process(os.getpid())}


def is_gone(holder: dict[str, Any]) -> bool | None:
    """Returns True for a dead process of this host; None for one of another host."""
    if os.name == "posix" and "pid" in holder and {**holder, **_here()} == holder:
        return {**holder, **_process(holder["pid"])} != holder or not _process(holder["pid"])
    return None


def name_of_holder(holder: dict[str, Any]) -> str:
    """Returns the process and host that a lock names, for messages."""
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"
