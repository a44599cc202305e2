"""A local working copy of a folder in a bucket, whose changes are uploaded at intervals.

An object cannot be appended to. So a run writes its files to a folder of this machine, and `send`
brings the bucket up to date. An adapter's folder appears in the bucket whole or not at all, and so
does each other file.

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
    COPY_PREFIX,
    UNFINISHED_MARK,
    fetch_objects,
    files_in,
    list_finished_objects,
    path_of_copy,
    run_parallel,
    upload_folder,
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

_ADAPTER_FILE = "lora/metadata"  # what an adapter's folder holds; see `lora_jax.saving`
_MAX_TRIES = 5


class FolderMirror:
    """A local working copy of a folder in a bucket.

    Attributes:
      address: the folder in the bucket.
      folder: the working copy.
    """

    def __init__(self, address: BucketPath, is_apart: Callable[[str], bool]) -> None:
        """Makes a working copy of the folder's current content.

        Args:
          address: the folder in the bucket.
          is_apart: returns True for the names of files that are written to the bucket by others.
        """
        self.address = address
        self._is_apart = is_apart
        self._root = make_working_folder(COPY_PREFIX)
        self.folder = path_of_copy(self._root, address)
        self._lock = threading.Lock()
        self._sent_states: dict[str, tuple[int, int]] = {}
        self._fetch()

    def _fetch(self) -> None:
        """Downloads the folder's content into the working copy."""
        for _ in range(_MAX_TRIES):
            objects = list_finished_objects(self.address)
            names_apart = [name for name in objects if self._is_apart(name)]
            fetched = {name: facts for name, facts in objects.items() if name not in names_apart}
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            with contextlib.suppress(ObjectChanged):
                fetch_objects(self.address, fetched, self.folder)
                for name in names_apart:  # empty files, so that a run sees their names
                    (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (self.folder / name).touch()
                self._sent_states = self._file_states()
                return
        raise BucketError(
            f"{self.address} cannot be read, because another process keeps writing to it. Try "
            "again once that process has ended."
        )

    def send(self) -> None:
        """Uploads changed files, and deletes objects whose files were deleted."""
        with self._lock:
            states = self._file_states()
            changed = {n for n, state in states.items() if self._sent_states.get(n) != state}
            deleted = self._sent_states.keys() - states.keys()
            # A folder that holds an adapter is sent as a whole if one of its files has changed.
            known_files = {*states, *self._sent_states}
            adapters = {_adapter_folder_of(name, known_files) for name in changed | deleted} - {""}
            for adapter in sorted(adapters):
                self._send_adapter(adapter)
            # All other files are sent, or deleted, one by one.
            adapter_prefixes = tuple(f"{adapter}/" for adapter in adapters)
            single_files = [name for name in changed if not name.startswith(adapter_prefixes)]
            run_parallel(self._send_file, single_files)
            deleted_files = [name for name in deleted if not name.startswith(adapter_prefixes)]
            run_parallel(lambda name: delete_object(self.address / name), deleted_files)
            self._sent_states = states

    def clear_apart(self, lock: str) -> None:
        """Deletes the files that bypass this mirror; see `is_apart`.

        Args:
          lock: The name of the lock, which stays.
        """
        names_apart = [name for name in list_objects(self.address) if self._is_apart(name)]
        deleted_names = [name for name in names_apart if name != lock]
        run_parallel(lambda name: delete_object(self.address / name), deleted_names)

    def close(self) -> None:
        """Uploads changed files, and deletes the working copy.

        Raises:
          BucketError: the files could not be sent; names the folder that keeps them.
        """
        try:
            self.send()
        except BucketError as error:
            rescue_folder = Path(tempfile.mkdtemp(prefix="lora_jax_not_sent_")) / self.folder.name
            self.folder.rename(rescue_folder)
            raise BucketError(
                f"{error} The files that were not sent are in {rescue_folder}. Copy them to "
                f"{self.address}."
            ) from error
        self.drop()

    def drop(self) -> None:
        """Deletes the working copy without uploading."""
        drop_working_folder(self._root)

    def _file_states(self) -> dict[str, tuple[int, int]]:
        """Returns the state of each file that the mirror uploads."""
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
        """Uploads an adapter's folder, or deletes it in the bucket if deleted locally."""
        folder = self.folder / name
        address = self.address / name
        if (folder / _ADAPTER_FILE).is_file():
            with contextlib.suppress(FileNotFoundError):  # a run deletes it: its mark stays
                upload_folder(folder, address)
            return
        # While the mark exists, no reader takes the remaining objects for an adapter.
        write_object(address / UNFINISHED_MARK, b"")
        deleted_names = sorted(set(list_objects(address)) - {UNFINISHED_MARK})
        run_parallel(lambda file: delete_object(address / file), deleted_names)
        delete_object(address / UNFINISHED_MARK)


def _adapter_folder_of(name: str, files: set[str]) -> str:
    """Returns the adapter folder that contains a file; "" if none does."""
    parts = name.split("/")
    for depth in range(1, len(parts)):
        folder = "/".join(parts[:depth])
        if f"{folder}/{_ADAPTER_FILE}" in files:
            return folder
    return ""
