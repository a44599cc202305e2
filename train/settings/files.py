"""Reads and writes files of options: the file of --config, and config.yaml in a run's folder."""

import dataclasses
from collections.abc import Collection
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
    """Returns the options with the values of a file, and the line of each option in the file.

    Args:
      path: the file.
      config: the options to begin with.

    Raises:
      UserError: the file cannot be read, or has a key or a value that no option takes.
    """
    option = f"--config {path}"
    text = _read_text(Path(path).expanduser(), option)
    return parse_options_file(text, option, config)


def read_yaml(file: Path, option: str) -> yaml.Node | None:
    """Returns the root of a YAML file; None for an empty one.

    Args:
      file: the file.
      option: the option that names it, for messages.

    Raises:
      UserError: the file cannot be read, or is not YAML; names the line.
    """
    return parse_yaml(_read_text(file, option), option)


def _read_text(file: Path, option: str) -> str:
    """Returns the text of a file; raises a UserError that names its option."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{option} cannot be read: {error.strerror or error}. Check the path and its "
            "permissions."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{option} is not UTF-8 text ({error}). Save the file in UTF-8.") from error


def effective_options(options: Options) -> dict[str, Any]:
    """Returns the options that describe a run, as one flat JSON object.

    It lacks options that have no effect together with the others, and options without a value.
    """
    # --resume and --overwrite are not part of the run itself.
    run = dataclasses.replace(options.run, resume=False, overwrite=False)
    idle = idle_options(dataclasses.replace(options, run=run), dataset_facts(options))
    traits = traits_of(options)
    effective = {}
    for name, value in as_json(options).items():
        is_of_run = name in traits and traits[name].of == "run"
        if is_of_run and name not in idle and value is not None:
            effective[name] = value
    return effective


def options_of_processes(options: Options) -> dict[str, Any]:
    """Returns the options that all processes of a run share, as one flat JSON object."""
    traits = traits_of(options)
    values = as_json(options)
    return {name: value for name, value in values.items() if traits[name].of != "process"}


def options_file(options: Options, script: str) -> str:
    """Returns the effective options as a YAML file that repeats the run."""
    heading = (
        "The options of this run, with defaults. Paths are as the user wrote them. To repeat it:\n"
        f"  {program(script)} --config FILE --output FOLDER"
    )
    return as_yaml(options, effective_options(options), heading)


def read_options_file(path: Path, plain: Options) -> dict[str, Any]:
    """Returns the effective options that `options_file` wrote.

    Args:
      path: the file.
      plain: the script's default options.

    Raises:
      UserError: the file cannot be read, or is damaged.
    """
    options, lines = read_options(str(path), plain)
    return {name: value for name, value in as_json(options).items() if name in lines}


def check_same_run(options: Options, saved: dict[str, Any], folder: Path | str) -> None:
    """Raises a UserError if the options of a resumed run differ from its saved options.

    An option that the run's file lacks had its default, because the run may be older than it.
    """
    current = effective_options(options)
    traits = traits_of(options)
    saved = _saved_defaults(options, current) | saved
    idle = idle_options(options, dataset_facts(options))
    differences = []
    for name in {**saved, **current}:
        if traits[name].changeable or saved.get(name) == current.get(name):
            continue
        if name in current:
            state = f"is now {_format_value(current[name])}"
        else:
            state = _describe_absence(idle.get(name))
        differences.append(f"{flag(name)} was {_format_value(saved.get(name))} and {state}")
    if differences:
        remedy = "Pass the same options, or start a new run in another --output."
        if "init_adapter" in traits and not saved.get("full"):
            remedy += f" A new run goes on from this adapter with --init-adapter {folder}."
        raise UserError(
            f"--resume: the run in {folder} began with other options: {'; '.join(differences)}. "
            f"{remedy}"
        )


def _saved_defaults(options: Options, names: Collection[str]) -> dict[str, Any]:
    """Returns the values that options had in a run whose file lacks them."""
    plain: Any = type(options)
    defaults = as_json(plain())
    for name, traits in traits_of(options).items():
        if traits.older is not None:
            defaults[name] = traits.older
    return {name: value for name, value in defaults.items() if name in names}


def _describe_absence(reason: str | None) -> str:
    """Returns the words of a message for an option without a value or without an effect."""
    return "is now None" if reason is None else f"has no effect now: {reason}"


def _format_value(value: Any) -> str:
    """Returns an option's value as text for messages."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value)
