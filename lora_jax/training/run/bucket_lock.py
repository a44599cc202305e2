"""The lock of a run's folder in a bucket: an object that is created only if it does not exist.

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
        """Creates the lock; returns False if there is one already."""
        return self._write(ABSENT)

    def read(self) -> HeldLock | None:
        """Returns the existing lock, or None."""
        lock_object = read_object(self._path)
        if lock_object is None:
            return None
        content, generation = lock_object
        return HeldLock(holder=parse_holder(content), version=generation)

    def touch(self) -> None:
        """Updates the lock, to show that this process still runs."""
        with contextlib.suppress(BucketError):
            self._write(self._generation)

    def remove(self, lock: HeldLock | None = None) -> None:
        """Removes the given lock, by default this process's, but no other run's lock."""
        if lock is not None:
            delete_object(self._path, lock.version)
            return
        with contextlib.suppress(BucketError):
            delete_object(self._path, self._generation)

    def _write(self, generation: int) -> bool:
        """Writes the lock if it has this generation; returns True on success."""
        content = json.dumps(self._holder).encode()
        try:
            self._generation = write_object(self._path, content, generation)
        except ObjectChanged:
            lock = self.read()
            if lock is None or lock.holder.get("token") != self._holder["token"]:
                return False
            self._generation = lock.version  # the answer to an own request was lost
        return True
