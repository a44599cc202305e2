"""A command line, with the file that its `--config` names, as options."""

import argparse
from collections.abc import Collection, Sequence
from typing import TypeVar

import tyro

from train.console.help import asks_for_help, show_help
from train.console.program import program
from train.options.common import Options
from train.options.elsewhere import check_names
from train.options.field import excluded, given_options, traits_of
from train.options.file import replace_options, value_of
from train.options.paths import check_local, check_paths
from train.settings.files import read_options

Config = TypeVar("Config", bound=Options)


def read_line(
    plain: Config, args: Sequence[str], script: str
) -> tuple[Config, frozenset[str], dict[str, int]]:
    """Reads a command line, whether or not its options have an effect.

    Args:
      plain: the options of the script, none of them given.
      args: the command line.
      script: its module, and perhaps further words: "train.compare sft".

    Returns:
      The options, without a task's defaults; the names of those on the command line; and those of
      the file of --config that count, with the line of each. `check_effects` takes all three.

    Raises:
      UserError: the file of --config cannot be read, or has a key or a value that no option takes;
        a path has a scheme; or an option has the name that another tool has for it.
    """
    if not asks_for_help(args):
        check_names(args, traits_of(plain))
    path = _config_file(args)
    on_line = given_options(args)
    config = plain
    file_lines: dict[str, int] = {}
    effective_lines: dict[str, int] = {}
    if path is not None:
        check_local("config", [path])
        config, file_lines = read_options(path, config)
        config, effective_lines = _without_overridden(config, plain, file_lines, on_line)
    show_help(type(plain), args, script, config)
    flat = tyro.conf.OmitArgPrefixes[tyro.conf.FlagCreatePairsOff[type(plain)]]  # type: ignore[valid-type,misc]
    needed_args = [arg for arg in args if not _is_set_by_file(arg, config, file_lines)]
    config = tyro.cli(flat, args=needed_args, prog=program(script), default=config)
    check_paths(config, effective_lines, path or "")
    return config, on_line, effective_lines


def _without_overridden(
    config: Config, plain: Config, lines: dict[str, int], on_line: frozenset[str]
) -> tuple[Config, dict[str, int]]:
    """Returns options and their lines in a file, without those that the command line overrides.

    Args:
      config: the options with those of the file.
      plain: the options of the script, none of them given.
      lines: the line of each option in the file.
      on_line: the names of the options on the command line.
    """
    overridden = excluded(config, on_line) & lines.keys()
    plain_values = {name: value_of(plain, name) for name in overridden}
    config = replace_options(config, plain_values)
    # Where the file turns something on, --no-… turns it off.
    turned_off = {name.removeprefix("no_") for name in on_line if name not in lines}
    effective_lines = {}
    for name, line in lines.items():
        if name not in overridden and name not in turned_off:
            effective_lines[name] = line
    return config, effective_lines


def _is_set_by_file(arg: str, config: Options, file_options: Collection[str]) -> bool:
    """Returns True if a flag turns an option on or off, and the file of --config did so already."""
    name = arg.removeprefix("--").replace("-", "_") if arg.startswith("--") else ""
    value = not name.startswith("no_")
    name = name.removeprefix("no_")
    return name in file_options and value_of(config, name) is value


def _config_file(args: Sequence[str]) -> str | None:
    """Returns the value of --config, which has to be read before the other options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")  # tyro tells of a value that is missing
    return parser.parse_known_args(args)[0].config
