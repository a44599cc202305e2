"""Checkpoints of a run: adapter, optimiser, rng, step and data cursor, without the base.

Once Orbax has written one, the checksums of its files are recorded in one file beside the
checkpoints, so that a damaged one is found and named. A checkpoint is complete only with that
record: a kill before it leaves one that does not count, and that the next save removes. Older ones
are removed afterwards, so that there is a complete one at any time. On a disk, all of that is done
once `save` returns; to a bucket, it is done beside the steps that follow.
"""

import errno
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lora_jax.buckets.copies import bucket_address_of, replace_copy_paths
from lora_jax.buckets.store import BucketError
from lora_jax.core.types import Fields
from lora_jax.folders import local_path
from lora_jax.training.errors import DamagedCheckpoint, OptionWriter
from lora_jax.training.processes import is_first
from lora_jax.training.run.bucket_files import BucketFiles
from lora_jax.training.run.disk_files import CheckpointFiles, Digests, DiskFiles
from lora_jax.training.step import State

if sys.platform != "win32":
    import resource

# Orbax logs every file to "absl", and the traceback of each error that it raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)

_ORBAX_FILE = 2**31  # bytes
RECORD = "checkpoints.json"  # the checksums of their files, beside their folder


class Checkpoints:
    """The newest `keep` checkpoints in one folder, each named by its step."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        *,
        before_record: Callable[[], None] = lambda: None,
        notice: Callable[[str], object] = lambda line: None,
    ) -> None:
        """Opens the checkpoints in a folder.

        Args:
          folder: the folder; in the copy of a folder in a bucket, they are written to the bucket.
          keep: the number of checkpoints to keep.
          before_record: is called before a checkpoint in a bucket counts: sends what goes with it.
          notice: is called with a line before a wait for a bucket.
        """
        self.folder = local_path(folder).absolute()
        self._record = self.folder.with_name(RECORD)
        self._keep = keep
        self._notice = notice
        self._files: CheckpointFiles
        bucket_folder = bucket_address_of(self.folder)
        if bucket_folder is None:
            self._files = DiskFiles(self.folder, self._record)
        else:
            self._files = BucketFiles(bucket_folder, RECORD, before_record)

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, in order.

        Raises:
          DamagedCheckpoint: there are checkpoints, and the record of their files is lost.
        """
        steps = self._files.steps()
        if not steps and not self.folder.is_dir():
            return []
        digests_of_steps = self._recorded()
        return sorted(step for step in steps if str(step) in digests_of_steps)

    def save(self, state: State, run: Fields) -> None:
        """Saves the state; all processes must call this.

        Does nothing where there is a complete checkpoint of the step.

        Args:
          state: what to save; its step names the checkpoint.
          run: facts to keep with it, as JSON: the data cursor, fingerprints of data and base.

        Raises:
          DamagedCheckpoint: there are checkpoints, and the record of their files is lost.
          OSError: there is no room for it, or a bucket did not take the one before.
        """
        self._files.wait()
        step = int(state.step)
        earlier_steps = self.steps()
        if step in earlier_steps:
            return
        kept_steps = [*earlier_steps, step][-self._keep :]

        def begun() -> None:
            """Prepares the folder for a new checkpoint."""
            if is_first() and not self._is_recorded():
                self._write_record({})  # from here on, one that is missing was lost
            self._remove_all_but(earlier_steps)
            free_bytes = self._files.free_bytes()
            if free_bytes is not None:
                _check_free_space(self.folder.parent, free_bytes, state)

        def written() -> None:
            self._record_files(step, kept_steps)
            self._remove_all_but(kept_steps)

        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_arrays_of_state(state)), run=ocp.args.JsonSave(dict(run))
        )
        self._files.save(step, args, kept_steps, begun, written)

    def settle(self) -> None:
        """Waits, with a notice, until the checkpoint is written; raises its errors."""
        if self._files.is_writing:
            self._notice(f"waiting until the checkpoint is in {replace_copy_paths(self.folder)}")
        self._files.wait()

    def run_of_newest(self) -> dict[str, Any] | None:
        """Returns the `run` of the newest checkpoint; None if it is damaged.

        It can be read whatever the shapes of the state.
        """
        newest = self.steps()[-1]
        try:
            self._check_files(newest)
            args = ocp.args.Composite(run=ocp.args.JsonRestore())
            run: dict[str, Any] = self._files.restore(newest, args)["run"]
            return run
        except Exception:
            return None

    def restore(self, like: State) -> tuple[State, dict[str, Any]]:
        """Returns the state of the newest checkpoint, and the `run` saved with it.

        Args:
          like: a state with the shapes, dtypes and shardings to restore.

        Raises:
          DamagedCheckpoint: it is damaged; names its folder and the newest one that is whole.
        """
        *earlier_steps, newest = self.steps()
        folder = replace_copy_paths(self.folder / str(newest))
        try:
            return self._read(newest, like)
        except DamagedCheckpoint as error:
            message = f"the checkpoint {folder} is damaged ({error}). "
        whole_step = self._newest_readable(earlier_steps, like)
        if whole_step is None:
            raise DamagedCheckpoint(
                lambda option: (
                    f"{message}No earlier checkpoint is whole. {_start_again_remedy(option)}"
                )
            )
        raise DamagedCheckpoint(
            lambda option: (
                f"{message}The checkpoint of step {whole_step} is whole. To continue from there, "
                f"delete the folder {folder} and use {option('resume', True)} again."
            )
        )

    def _newest_readable(self, steps: list[int], like: State) -> int | None:
        """Returns the newest step whose checkpoint can be read, or None."""
        for step in reversed(steps):
            try:
                self._read(step, like)
            except DamagedCheckpoint:
                continue
            return step
        return None

    def _read(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """Reads and checks the state and the `run` of one checkpoint."""
        self._check_files(step)
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays_of_state(like))
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(shapes), run=ocp.args.JsonRestore()
        )
        try:
            items = self._files.restore(step, args)
            arrays = items["state"]
            run = items["run"]
        except Exception as error:  # whatever the storage layers raise for a damaged file
            error_text = str(error).strip() or repr(error)
            reason = error_text.splitlines()[0]
            raise DamagedCheckpoint(reason[:200]) from error
        key = jax.random.wrap_key_data(arrays["key"])
        return State(**{**arrays, "key": key}), run

    def _check_files(self, step: int) -> None:
        """Raises a DamagedCheckpoint if a file differs from what was saved."""
        recorded_digests = self._recorded()[str(step)]
        digests = self._files.digests(step)
        for name, recorded_digest in recorded_digests.items():
            if name not in digests:
                raise DamagedCheckpoint(f"its file {name} is missing")
            if digests[name] != recorded_digest:
                raise DamagedCheckpoint(f"its file {name} has changed since it was saved")

    def _recorded(self) -> dict[str, Digests]:
        """Returns the recorded digests of each complete checkpoint, by step."""
        try:
            digests_of_steps: dict[str, Digests] = json.loads(self._files.read_record())
            return digests_of_steps
        except BucketError:
            raise
        except (OSError, ValueError) as error:
            has_no_checkpoints = isinstance(error, FileNotFoundError) and not self._files.steps()
            if has_no_checkpoints:
                return {}
            raise DamagedCheckpoint(
                lambda option: (
                    f"{replace_copy_paths(self._record)} is missing or cannot be read, and only "
                    f"this file tells which checkpoints in {replace_copy_paths(self.folder)} are "
                    f"whole. Put the file back. Otherwise: {_start_again_remedy(option)}"
                )
            ) from error

    def _is_recorded(self) -> bool:
        """Returns True if the record of complete checkpoints exists."""
        try:
            self._files.read_record()
        except FileNotFoundError:
            return False
        return True

    def _write_record(self, digests_of_steps: dict[str, Digests]) -> None:
        text = json.dumps(digests_of_steps, indent=2, ensure_ascii=False)
        self._files.write_record(text + "\n")

    def _record_files(self, step: int, kept_steps: list[int]) -> None:
        """Adds a checkpoint's digests to the record."""
        if is_first():
            digests_of_steps = self._recorded()
            digests_of_steps[str(step)] = self._files.digests(step)
            self._write_record({str(kept): digests_of_steps[str(kept)] for kept in kept_steps})
        self._files.agree("the checkpoint's files are recorded")

    def _remove_all_but(self, kept_steps: list[int]) -> None:
        """Deletes old and incomplete checkpoints."""
        for step in sorted(self._files.steps() - set(kept_steps)):
            self._files.delete(step)

    def close(self) -> None:
        """Releases the folder after the last checkpoint is written."""
        self.settle()
        self._files.close()


def _check_free_space(folder: Path, free_bytes: int, state: State) -> None:
    """Raises an OSError if this process's part of a state does not fit on the disk.

    A limit on the size of files applies to a file of Orbax's, which holds 2 GiB at most.
    """
    state_bytes = 0
    for array in jax.tree.leaves(_arrays_of_state(state)):
        for shard in getattr(array, "addressable_shards", ()):
            if shard.replica_id == 0:
                state_bytes += shard.data.nbytes
    if free_bytes < state_bytes:
        message = f"{os.strerror(errno.ENOSPC)} for {state_bytes} bytes"
        raise OSError(errno.ENOSPC, message, str(folder))
    file_limit = -1  # none
    if sys.platform != "win32":
        file_limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest_file_bytes = min(state_bytes, _ORBAX_FILE)
    if 0 <= file_limit < largest_file_bytes:
        message = f"{os.strerror(errno.EFBIG)}, for {state_bytes} bytes"
        raise OSError(errno.EFBIG, message, str(folder))


def _start_again_remedy(option: OptionWriter) -> str:
    return f"Start again with {option('overwrite', True)} in place of {option('resume', True)}."


def _arrays_of_state(state: State) -> dict[str, Any]:
    return {**state._asdict(), "key": jax.random.key_data(state.key)}
