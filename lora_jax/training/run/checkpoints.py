"""Checkpoints of a run: adapter, optimiser, rng, step and data cursor, never the base.

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

from lora_jax.buckets.copies import origin, shown
from lora_jax.buckets.store import BucketError
from lora_jax.core.types import Fields
from lora_jax.folders import local_path
from lora_jax.training.errors import DamagedCheckpoint, Written
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
    """The checkpoints in one folder, the newest `keep` of them, each named by its step."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        *,
        before_record: Callable[[], None] = lambda: None,
        notice: Callable[[str], object] = lambda line: None,
    ) -> None:
        """Keeps checkpoints in a folder.

        Args:
          folder: the folder; in the copy of a folder in a bucket, they are written to the bucket.
          keep: the number of checkpoints to keep.
          before_record: is called before a checkpoint in a bucket counts: sends what goes with it.
          notice: is called with a line before a wait for a bucket.
        """
        self.folder = local_path(folder).absolute()
        self._record = self.folder.with_name(RECORD)
        self._keep, self._notice = keep, notice
        place = origin(self.folder)
        self._files: CheckpointFiles = (
            DiskFiles(self.folder, self._record)
            if place is None
            else BucketFiles(place, RECORD, before_record)
        )

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, in order.

        Raises:
          DamagedCheckpoint: there are checkpoints, and the record of their files is lost.
        """
        there = self._files.steps()
        if not there and not self.folder.is_dir():
            return []
        recorded = self._recorded()
        return sorted(step for step in there if str(step) in recorded)

    def save(self, state: State, run: Fields) -> None:
        """Saves the state; all processes have to call this.

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
        before = self.steps()
        if step in before:
            return
        kept = [*before, step][-self._keep :]

        def begun() -> None:
            if is_first() and not self._is_recorded():
                self._write_record({})  # from here on, one that is missing was lost
            self._remove_all_but(before)
            if (free := self._files.free_bytes()) is not None:
                _check_room(self.folder.parent, free, state)

        def written() -> None:
            self._record_files(step, kept)
            self._remove_all_but(kept)

        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_arrays_of_state(state)), run=ocp.args.JsonSave(dict(run))
        )
        self._files.save(step, args, kept, begun, written)

    def settle(self) -> None:
        """Waits until what was saved is written, and says so; raises what went wrong."""
        if self._files.is_writing:
            self._notice(f"waiting until the checkpoint is in {shown(self.folder)}")
        self._files.wait()

    def run_of_newest(self) -> dict[str, Any] | None:
        """Returns the `run` of the newest checkpoint; None if it is damaged, which `restore` says.

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
        """Returns the state of the newest checkpoint, and the `run` that it was saved with.

        Args:
          like: a state with the shapes, dtypes and shardings to restore.

        Raises:
          DamagedCheckpoint: it is damaged; names its folder and the newest one that is whole.
        """
        *earlier, newest = self.steps()
        folder = shown(self.folder / str(newest))
        try:
            return self._read(newest, like)
        except DamagedCheckpoint as error:
            message = f"the checkpoint {folder} is damaged ({error}). "
        whole = next((step for step in reversed(earlier) if self._is_whole(step, like)), None)
        if whole is None:
            raise DamagedCheckpoint(
                lambda option: f"{message}No earlier one is whole: {_begin_again(option)}"
            )
        raise DamagedCheckpoint(
            lambda option: (
                f"{message}The one before it, of step {whole}, is whole: delete the folder "
                f"{folder} and {option('resume', True)} again to go on from there"
            )
        )

    def _is_whole(self, step: int, like: State) -> bool:
        try:
            self._read(step, like)
        except DamagedCheckpoint:
            return False
        return True

    def _read(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        self._check_files(step)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays_of_state(like))
        try:
            restored = self._files.restore(
                step,
                ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), run=ocp.args.JsonRestore()
                ),
            )
            state, run = restored["state"], restored["run"]
        except Exception as error:  # whatever the storage layers raise for a damaged file
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise DamagedCheckpoint(reason[:200]) from error
        return State(**{**state, "key": jax.random.wrap_key_data(state["key"])}), run

    def _check_files(self, step: int) -> None:
        """Raises a DamagedCheckpoint if a file is not the one that was saved."""
        recorded, digests = self._recorded()[str(step)], self._files.digests(step)
        if wrong := [name for name, digest in recorded.items() if digests.get(name) != digest]:
            how = "is not what was saved" if wrong[0] in digests else "is missing"
            raise DamagedCheckpoint(f"its file {wrong[0]} {how}")

    def _recorded(self) -> dict[str, Digests]:
        """Returns the digests of each complete checkpoint, by step."""
        try:
            recorded: dict[str, Digests] = json.loads(self._files.read_record())
            return recorded
        except BucketError:
            raise
        except (OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError) and not self._files.steps():
                return {}
            raise DamagedCheckpoint(
                lambda option: (
                    f"{shown(self._record)} is missing or cannot be read, and it alone tells which "
                    f"of the checkpoints in {shown(self.folder)} are whole: put it back, or "
                    f"{_begin_again(option)}"
                )
            ) from error

    def _is_recorded(self) -> bool:
        try:
            self._files.read_record()
        except FileNotFoundError:
            return False
        return True

    def _write_record(self, digests: dict[str, Digests]) -> None:
        self._files.write_record(json.dumps(digests, indent=2, ensure_ascii=False) + "\n")

    def _record_files(self, step: int, kept: list[int]) -> None:
        """Records a checkpoint's digests beside those of the others that are kept."""
        if is_first():
            digests = {**self._recorded(), str(step): self._files.digests(step)}
            self._write_record({str(number): digests[str(number)] for number in kept})
        self._files.agree("the checkpoint's files are recorded")

    def _remove_all_but(self, kept: list[int]) -> None:
        """Removes checkpoints that are too old, or that a kill left incomplete."""
        for step in sorted(self._files.steps() - set(kept)):
            self._files.delete(step)

    def close(self) -> None:
        """Releases the folder, once what was saved is written."""
        self.settle()
        self._files.close()


def _check_room(folder: Path, free: int, state: State) -> None:
    """Raises an OSError, shorter than Orbax's, if this process's part of a state does not fit.

    A limit on the size of files applies to a file of Orbax's, which holds 2 GiB at most.
    """
    arrays = jax.tree.leaves(_arrays_of_state(state))
    shards = [shard for array in arrays for shard in getattr(array, "addressable_shards", ())]
    needed = sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)
    if free < needed:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for {needed} bytes", str(folder))
    limit = -1 if sys.platform == "win32" else resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if 0 <= limit < min(needed, _ORBAX_FILE):
        raise OSError(errno.EFBIG, f"{os.strerror(errno.EFBIG)}, for {needed} bytes", str(folder))


def _begin_again(option: Written) -> str:
    return f"begin again with {option('overwrite', True)} in place of {option('resume', True)}"


def _arrays_of_state(state: State) -> dict[str, Any]:
    return {**state._asdict(), "key": jax.random.key_data(state.key)}
