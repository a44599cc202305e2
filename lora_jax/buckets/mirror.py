"""A working copy of a folder in a bucket, which is sent there as a whole, again and again.

Objects cannot be appended to. So a run writes its files to a folder of this machine, which lies in
the bucket as it was when it was last sent: a folder that holds an adapter appears whole or not at
all, and so does each other file.
"""

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from lora_jax.buckets.copies import (
    MARK,
    PREFIX,
    copy_in,
    fetch_objects,
    files_in,
    publish,
    run_parallel,
    whole_objects,
)
from lora_jax.buckets.kept import drop_working_folder, make_working_folder
from lora_jax.buckets.store import (
    BucketError,
    BucketPath,
    ObjectChanged,
    delete_object,
    list_objects,
    write_object,
)

_ADAPTER = "lora/metadata"  # what an adapter's folder holds; see `lora_jax.saving`
_TRIES = 5


class FolderMirror:
    """A working copy.

    Attributes:
      place: the folder in the bucket.
      folder: the working copy.
    """

    def __init__(self, place: BucketPath, is_apart: Callable[[str], bool]) -> None:
        """Makes a working copy of what is there.

        Args:
          place: the folder in the bucket.
          is_apart: returns True for the names of files that are written to the bucket by others.
        """
        self.place, self._is_apart = place, is_apart
        self._root = make_working_folder(PREFIX)
        self.folder = copy_in(self._root, place)
        self._lock = threading.Lock()
        self._sent: dict[str, tuple[int, int]] = {}
        self._fetch()

    def _fetch(self) -> None:
        for _ in range(_TRIES):
            there = whole_objects(self.place)
            objects = {n: facts for n, facts in there.items() if not self._is_apart(n)}
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            with contextlib.suppress(ObjectChanged):
                fetch_objects(self.place, objects, self.folder)
                for name in there.keys() - objects:  # so that they are seen to be there
                    (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (self.folder / name).touch()
                self._sent = self._states()
                return
        raise BucketError(f"{self.place}: somebody writes to it again and again while it is read")

    def send(self) -> None:
        """Sends changed files, and deletes those that are gone."""
        with self._lock:
            states = self._states()
            changed = {name for name, state in states.items() if self._sent.get(name) != state}
            gone = self._sent.keys() - states.keys()
            folders = {_adapter_of(name, {*states, *self._sent}) for name in changed | gone} - {""}
            for folder in sorted(folders):
                self._send_adapter(folder)
            loose = [n for n in changed if not n.startswith(tuple(f"{f}/" for f in folders))]
            run_parallel(self._send_file, loose)
            dropped = [n for n in gone if not n.startswith(tuple(f"{f}/" for f in folders))]
            run_parallel(lambda name: delete_object(self.place / name), dropped)
            self._sent = states

    def clear_apart(self, lock: str) -> None:
        """Deletes the files that others write to the bucket; see `is_apart`.

        Args:
          lock: The name of the lock, which stays.
        """
        names = [n for n in list_objects(self.place) if self._is_apart(n) and n != lock]
        run_parallel(lambda name: delete_object(self.place / name), names)

    def close(self) -> None:
        """Sends changed files, and deletes the working copy.

        Raises:
          BucketError: the bucket did not take it; names the folder that keeps what was not sent.
        """
        try:
            self.send()
        except BucketError as error:
            kept = Path(tempfile.mkdtemp(prefix="lora_jax_not_sent_")) / self.folder.name
            self.folder.rename(kept)
            raise BucketError(f"{error}. What was not sent is in {kept}") from error
        self.drop()

    def drop(self) -> None:
        """Deletes the working copy."""
        drop_working_folder(self._root)

    def _states(self) -> dict[str, tuple[int, int]]:
        """Returns the time of the last change and the size of each file but temporary ones."""
        states = {}
        for name in files_in(self.folder):
            if self._is_apart(name) or any(part.startswith(".") for part in name.split("/")):
                continue
            with contextlib.suppress(FileNotFoundError):  # a run deletes files meanwhile
                facts = (self.folder / name).stat()
                states[name] = (facts.st_mtime_ns, facts.st_size)
        return states

    def _send_file(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            write_object(self.place / name, (self.folder / name).read_bytes())

    def _send_adapter(self, name: str) -> None:
        folder, place = self.folder / name, self.place / name
        if (folder / _ADAPTER).is_file():
            with contextlib.suppress(FileNotFoundError):  # its mark stays: it is none any more
                publish(folder, place)
            return
        write_object(place / MARK, b"")
        objects = sorted({*list_objects(place)} - {MARK})
        run_parallel(lambda file: delete_object(place / file), objects)
        delete_object(place / MARK)


def _adapter_of(name: str, files: set[str]) -> str:
    """Returns the folder of the adapter that a file belongs to; "" for none."""
    parts = name.split("/")
    folders = ("/".join(parts[:n]) for n in range(1, len(parts)))
    return next((folder for folder in folders if f"{folder}/{_ADAPTER}" in files), "")
