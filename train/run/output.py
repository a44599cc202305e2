"""The output folder of a run: checks and locks it, writes its first files, and clears it."""

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
from lora_jax.training.arguments import CHECKPOINTS, START, delete_run_files
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

FACTS = "facts.json"  # facts that follow from the options: steps, sizes, versions
PROCESS_SECONDS = "process_seconds"  # the fact: start time of a process -> seconds of work
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
_FILES_AFTER_STEPS = (ADAPTER, CHECKPOINTS, RECORD, REPORT)  # they exist only after a step
# The files that tell the state of a folder in a bucket.
_STATE_FILES = (CONFIG, METRICS, RECORD, REPORT)


class OutputFolder(NamedTuple):
    """The locked folder that a run writes to.

    Attributes:
      path: the folder; for a folder in a bucket, the working copy of this process.
      send: sends changed files to the bucket.
      clear: deletes files of the bucket that are not in the working copy: the checkpoints.
    """

    path: Path
    send: Callable[[], None] = lambda: None
    clear: Callable[[], None] = lambda: None


def locked_output(config: Options, stack: ExitStack, console: Console) -> OutputFolder:
    """Checks and locks the output folder, and returns it; see `check_output`.

    Args:
      config: the options.
      stack: releases the lock at the end. Only the first of several processes has the lock.
      console: console to print that the run waits.

    Raises:
      UserError: as `check_output` does.
      TrainingError: another run writes to the folder.
    """
    bucket = bucket_path(config.run.output)
    if bucket is not None:
        with as_user_errors(BucketError, prefix="--output "):
            return _locked_in_bucket(config, bucket, stack, console)
    folder = Path(config.run.output).expanduser()
    # New folders are removed again if the run is refused later.
    if not folder.is_dir():
        new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
        stack.callback(remove_empty, new_folders)
        check_output(config)
    if is_first():
        try:
            lock = RunLock(FolderLock(folder), notice=lambda line: console.print(line))
            stack.enter_context(lock)
        except OSError as error:
            raise _write_error(folder, error) from error
    return OutputFolder(check_output(config))


def _locked_in_bucket(
    config: Options, bucket: BucketPath, stack: ExitStack, console: Console
) -> OutputFolder:
    """Locks a folder in a bucket, and returns its working copy."""

    def lock_bucket(_: int) -> None:
        lock = RunLock(BucketLock(bucket), notice=lambda line: console.print(line))
        with as_user_errors(BucketError, prefix="--output "):
            stack.enter_context(lock)

    # The first process locks the folder before any process reads it.
    map_over_processes(lock_bucket, [0])
    mirror = FolderMirror(bucket, _has_own_upload)

    def close() -> None:
        """Uploads or deletes the working copy; prints an error of the bucket."""
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
    """Returns True for files with their own upload to a bucket: lock, checkpoints and record."""
    return name in (LOCK, RECORD) or name.startswith(f"{CHECKPOINTS}/")


def remove_empty(folders: Sequence[Path]) -> None:
    """Removes empty folders, the innermost first."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def check_output(config: Options, copy: Path | None = None) -> Path:
    """Checks and creates the output folder without changing its files, and returns it.

    Args:
      config: the options.
      copy: the working copy of a folder in a bucket.

    Raises:
      UserError: the folder cannot be written; it contains another run (without --resume or
        --overwrite); or, with --resume, it contains no run, or a run with other options.
    """
    folder = copy or Path(config.run.output).expanduser()
    if config.run.resume:
        saved = _saved_options(config, folder)
        check_same_run(config, saved, replace_copy_paths(folder))
    elif _holds_run(folder) and not config.run.overwrite:
        raise UserError(
            f"The output folder {replace_copy_paths(folder)} already contains a run. Continue it "
            "with --resume, delete it with --overwrite, or pass another folder with --output."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _write_error(folder, error) from error
    return folder


def state_of(output: str) -> str:
    """Returns a sentence about the state of an output folder, without changing the folder."""
    with as_user_errors(BucketError, prefix="--output "):
        folder = folder_with_files(output, _STATE_FILES)
    if not folder.exists():
        return "this output folder does not exist yet"
    if not _holds_run(folder):
        return "this output folder contains no run yet"
    return (
        "this output folder already contains a run; --resume continues it, and --overwrite deletes "
        "it"
    )


def _holds_run(folder: Path) -> bool:
    """Returns True if a folder contains files of a run that has taken a step."""
    has_files = any((folder / name).exists() for name in _RUN_FILES)
    return has_files and not _is_untrained(folder)


def _is_untrained(folder: Path) -> bool:
    """Returns True if a run ended here before its first step, so that it may be deleted."""
    has_files_after_steps = any((folder / name).exists() for name in _FILES_AFTER_STEPS)
    if has_files_after_steps or read_metrics(folder):
        return False
    return (folder / CONFIG).exists()


def _write_error(folder: Path, error: OSError) -> UserError:
    """Returns the error for a folder that cannot be written."""
    return UserError(
        f"The output folder {folder} cannot be written: {error.strerror or error}. Pass another "
        "folder with --output."
    )


def saved_options(config: Options) -> dict[str, Any]:
    """Returns the saved options of a resumed run; {} for a new run."""
    if not config.run.resume:
        return {}
    return _saved_options(config, folder_with_files(config.run.output, _STATE_FILES))


def resumed_option(config: Options, name: str) -> str | None:
    """Returns a saved option of a resumed run; None for a new run."""
    has_run = (folder_with_files(config.run.output, _STATE_FILES) / CONFIG).exists()
    return saved_options(config).get(name) if has_run else None


def _saved_options(config: Options, folder: Path) -> dict[str, Any]:
    """Returns the saved options of the run in a folder.

    Raises:
      UserError: there is no run, or its options cannot be read.
    """
    path = folder / CONFIG
    if not path.exists():
        output = config.run.output if bucket_path(config.run.output) else folder
        raise UserError(
            f"--resume: there is no run in {output} ({CONFIG} is missing). Start a run without "
            "--resume, or check --output."
        )
    problem = f"--resume: {replace_copy_paths(path)} is damaged, or belongs to another script ("
    remedy = "). Correct the file, or start again with --overwrite."
    with as_user_errors(UserError, prefix=problem, suffix=remedy):
        return read_options_file(path, config)


def begin(folder: OutputFolder | Path, config: Options, script: str, facts: dict[str, Any]) -> None:
    """Writes a run's options and facts, after deleting an earlier run unless --resume is given.

    The facts of a resumed run keep the times of earlier processes.
    """
    output = OutputFolder(folder) if isinstance(folder, Path) else folder
    folder = output.path
    if not config.run.resume:
        output.clear()
        delete_run_files(folder, _RUN_FILES)
    seconds = read_json(folder / FACTS).get(PROCESS_SECONDS, {})
    write_json(folder / FACTS, {**facts, PROCESS_SECONDS: seconds})
    write_text(folder / CONFIG, options_file(config, script))
    output.send()


def clear_copy(folder: Path, config: Options) -> None:
    """Deletes an earlier run in the working copy of any process except the first."""
    if is_copy(folder) and not config.run.resume:
        delete_run_files(folder, _RUN_FILES)


def folder_bytes(folder: Path) -> int:
    """Returns the size of all files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
