"""The options of a run as its folder keeps them: those that have an effect, defaults among them."""

import dataclasses
from pathlib import Path
from typing import Any

from train.console.errors import UserError, flag
from train.options.common import Options, as_json
from train.options.field import traits_of
from train.options.file import as_yaml, read_options
from train.options.ignored import idle_options


def effective(options: Options) -> dict[str, Any]:
    """Returns the options that say what a run is, as one flat JSON object.

    Those that have no effect beside the others are left out, and so are those without a value.
    """
    as_begun = dataclasses.replace(options.run, resume=False, overwrite=False)
    idle = idle_options(dataclasses.replace(options, run=as_begun))
    of_run = {name for name, traits in traits_of(options).items() if traits.of == "run"} - idle
    given = as_json(options).items()
    return {name: value for name, value in given if value is not None and name in of_run}


def alike(options: Options) -> dict[str, Any]:
    """Returns the options that all processes of a run share, as one flat JSON object."""
    traits = traits_of(options)
    return {k: value for k, value in as_json(options).items() if traits[k].of != "process"}


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
    """Raises a UserError if a resumed run's options differ from those it began with.

    An option that a run's file lacks had its default: the run may be older than the option.
    """
    now, traits = effective(options), traits_of(options)
    plain: Any = type(options)
    saved = {**{k: v for k, v in as_json(plain()).items() if k in now}, **saved}
    differing = [
        f"{flag(name)} was {_option(saved.get(name))} and is now {_option(now.get(name))}"
        for name in {**saved, **now}
        if not traits[name].changeable and saved.get(name) != now.get(name)
    ]
    if differing:
        raise UserError(
            f"--resume: the run in {folder} began with other options: {'; '.join(differing)}. "
            "Give the same options, or start another run in another --output"
        )


def _option(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
