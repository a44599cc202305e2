"""The lock of a run's folder in a bucket: an object that is created only where there is none.

The store itself compares generations (ifGenerationMatch), so that of two runs one has it. Its
holder writes it again every few seconds; one that was not written for a minute is stale, as that of
a dead process of this host is.
"""

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from lora_jax.buckets.store import (
    ABSENT,
    BucketError,
    BucketPath,
    ObjectChanged,
    delete_object,
    read_object,
    write_object,
)
from lora_jax.training.errors import TrainingError
from lora_jax.training.run.lock import LOCK, holder_here, is_gone, name_of_holder

_BEAT, _STALE = 10.0, 60.0  # seconds between writes, and without one
_LOOK = 2.0  # seconds between looks at a lock that may be stale


class BucketLock:
    """Holds the lock of a folder in a bucket; a context manager.

    Args:
      folder: the folder of a run.
      notice: is called with a line before a wait.

    Raises:
      TrainingError: another run holds the lock; names its host and process.
    """

    def __init__(
        self, folder: BucketPath, notice: Callable[[str], object] = lambda line: None
    ) -> None:
        self._folder, self._place, self._notice = folder, folder / LOCK, notice
        self._own = holder_here() | {"token": uuid.uuid4().hex}
        self._generation = ABSENT
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> "BucketLock":
        while not self._placed():
            if (read := read_object(self._place)) is None:
                continue  # it was released in the meantime
            holder, generation = _parsed(read[0]), read[1]
            if self._is_own(holder):  # the answer to our own request was lost
                self._generation = generation
                break
            if not self._is_stale(holder, generation):
                raise TrainingError(
                    f"another run, {name_of_holder(holder)}, is writing to the folder "
                    f"{self._folder}: let it end, or choose another folder"
                )
            delete_object(self._place, generation)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._thread.join(_BEAT)
        with contextlib.suppress(BucketError):
            delete_object(self._place, self._generation)

    def _placed(self) -> bool:
        try:
            self._generation = write_object(self._place, self._content(), ABSENT)
        except ObjectChanged:
            return False
        return True

    def _content(self) -> bytes:
        return json.dumps(self._own).encode()

    def _is_stale(self, holder: dict[str, Any], generation: int) -> bool:
        """Returns True if the holder is gone; may wait to see whether it writes the lock again."""
        gone = is_gone(holder)
        if gone is not None:
            return gone
        self._notice(
            f"{name_of_holder(holder)} holds {self._place}: waiting up to {_STALE:.0f} s to see "
            "whether it still runs"
        )
        until = time.monotonic() + _STALE
        while time.monotonic() < until:
            time.sleep(_LOOK)
            read = read_object(self._place)
            if read is None:
                return True
            if read[1] != generation:
                return False
        return True

    def _beat(self) -> None:
        while not self._released.wait(_BEAT):
            with contextlib.suppress(BucketError):
                self._touch()

    def _touch(self) -> None:
        try:
            self._generation = write_object(self._place, self._content(), self._generation)
        except ObjectChanged:  # perhaps by ourselves, and the answer was lost
            read = read_object(self._place)
            if read is not None and self._is_own(_parsed(read[0])):
                self._generation = read[1]

    def _is_own(self, holder: dict[str, Any]) -> bool:
        return bool(holder.get("token") == self._own["token"])


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}
