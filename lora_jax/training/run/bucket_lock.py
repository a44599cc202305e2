"""The lock of a run's folder in a bucket: an object that is created only where there is none.

The store itself compares generations (ifGenerationMatch), so that of two runs one has it. Its
holder writes it again every few seconds.
"""

import contextlib
import json
import uuid

from lora_jax.buckets.store import (
    ABSENT,
    BucketError,
    BucketPath,
    ObjectChanged,
    delete_object,
    read_object,
    write_object,
)
from lora_jax.training.run.lock import LOCK, HeldLock, describe_this_process, parse_holder


class BucketLock:
    """The lock of a folder in a bucket; see `LockFile`. Its version is the object's generation."""

    def __init__(self, folder: BucketPath) -> None:
        self.folder = folder
        self._path = folder / LOCK
        self._holder = describe_this_process() | {"token": uuid.uuid4().hex}
        self._generation = ABSENT

    def place(self) -> bool:
        """Places the lock, with its content at once; returns False where there is one."""
        return self._write(ABSENT)

    def read(self) -> HeldLock | None:
        """Returns the lock that is there; None where there is no lock."""
        lock_object = read_object(self._path)
        if lock_object is None:
            return None
        content, generation = lock_object
        return HeldLock(holder=parse_holder(content), version=generation)

    def touch(self) -> None:
        """Shows that this process still runs."""
        with contextlib.suppress(BucketError):
            self._write(self._generation)

    def remove(self, lock: HeldLock | None = None) -> None:
        """Removes a lock that was read, by default this process's; leaves that of any other run."""
        if lock is not None:
            delete_object(self._path, lock.version)
            return
        with contextlib.suppress(BucketError):
            delete_object(self._path, self._generation)

    def _write(self, generation: int) -> bool:
        """Writes the lock if it has this generation; returns True if it is this process's."""
        content = json.dumps(self._holder).encode()
        try:
            self._generation = write_object(self._path, content, generation)
        except ObjectChanged:
            lock = self.read()
            if lock is None or lock.holder.get("token") != self._holder["token"]:
                return False
            self._generation = lock.version  # the answer to an own request was lost
        return True
