"""The files of options: the one that --config names, and config.yaml in the folder of a run."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import yaml

from train.console.errors import UserError, flag
from train.console.program import program
from train.options.common import Options, as_json
from train.options.field import idle_options, traits_of
from train.options.file import as_yaml, parse_options_file, parse_yaml
from train.settings.tasks import dataset_facts

Config = TypeVar("Config", bound=Options)

CONFIG = "config.yaml"  # the file of a run's options, in its folder


def read_options(path: str, config: Config) -> tuple[Config, dict[str, int]]:
    """Returns the options, changed as a file says, and the line of each option in the file.

    Args:
      path: the file.
      config: the options to begin with.

    Raises:
      UserError: the file cannot be read, or has a key or a value that no option takes.
    """
    asked = f"--config {path}"
    return parse_options_file(_read_text(Path(path).expanduser(), asked), asked, config)


def read_yaml(file: Path, asked: str) -> yaml.Node | None:
    """Returns the root of a YAML file; None for an empty one.

    Args:
      file: the file.
      asked: the option that names it, for messages.

    Raises:
      UserError: the file cannot be read, or is not YAML; names the line.
    """
    return parse_yaml(_read_text(file, asked), asked)


def _read_text(file: Path, asked: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{asked}: the file cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{asked}: the file is not UTF-8 text ({error})") from error


def effective_options(options: Options) -> dict[str, Any]:
    """Returns the options that say what a run is, as one flat JSON object.

    Those that have no effect beside the others are left out, and so are those without a value.
    """
    as_begun = dataclasses.replace(options.run, resume=False, overwrite=False)
    idle = idle_options(dataclasses.replace(options, run=as_begun), dataset_facts(options))
    told = {k for k, traits in traits_of(options).items() if traits.of == "run"} - idle.keys()
    return {k: value for k, value in as_json(options).items() if value is not None and k in told}


def options_of_processes(options: Options) -> dict[str, Any]:
    """Returns the options that all processes of a run share, as one flat JSON object."""
    traits = traits_of(options)
    return {k: value for k, value in as_json(options).items() if traits[k].of != "process"}


def options_file(options: Options, script: str) -> str:
    """Returns the effective options as a YAML file that repeats the run."""
    heading = (
        "The options of this run, with defaults. Paths are as they were given. To repeat it:\n"
        f"  {program(script)} --config FILE --output FOLDER"
    )
    return as_yaml(options, effective_options(options), heading)


def read_options_file(path: Path, plain: Options) -> dict[str, Any]:
    """Returns the effective options that `options_file` wrote.

    Args:
      path: the file.
      plain: the options of the script; those that the file leaves out are not looked at.

    Raises:
      UserError: the file cannot be read, or is damaged.
    """
    kept, given = read_options(str(path), plain)
    return {name: value for name, value in as_json(kept).items() if name in given}


def check_same_run(options: Options, saved: dict[str, Any], folder: Path | str) -> None:
    """Raises a UserError if a resumed run's options differ from those it began with.

    An option that a run's file lacks had its default: the run may be older than the option.
    """
    now, traits = effective_options(options), traits_of(options)
    plain: Any = type(options)
    lacking = as_json(plain()) | {k: x.older for k, x in traits.items() if x.older is not None}
    saved = {**{k: v for k, v in lacking.items() if k in now}, **saved}
    idle = idle_options(options, dataset_facts(options))
    differing = [
        f"{flag(name)} was {_option(saved.get(name))} and "
        + (f"is now {_option(now[name])}" if name in now else _absence(idle.get(name)))
        for name in {**saved, **now}
        if not traits[name].changeable and saved.get(name) != now.get(name)
    ]
    if differing:
        raise UserError(
            f"--resume: the run in {folder} began with other options: {'; '.join(differing)}. "
            "Give the same options, or start another run in another --output"
        )


def _absence(why: str | None) -> str:
    return "is now None" if why is None else f"has no effect now: {why}"


def _option(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
