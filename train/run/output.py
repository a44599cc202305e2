"""The output folder of a run: its files, the check before a run, and its clearing."""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from lora_jax.buckets.copies import folder_with_files, is_copy, replace_copy_paths
from lora_jax.buckets.mirror import FolderMirror
from lora_jax.buckets.store import BucketError, BucketPath, bucket_path
from lora_jax.training.arguments import CHECKPOINTS, START, clear
from lora_jax.training.processes import is_first, write_json, write_text
from lora_jax.training.run.best import BEST
from lora_jax.training.run.bucket_lock import BucketLock
from lora_jax.training.run.checkpoints import RECORD
from lora_jax.training.run.lock import LOCK, FolderLock, RunLock
from train.adapters.source import ADAPTER
from train.console.errors import UserError, as_user_errors
from train.options.common import Options
from train.processes.hosts import map_over_processes
from train.reporters.files import ERROR, LEDGER, LOG, METRICS, SAMPLES, read_json
from train.reporters.registry import TRACKERS
from train.run.log import CURVE, PROGRESS, read_metrics
from train.settings.files import CONFIG, check_same_run, options_file, read_options_file

FACTS = "facts.json"  # what came of them: steps, sizes, versions
PROCESS_SECONDS = "process_seconds"  # the fact: when a process began -> how long it worked
SCORES = "scores.json"
CONFUSION = "confusion.png"
REPORT = "report.json"
SAMPLER = "sampler"  # the adapters that a server of --sampler reads
_RESULTS = (CONFIG, FACTS, SCORES, REPORT, ADAPTER, BEST, METRICS, SAMPLES, CURVE, PROGRESS)
_REPORTS = (
    CONFUSION,
    SAMPLER,
    LEDGER,
    LOG,
    ERROR,
    *(tracker.files for tracker in TRACKERS.values() if tracker.files),
)
_RUN_FILES = (*_RESULTS, *_REPORTS, START, CHECKPOINTS, RECORD)
_FILES_OF_STEPS = (ADAPTER, CHECKPOINTS, RECORD, REPORT)  # what a run leaves once a step is done
_STATE_FILES = (
    CONFIG,
    METRICS,
    RECORD,
    REPORT,
)  # by which the state of a folder in a bucket is known


class OutputFolder(NamedTuple):
    """The folder that a run writes to, locked.

    Attributes:
      path: the folder; of one in a bucket, the working copy of this process.
      send: sends what has changed to the bucket.
      clear: deletes what is not in the working copy: the checkpoints.
    """

    path: Path
    send: Callable[[], None] = lambda: None
    clear: Callable[[], None] = lambda: None


def locked_output(config: Options, stack: ExitStack, console: Console) -> OutputFolder:
    """Returns the output folder, checked, and with its lock; see `check_output`.

    Args:
      config: the options.
      stack: releases the lock in the end. Of many processes, the first one has it.
      console: to say that the run waits.

    Raises:
      UserError: as `check_output` does.
      TrainingError: another run writes to the folder.
    """
    bucket = bucket_path(config.run.output)
    if bucket is not None:
        with as_user_errors(BucketError, prefix="--output "):
            return _locked_in_bucket(config, bucket, stack, console)
    folder = Path(config.run.output).expanduser()
    if not folder.is_dir():
        new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
        stack.callback(remove_empty, new_folders)  # where the run is refused later on
        check_output(config)
    if is_first():
        try:
            lock = RunLock(FolderLock(folder), notice=lambda line: console.print(line))
            stack.enter_context(lock)
        except OSError as error:
            raise _cannot_be_written(folder, error) from error
    return OutputFolder(check_output(config))


def _locked_in_bucket(
    config: Options, bucket: BucketPath, stack: ExitStack, console: Console
) -> OutputFolder:
    """Returns the working copy of a folder in a bucket, with the bucket's lock."""

    def lock(_: int) -> None:
        lock = RunLock(BucketLock(bucket), notice=lambda line: console.print(line))
        with as_user_errors(BucketError, prefix="--output "):
            stack.enter_context(lock)

    map_over_processes(lock, [0])  # the first process has it before any reads what is there
    mirror = FolderMirror(bucket, _has_own_upload)

    def close() -> None:
        try:
            if is_first():
                mirror.close()
            else:
                mirror.drop()
        except BucketError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)

    def send() -> None:
        if is_first():
            mirror.send()

    stack.callback(close)
    folder = check_output(config, mirror.folder)
    return OutputFolder(folder, send, lambda: mirror.clear_apart(LOCK))


def _has_own_upload(name: str) -> bool:
    """Returns True for what goes to a bucket by itself: lock, checkpoints, and their record."""
    return name in (LOCK, RECORD) or name.startswith(f"{CHECKPOINTS}/")


def remove_empty(folders: Sequence[Path]) -> None:
    """Removes folders with nothing in them, the innermost first."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def check_output(config: Options, copy: Path | None = None) -> Path:
    """Returns the output folder, after checking it; creates it, but changes nothing in it.

    Args:
      config: the options.
      copy: the working copy of a folder in a bucket.

    Raises:
      UserError: the folder cannot be written; it holds another run (without --resume or
        --overwrite); with --resume, it holds no run, or a run with other options.
    """
    folder = copy or Path(config.run.output).expanduser()
    if config.run.resume:
        saved = _saved_options(config, folder)
        check_same_run(config, saved, replace_copy_paths(folder))
    elif _holds_run(folder) and not config.run.overwrite:
        raise UserError(
            f"the output folder {replace_copy_paths(folder)} holds another run: continue it with "
            "--resume, delete it with --overwrite, or name another folder with --output"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _cannot_be_written(folder, error) from error
    return folder


def state_of(output: str) -> str:
    """Returns the state of an output folder, in words; changes nothing."""
    with as_user_errors(BucketError, prefix="--output "):
        folder = folder_with_files(output, _STATE_FILES)
    if not folder.exists():
        return "this output folder is not there yet"
    if not _holds_run(folder):
        return "this output folder holds no run yet"
    return "this output folder holds another run: --resume goes on with it, --overwrite deletes it"


def _holds_run(folder: Path) -> bool:
    """Returns True if a folder has a file of a run that has taken a step."""
    has_files = any((folder / name).exists() for name in _RUN_FILES)
    return has_files and not _is_untrained(folder)


def _is_untrained(folder: Path) -> bool:
    """Returns True if a run was stopped here before its first step: nothing of it need be kept."""
    has_files_of_steps = any((folder / name).exists() for name in _FILES_OF_STEPS)
    if has_files_of_steps or read_metrics(folder):
        return False
    return (folder / CONFIG).exists()


def _cannot_be_written(folder: Path, error: OSError) -> UserError:
    """Returns the error of a folder that cannot be written."""
    return UserError(
        f"the output folder {folder} cannot be written: {error.strerror or error}. Name another "
        "with --output"
    )


def saved_options(config: Options) -> dict[str, Any]:
    """Returns the options that a resumed run began with; {} for a run that begins."""
    if not config.run.resume:
        return {}
    return _saved_options(config, folder_with_files(config.run.output, _STATE_FILES))


def resumed_option(config: Options, name: str) -> str | None:
    """Returns an option of the run that is resumed; None for a run that begins."""
    has_run = (folder_with_files(config.run.output, _STATE_FILES) / CONFIG).exists()
    return saved_options(config).get(name) if has_run else None


def _saved_options(config: Options, folder: Path) -> dict[str, Any]:
    """Returns the options of the run in a folder.

    Raises:
      UserError: there is no run, or its options cannot be read.
    """
    path = folder / CONFIG
    if not path.exists():
        output = config.run.output if bucket_path(config.run.output) else folder
        raise UserError(
            f"--resume: there is no run in {output} ({CONFIG} is missing); start one without "
            "--resume"
        )
    problem = f"--resume: {replace_copy_paths(path)} is damaged, or of another script ("
    remedy = "); put it right, or begin again with --overwrite"
    with as_user_errors(UserError, prefix=problem, suffix=remedy):
        return read_options_file(path, config)


def begin(folder: OutputFolder | Path, config: Options, script: str, facts: dict[str, Any]) -> None:
    """Writes options and facts; without --resume, deletes what an earlier run left first.

    The times of earlier processes of a resumed run stay among the facts.
    """
    output = OutputFolder(folder) if isinstance(folder, Path) else folder
    folder = output.path
    if not config.run.resume:
        output.clear()
        clear(folder, _RUN_FILES)
    seconds = read_json(folder / FACTS).get(PROCESS_SECONDS, {})
    write_json(folder / FACTS, {**facts, PROCESS_SECONDS: seconds})
    write_text(folder / CONFIG, options_file(config, script))
    output.send()


def clear_copy(folder: Path, config: Options) -> None:
    """Deletes an earlier run in the working copy of a process that is not the first one."""
    if is_copy(folder) and not config.run.resume:
        clear(folder, _RUN_FILES)


def folder_bytes(folder: Path) -> int:
    """Returns the size of all files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
