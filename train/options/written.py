"""The options of a run as its folder keeps them: those that have an effect, defaults among them."""

import dataclasses
from pathlib import Path
from typing import Any

from train.console.errors import UserError, flag
from train.options.common import Options, as_json
from train.options.file import as_yaml, read_options
from train.options.ignored import idle_options

# Options of one call of the script, or of one of its processes.
_OF_A_CALL = ("config", "many", "resume", "overwrite", "distributed", "dry_run")
_OF_A_PROCESS = ("coordinator", "num_processes", "process_id")
# Options that a resumed run may change: its length, devices, reports, and checkpoints. Any other
# change would make it another run.
_CHANGEABLE = frozenset(
    {"steps", "epochs", "output", "log_every", "save_every", "keep", "eval_every", "eval_rows"}
    | {"eval_questions", "max_skipped", "mesh", "compilation_cache", "token_cache"}
    | {"eval_dataset", "eval_split", "allow_base_mismatch", "score_every", "patience"}
    | {"report_to", "report_project", "sample_prompts", "sample_every", "sample_tokens"}
)


def effective(options: Options) -> dict[str, Any]:
    """Returns the options that say what a run is, as one flat JSON object.

    Those that have no effect beside the others are left out, and so are those without a value.
    """
    as_begun = dataclasses.replace(options.run, resume=False, overwrite=False)
    idle = idle_options(dataclasses.replace(options, run=as_begun))
    return {
        name: value
        for name, value in as_json(options).items()
        if value is not None and name not in idle and name not in (*_OF_A_CALL, *_OF_A_PROCESS)
    }


def as_file(options: Options, script: str) -> str:
    """Returns the effective options as a YAML file that repeats the run."""
    heading = (
        "The options of this run, with defaults. Paths are as they were given. To repeat it:\n"
        f"  python -m {script} --config FILE --output FOLDER"
    )
    return as_yaml(options, effective(options), heading)


def from_file(path: Path, plain: Options) -> dict[str, Any]:
    """Returns the effective options that `as_file` wrote.

    Args:
      path: the file.
      plain: the options of the script; those that the file leaves out are not looked at.

    Raises:
      UserError: the file cannot be read, or is damaged.
    """
    kept, given = read_options(str(path), plain)
    return {name: value for name, value in as_json(kept).items() if name in given}


def check_same_run(options: Options, saved: dict[str, Any], folder: Path) -> None:
    """Raises a UserError if a resumed run's options differ from those it began with."""
    now = effective(options)
    differing = [
        f"{flag(name)} was {_option(saved.get(name))} and is now {_option(now.get(name))}"
        for name in {**saved, **now}
        if name not in _CHANGEABLE and saved.get(name) != now.get(name)
    ]
    if differing:
        raise UserError(
            f"--resume: the run in {folder} began with other options: {'; '.join(differing)}. "
            "Give the same options, or start another run in another --output"
        )


def _option(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
