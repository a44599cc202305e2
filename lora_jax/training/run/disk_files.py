"""Checkpoint files on a disk, which Orbax writes under a temporary name and renames."""

import functools
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import orbax.checkpoint as ocp

from lora_jax.training.processes import wait_for_all, write_text

Digests = dict[str, str]  # a file's path in the checkpoint's folder -> a checksum of it


class CheckpointFiles(Protocol):
    """The interface of checkpoint storage, with the record of complete checkpoints."""

    @property
    def is_writing(self) -> bool:
        """True while a checkpoint is being written."""

    def steps(self) -> set[int]:
        """Returns the steps of all checkpoints, complete or not."""

    def save(
        self,
        step: int,
        args: Any,
        kept: list[int],
        begun: Callable[[], None],
        written: Callable[[], None],
    ) -> None:
        """Writes a checkpoint; all processes must call this.

        Args:
          step: its step.
          args: what Orbax is to write.
          kept: the steps that the record will have.
          begun: is called before, in every process: at once, or in a thread.
          written: is called once it is written: in every process at once, or in a thread of the
            first one, later.
        """

    def restore(self, step: int, args: Any) -> Any:
        """Returns the items that Orbax restores from a checkpoint."""

    def delete(self, step: int) -> None:
        """Deletes a checkpoint."""

    def digests(self, step: int) -> Digests:
        """Returns the checksums of a checkpoint's files."""

    def read_record(self) -> str:
        """Returns the record's text; raises FileNotFoundError if there is none."""

    def write_record(self, text: str) -> None:
        """Writes the record, in the first process."""

    def free_bytes(self) -> int | None:
        """Returns the free space for more files; None without a limit."""

    def wait(self) -> None:
        """Waits until the checkpoint is written; raises errors of the writing."""

    def agree(self, what: str) -> None:
        """Waits for all processes, if each of them calls `written`."""

    def close(self) -> None:
        """Waits, and releases resources."""


class DiskFiles:
    """Checkpoint files in a local or mounted folder."""

    is_writing = False

    def __init__(self, folder: Path, record: Path) -> None:
        self._folder, self._record = folder, record

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None, create=True, enable_async_checkpointing=False
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def steps(self) -> set[int]:
        """Returns the steps of all checkpoints, complete or not."""
        return {*self._manager.all_steps()} if self._folder.is_dir() else set()

    def save(
        self,
        step: int,
        args: Any,
        kept: list[int],
        begun: Callable[[], None],
        written: Callable[[], None],
    ) -> None:
        """Writes a checkpoint; see `CheckpointFiles.save`."""
        begun()
        self._manager.save(step, args=args, force=True)
        written()

    def restore(self, step: int, args: Any) -> Any:
        """Returns the items that Orbax restores from a checkpoint."""
        return self._manager.restore(step, args=args)

    def delete(self, step: int) -> None:
        """Deletes a checkpoint."""
        self._manager.delete(step)

    def digests(self, step: int) -> Digests:
        """Returns the SHA-256 of each file of a checkpoint."""
        digests, folder = {}, self._folder / str(step)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                digests[str(path.relative_to(folder))] = digest
        return digests

    def read_record(self) -> str:
        """Returns the record's text; raises FileNotFoundError if there is none."""
        return self._record.read_text()

    def write_record(self, text: str) -> None:
        """Writes the record, in the first process."""
        write_text(self._record, text)

    def free_bytes(self) -> int | None:
        """Returns the free space on the disk."""
        return shutil.disk_usage(self._folder.parent).free

    def wait(self) -> None:
        """Returns immediately, because checkpoints are written synchronously."""

    def agree(self, what: str) -> None:
        """Waits for all processes."""
        wait_for_all(what)

    def close(self) -> None:
        """Releases the folder."""
        if "_manager" in vars(self):
            self._manager.close()
            del self._manager
