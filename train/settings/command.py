"""Parses a command line and the file of its `--config` into options."""

import argparse
from collections.abc import Collection, Sequence
from typing import TypeVar

from train.console.help import asks_for_help, show_help
from train.options.command import parse_values
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
    """Reads a command line and its file of --config, without a check for options without effect.

    Args:
      plain: the script's default options.
      args: the command line.
      script: the module of the script, and perhaps further words: "train.compare sft".

    Returns:
      The options, without a task's defaults; the names of the options on the command line; and the
      options of the file of --config that are not overridden, with the line of each. All three are
      arguments of `check_effects`.

    Raises:
      UserError: the command line or the file of --config has a key or a value that no option
        takes; the file cannot be read; a path has a scheme; or an option has the name of another
        tool.
    """
    if not asks_for_help(args):
        check_names(args, traits_of(plain))
    path = _config_path(args)
    on_line = given_options(args)
    config = plain
    file_lines: dict[str, int] = {}
    effective_lines: dict[str, int] = {}
    if path is not None:
        check_local("config", [path])
        config, file_lines = read_options(path, config)
        config, effective_lines = _without_overridden(config, plain, file_lines, on_line)
    show_help(type(plain), args, script, config)
    # The command line overrides the file.
    needed_args = [arg for arg in args if not _is_set_by_file(arg, config, file_lines)]
    config = parse_values(type(plain), needed_args, script, config)
    check_paths(config, effective_lines, path or "")
    return config, on_line, effective_lines


def _without_overridden(
    config: Config, plain: Config, lines: dict[str, int], on_line: frozenset[str]
) -> tuple[Config, dict[str, int]]:
    """Removes the options of a file that the command line overrides.

    Args:
      config: the options with the values of the file.
      plain: the script's default options.
      lines: the line of each option in the file.
      on_line: the names of the options on the command line.
    """
    # An option of the file that excludes one of the command line gets its default again.
    overridden = excluded(config, on_line) & lines.keys()
    plain_values = {name: value_of(plain, name) for name in overridden}
    config = replace_options(config, plain_values)
    # --no-… on the command line turns off a switch that the file turns on.
    turned_off = {name.removeprefix("no_") for name in on_line if name not in lines}
    effective_lines = {}
    for name, line in lines.items():
        if name not in overridden and name not in turned_off:
            effective_lines[name] = line
    return config, effective_lines


def _is_set_by_file(arg: str, config: Options, file_options: Collection[str]) -> bool:
    """Returns True if an argument is a flag that sets a switch as the file of --config sets it."""
    if not arg.startswith("--"):
        return False
    flag_name = arg.removeprefix("--").replace("-", "_")
    value = not flag_name.startswith("no_")
    name = flag_name.removeprefix("no_")
    return name in file_options and value_of(config, name) is value


def _config_path(args: Sequence[str]) -> str | None:
    """Returns the value of --config, which is read before the other options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")  # `parse_values` tells of a value that is missing
    return parser.parse_known_args(args)[0].config
