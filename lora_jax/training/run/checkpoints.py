"""Checkpoints of a run: adapter, optimiser, rng, step and data cursor, never the base.

Orbax writes each to a temporary folder beside it and renames that. Then the SHA-256 of its files is
recorded in one file beside the checkpoints, so that a damaged one is found and named. A checkpoint
is complete only with that record: a kill before it leaves one that does not count, and that the
next save removes. Older ones are removed afterwards, so that there is a complete one at any time.
"""

import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lora_jax.core.types import Fields
from lora_jax.folders import local_path
from lora_jax.training.errors import DamagedCheckpoint, Written
from lora_jax.training.processes import is_first, wait_for_all, write_json
from lora_jax.training.step import State

if sys.platform != "win32":
    import resource

# Orbax logs every file to "absl", and the traceback of each error that it raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)

_ORBAX_FILE = 2**31  # bytes
RECORD = "checkpoints.json"  # the checksums of their files, beside their folder
Digests = dict[str, str]  # a file's path in the checkpoint's folder -> its SHA-256


class Checkpoints:
    """The checkpoints in one folder, the newest `keep` of them, each named by its step."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = local_path(folder).absolute()
        self._record = self.folder.with_name(RECORD)
        self._keep = keep

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None, create=True, enable_async_checkpointing=False
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, in order.

        Raises:
          DamagedCheckpoint: there are checkpoints, and the record of their files is lost.
        """
        if not self.folder.is_dir():
            return []
        recorded = self._recorded()
        return sorted(step for step in self._manager.all_steps() if str(step) in recorded)

    def save(self, state: State, run: Fields) -> None:
        """Saves the state; all processes have to call this.

        Does nothing where there is a complete checkpoint of the step.

        Args:
          state: what to save; its step names the checkpoint.
          run: facts to keep with it, as JSON: the data cursor, fingerprints of data and base.

        Raises:
          DamagedCheckpoint: there are checkpoints, and the record of their files is lost.
          OSError: there is no room for it.
        """
        step = int(state.step)
        before = self.steps()
        if step in before:
            return
        if is_first() and not self._record.exists():
            write_json(self._record, {})  # from here on, one that is missing was lost
        self._remove_all_but(before)
        _check_room(self.folder.parent, state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_arrays_of_state(state)),
                run=ocp.args.JsonSave(dict(run)),
            ),
            force=True,
        )
        kept = [*before, step][-self._keep :]
        self._record_files(step, kept)
        self._remove_all_but(kept)

    def run_of_newest(self) -> dict[str, Any] | None:
        """Returns the `run` of the newest checkpoint; None if it is damaged, which `restore` says.

        It can be read whatever the shapes of the state.
        """
        newest = self.steps()[-1]
        try:
            self._check_files(newest)
            args = ocp.args.Composite(run=ocp.args.JsonRestore())
            run: dict[str, Any] = self._manager.restore(newest, args=args)["run"]
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
        folder = self.folder / str(newest)
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
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
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
        recorded, digests = self._recorded()[str(step)], _digests(self.folder / str(step))
        if wrong := [name for name, digest in recorded.items() if digests.get(name) != digest]:
            how = "is not what was saved" if wrong[0] in digests else "is missing"
            raise DamagedCheckpoint(f"its file {wrong[0]} {how}")

    def _recorded(self) -> dict[str, Digests]:
        """Returns the digests of each complete checkpoint, by step."""
        try:
            recorded: dict[str, Digests] = json.loads(self._record.read_text())
            return recorded
        except (OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError) and not self._manager.all_steps():
                return {}
            raise DamagedCheckpoint(
                lambda option: (
                    f"{self._record} is missing or cannot be read, and it alone tells which of "
                    f"the checkpoints in {self.folder} are whole: put it back, or "
                    f"{_begin_again(option)}"
                )
            ) from error

    def _record_files(self, step: int, kept: list[int]) -> None:
        """Records a checkpoint's digests beside those of the others that are kept."""
        if is_first():
            digests = {**self._recorded(), str(step): _digests(self.folder / str(step))}
            write_json(self._record, {str(number): digests[str(number)] for number in kept})
        wait_for_all("the checkpoint's files are recorded")

    def _remove_all_but(self, kept: list[int]) -> None:
        """Removes checkpoints that are too old, or that a kill left incomplete."""
        for step in sorted(set(self._manager.all_steps()) - set(kept)):
            self._manager.delete(step)

    def close(self) -> None:
        """Releases the folder."""
        if "_manager" in vars(self):
            self._manager.close()
            del self._manager


def _check_room(folder: Path, state: State) -> None:
    """Raises an OSError, shorter than Orbax's, if this process's part of a state does not fit.

    A limit on the size of files applies to a file of Orbax's, which holds 2 GiB at most.
    """
    arrays = jax.tree.leaves(_arrays_of_state(state))
    shards = [shard for array in arrays for shard in getattr(array, "addressable_shards", ())]
    needed = sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for {needed} bytes", str(folder))
    limit = -1 if sys.platform == "win32" else resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if 0 <= limit < min(needed, _ORBAX_FILE):
        raise OSError(errno.EFBIG, f"{os.strerror(errno.EFBIG)}, for {needed} bytes", str(folder))


def _begin_again(option: Written) -> str:
    return f"begin again with {option('overwrite', True)} in place of {option('resume', True)}"


def _digests(folder: Path) -> Digests:
    """Returns the SHA-256 of each file in a folder."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digests[str(path.relative_to(folder))] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    return digests


def _arrays_of_state(state: State) -> dict[str, Any]:
    return {**state._asdict(), "key": jax.random.key_data(state.key)}
