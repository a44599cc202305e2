"""Checkpoint files in a bucket, which Orbax writes in the background.

`save` copies the state to the host and returns; a thread writes it. A store has no renames: Orbax
puts a mark into each folder that is whole (commit_success.txt), and the record beside the
checkpoints, one object, is replaced after that. All processes write their parts of one folder; they
wait for one another by JAX's coordinator, never by a collective, which would get between those of
the steps.
"""

import json
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lora_jax.buckets.copies import run_parallel
from lora_jax.buckets.store import (
    BucketError,
    BucketPath,
    delete_object,
    list_objects,
    read_object,
    write_object,
)
from lora_jax.training.processes import is_first
from lora_jax.training.run.disk_files import Digests

_MAX_TRIES = 3  # of Orbax, whose own layers do not try again after each error that passes


class BucketFiles:
    """Checkpoint files in a folder of a bucket.

    What lies there is listed once: this run alone writes to its folder.
    """

    def __init__(self, folder: BucketPath, record: str, before_record: Callable[[], None]) -> None:
        """Opens a bucket's folder of checkpoints, which is listed at the first use.

        Args:
          folder: their folder.
          record: the name of the record beside it.
          before_record: sends what goes with a checkpoint, before it counts.
        """
        self._folder = folder
        parent_name, _, _ = folder.name.rpartition("/")
        self._record_path = BucketPath(folder.bucket, parent_name) / record
        self._before_record = before_record
        self._steps: set[int] | None = None
        self._record_text: str | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_writing(self) -> bool:
        """True while a checkpoint is being uploaded."""
        return self._thread is not None and self._thread.is_alive()

    def steps(self) -> set[int]:
        """Returns the steps of all checkpoints, complete or not."""
        if self._steps is None:
            names = {name.partition("/")[0] for name in list_objects(self._folder)}
            self._steps = {int(name) for name in names if name.isdecimal()}
        return set(self._steps)

    def save(
        self,
        step: int,
        args: Any,
        kept: list[int],
        begun: Callable[[], None],
        written: Callable[[], None],
    ) -> None:
        """Starts to write a checkpoint; see `CheckpointFiles.save`."""
        state_copy = jax.tree.map(_copy_to_host, args["state"].item)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state_copy), run=args["run"])

        def write() -> None:
            """Writes the checkpoint, in a thread."""
            try:
                begun()
                self._write(step, items)
                self._steps = {*self.steps(), step}
                if is_first():
                    self._before_record()
                    written()
                else:  # as the first process will have written it
                    self._steps = set(kept)
                    self._record_text = json.dumps({str(kept_step): {} for kept_step in kept})
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, step: int, items: Any) -> None:
        """Writes a checkpoint, with retries in a run of one process."""
        last_try = 1 if jax.process_count() > 1 else _MAX_TRIES
        for attempt in range(1, last_try + 1):
            try:
                with checkpoint_writer() as writer:
                    writer.save(self._url(step), items)
                    return
            except Exception:
                if attempt == last_try:
                    raise
                self.delete(step)

    def restore(self, step: int, args: Any) -> Any:
        """Returns the items that Orbax restores from a checkpoint.

        Its layers take some errors that pass for a file that is missing, so it reads again.
        """
        for attempt in range(1, _MAX_TRIES + 1):
            try:
                with checkpoint_writer() as writer:
                    return writer.restore(self._url(step), args)
            except Exception:
                if attempt == _MAX_TRIES:
                    raise

    def delete(self, step: int) -> None:
        """Deletes a checkpoint, in the first process."""
        if is_first():
            folder = self._folder / str(step)
            run_parallel(lambda name: delete_object(folder / name), list_objects(folder))
        self._steps = self.steps() - {step}

    def digests(self, step: int) -> Digests:
        """Returns the store's checksum of each object of a checkpoint."""
        objects = list_objects(self._folder / str(step))
        return {name: f"crc32c:{facts.crc32c}" for name, facts in sorted(objects.items())}

    def read_record(self) -> str:
        """Returns the record's text; raises FileNotFoundError if there is none."""
        if self._record_text is None:
            record_object = read_object(self._record_path)
            if record_object is None:
                raise FileNotFoundError(str(self._record_path))
            content, _ = record_object
            self._record_text = content.decode()
        return self._record_text

    def write_record(self, text: str) -> None:
        """Writes the record, in the first process."""
        if is_first():
            write_object(self._record_path, text.encode())
        self._record_text = text

    def free_bytes(self) -> int | None:
        """Returns None, because a bucket has no size limit."""
        return None

    def wait(self) -> None:
        """Waits until the checkpoint is written; raises errors of the writing thread."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error = self._error
        self._error = None
        if error is None:
            return
        if isinstance(error, OSError):
            raise error
        error_text = str(error).strip() or repr(error)
        reason = error_text.splitlines()[0][:300]
        raise BucketError(
            f"a checkpoint could not be written to {self._folder} ({reason}). Earlier checkpoints "
            "are still there. Run the same command again with --resume."
        ) from error

    def agree(self, what: str) -> None:
        """Returns immediately, because only the first process calls `written`."""

    def close(self) -> None:
        """Waits until the checkpoint is written."""
        self.wait()

    def _url(self, step: int) -> str:
        return str(self._folder / str(step))


def checkpoint_writer() -> ocp.Checkpointer:
    """Returns an Orbax checkpointer for all processes together."""
    n_processes = jax.process_count()
    processes = ocp.options.MultiprocessingOptions(
        active_processes=set(range(n_processes)) if n_processes > 1 else None
    )
    # As in `save_adapter`, which the training thread calls while this checkpoint is written.
    synchronous = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(
            multiprocessing_options=processes, async_options=synchronous
        ),
        state=ocp.StandardCheckpointHandler(multiprocessing_options=processes),
        run=ocp.JsonCheckpointHandler(multiprocessing_options=processes),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=processes)


def _copy_to_host(leaf: Any) -> Any:
    """Returns a host copy of an array, which the next step cannot donate.

    Of an array over several processes, each copies its own part.
    """
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.array(leaf)
    memory_kinds = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
    if "pinned_host" in memory_kinds and jax.default_backend() != "cpu":
        return jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host"))
    shard_copies = [
        jax.device_put(np.array(shard.data), shard.device) for shard in leaf.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shard_copies)
