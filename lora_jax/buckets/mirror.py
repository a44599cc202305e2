"""A working copy of a folder in a bucket, which is sent there as a whole, again and again.

Objects cannot be appended to. So a run writes its files to a folder of this machine, which lies in
the bucket as it was when it was last sent: a folder that holds an adapter appears whole or not at
all, and so does each other file.

The *state* of a file is the time of its last change and its size. The files that other writers send
to the bucket lie *apart*: the working copy has only their names.
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
      address: the folder in the bucket.
      folder: the working copy.
    """

    def __init__(self, address: BucketPath, is_apart: Callable[[str], bool]) -> None:
        """Makes a working copy of what is there.

        Args:
          address: the folder in the bucket.
          is_apart: returns True for the names of files that are written to the bucket by others.
        """
        self.address = address
        self._is_apart = is_apart
        self._root = make_working_folder(PREFIX)
        self.folder = copy_in(self._root, address)
        self._lock = threading.Lock()
        self._sent_states: dict[str, tuple[int, int]] = {}
        self._fetch()

    def _fetch(self) -> None:
        """Makes the working copy of what is in the bucket."""
        for _ in range(_TRIES):
            objects = whole_objects(self.address)
            names_apart = [name for name in objects if self._is_apart(name)]
            fetched = {name: facts for name, facts in objects.items() if name not in names_apart}
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            with contextlib.suppress(ObjectChanged):
                fetch_objects(self.address, fetched, self.folder)
                for name in names_apart:  # so that they are seen to be there
                    (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (self.folder / name).touch()
                self._sent_states = self._file_states()
                return
        raise BucketError(f"{self.address}: somebody writes to it again and again while it is read")

    def send(self) -> None:
        """Sends changed files, and deletes those that are gone."""
        with self._lock:
            states = self._file_states()
            changed = {n for n, state in states.items() if self._sent_states.get(n) != state}
            deleted = self._sent_states.keys() - states.keys()
            known_files = {*states, *self._sent_states}
            adapters = {_adapter_of(name, known_files) for name in changed | deleted} - {""}
            for adapter in sorted(adapters):
                self._send_adapter(adapter)
            adapter_prefixes = tuple(f"{adapter}/" for adapter in adapters)
            single_files = [name for name in changed if not name.startswith(adapter_prefixes)]
            run_parallel(self._send_file, single_files)
            deleted_files = [name for name in deleted if not name.startswith(adapter_prefixes)]
            run_parallel(lambda name: delete_object(self.address / name), deleted_files)
            self._sent_states = states

    def clear_apart(self, lock: str) -> None:
        """Deletes the files that others write to the bucket; see `is_apart`.

        Args:
          lock: The name of the lock, which stays.
        """
        names_apart = [name for name in list_objects(self.address) if self._is_apart(name)]
        deleted_names = [name for name in names_apart if name != lock]
        run_parallel(lambda name: delete_object(self.address / name), deleted_names)

    def close(self) -> None:
        """Sends changed files, and deletes the working copy.

        Raises:
          BucketError: the bucket did not take it; names the folder that keeps what was not sent.
        """
        try:
            self.send()
        except BucketError as error:
            rescue_folder = Path(tempfile.mkdtemp(prefix="lora_jax_not_sent_")) / self.folder.name
            self.folder.rename(rescue_folder)
            raise BucketError(f"{error}. What was not sent is in {rescue_folder}") from error
        self.drop()

    def drop(self) -> None:
        """Deletes the working copy."""
        drop_working_folder(self._root)

    def _file_states(self) -> dict[str, tuple[int, int]]:
        """Returns the state of each file but temporary ones, and those that lie apart."""
        states = {}
        for name in files_in(self.folder):
            is_temporary = any(part.startswith(".") for part in name.split("/"))
            if is_temporary or self._is_apart(name):
                continue
            with contextlib.suppress(FileNotFoundError):  # a run deletes files meanwhile
                status = (self.folder / name).stat()
                states[name] = (status.st_mtime_ns, status.st_size)
        return states

    def _send_file(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            write_object(self.address / name, (self.folder / name).read_bytes())

    def _send_adapter(self, name: str) -> None:
        """Sends an adapter's folder, or deletes it from the bucket if it is gone."""
        folder = self.folder / name
        address = self.address / name
        if (folder / _ADAPTER).is_file():
            with contextlib.suppress(FileNotFoundError):  # its mark stays: it is none any more
                publish(folder, address)
            return
        write_object(address / MARK, b"")
        deleted_names = sorted(set(list_objects(address)) - {MARK})
        run_parallel(lambda file: delete_object(address / file), deleted_names)
        delete_object(address / MARK)


def _adapter_of(name: str, files: set[str]) -> str:
    """Returns the folder of the adapter that a file belongs to; "" for none."""
    parts = name.split("/")
    for depth in range(1, len(parts)):
        folder = "/".join(parts[:depth])
        if f"{folder}/{_ADAPTER}" in files:
            return folder
    return ""
