"""Checkpoints of a run: adapter, optimiser, rng, step and data cursor, never the base.

Orbax writes each to a folder beside its place and renames it there, so that a checkpoint is there
whole or not at all. The checksums of its arrays are in it, and those of its files beside it, so
that a damaged one is found and named.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lora_jax.fingerprint import checksum
from lora_jax.paths import flatten_with_paths
from train.errors import UserError
from train.hosts import is_first
from train.output import CHECKPOINT_FILES, read_json, write_json
from train.step import State

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every file on "absl"


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was saved."""


class Checkpoints:
    """The checkpoints in one folder, the newest `keep` of them, each named by its step."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder.absolute()
        self._sums = self.folder.with_name(CHECKPOINT_FILES)
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=self._keep, create=True, enable_async_checkpointing=False
                ),
            )
        return self._manager

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, in order."""
        return sorted(self._open().all_steps()) if self.folder.is_dir() else []

    def save(self, state: State, run: Mapping[str, Any]) -> None:
        """Saves the state, with `run` (JSON: the data cursor, what the data and base were)."""
        step = int(state.step)
        if step in self.steps():
            return
        arrays = _as_arrays(state)
        facts = {**run, "checksums": _checksums(arrays)}
        self._open().save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(arrays), run=ocp.args.JsonSave(facts)
            ),
            force=True,
        )
        if is_first():
            there = {str(at) for at in self.steps()}
            kept = {at: files for at, files in read_json(self._sums).items() if at in there}
            write_json(self._sums, kept | {str(step): _files(self.folder / str(step))})

    def restore(self, like: State) -> tuple[State, dict[str, Any]]:
        """The newest checkpoint, and the `run` that it was saved with.

        Raises DamagedCheckpoint that names the folder and the newest one that is whole.
        """
        *earlier, newest = self.steps()
        try:
            return self._read(newest, like)
        except DamagedCheckpoint as error:
            message = f"the checkpoint {self.folder / str(newest)} is damaged ({error}). "
        for step in reversed(earlier):
            try:
                self._read(step, like)
            except DamagedCheckpoint:
                continue
            raise DamagedCheckpoint(
                f"{message}The one before it, of step {step}, is whole: delete the folder "
                f"{self.folder / str(newest)} and --resume again to go on from there"
            )
        raise DamagedCheckpoint(
            f"{message}No earlier one is whole: begin again with --overwrite in place of --resume"
        )

    def _read(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        files = read_json(self._sums).get(str(step), {})  # a kill may have come before they were
        found = _files(self.folder / str(step)) if files else {}
        if wrong := [name for name, digest in files.items() if found.get(name) != digest]:
            how = "is not what was saved" if wrong[0] in found else "is missing"
            raise DamagedCheckpoint(f"its file {wrong[0]} {how}")
        arrays = _as_arrays(like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
        try:
            restored = self._open().restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), run=ocp.args.JsonRestore()
                ),
            )
            state, run = restored["state"], restored["run"]
            saved = run.pop("checksums")
        except Exception as error:  # whatever the storage layers raise for a damaged file
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise DamagedCheckpoint(reason[:200]) from error
        if wrong := [path for path, digest in _checksums(state).items() if saved[path] != digest]:
            raise DamagedCheckpoint(f"{wrong[0]} is not what was saved")
        return State(**{**state, "key": jax.random.wrap_key_data(state["key"])}), run

    def close(self) -> None:
        """Releases the folder."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None


def _files(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digests[str(path.relative_to(folder))] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    return digests


def _as_arrays(state: State) -> dict[str, Any]:
    return {**state._asdict(), "key": jax.random.key_data(state.key)}


def _checksums(arrays: dict[str, Any]) -> dict[str, str]:
    leaves, _ = flatten_with_paths(arrays)
    return {path: checksum(array) for path, array in leaves}
