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
    path = _named_file(args)
    on_line = given_options(args)
    config = plain
    in_file: dict[str, int] = {}
    lines: dict[str, int] = {}
    if path is not None:
        check_local("config", [path])
        config, lines = read_options(path, config)
        in_file = lines
        overridden = excluded(config, on_line) & in_file.keys()
        config = replace_options(config, {name: value_of(plain, name) for name in overridden})
        # Where the file turns something on, --no-… turns it off.
        overridden |= {name.removeprefix("no_") for name in on_line if name not in in_file}
        in_file = {name: line for name, line in in_file.items() if name not in overridden}
    show_help(type(plain), args, script, config)
    flat = tyro.conf.OmitArgPrefixes[tyro.conf.FlagCreatePairsOff[type(plain)]]  # type: ignore[valid-type,misc]
    needed = [arg for arg in args if not _is_so_already(arg, config, lines)]
    config = tyro.cli(flat, args=needed, prog=program(script), default=config)
    check_paths(config, in_file, path or "")
    return config, on_line, in_file


def _is_so_already(arg: str, config: Options, in_file: Collection[str]) -> bool:
    """Returns True if a word turns an option as the file of --config has turned it."""
    name = arg.removeprefix("--").replace("-", "_") if arg.startswith("--") else ""
    turned = not name.startswith("no_")
    name = name.removeprefix("no_")
    return name in in_file and value_of(config, name) is turned


def _named_file(args: Sequence[str]) -> str | None:
    """Returns the value of --config, which has to be read before the other options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")  # tyro tells of a value that is missing
    return parser.parse_known_args(args)[0].config
