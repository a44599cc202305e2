"""A command line as the options of a script without --config."""

import dataclasses
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro

from train.console.help import show_help
from train.console.program import program
from train.options.elsewhere import check_names
from train.options.paths import check_paths

Kind = TypeVar("Kind")


def parse_options(kind: type[Kind], args: Sequence[str] | None, script: str) -> Kind:
    """Parses the command line of a script without --config.

    Args:
      kind: a dataclass of its options, or of groups of options.
      args: the command line; None for the command line of this process.
      script: the module of the script, such as "train.export".

    Raises:
      UserError: a path has a scheme, or an option has the name of another tool.
    """
    if args is None:
        args = sys.argv[1:]
    show_help(kind, args, script)
    check_names(args, set(_option_names(kind)))
    without_prefixes: Any = tyro.conf.OmitArgPrefixes[tyro.conf.FlagCreatePairsOff[kind]]  # type: ignore[valid-type,misc]
    options: Kind = tyro.cli(without_prefixes, args=args, prog=program(script))
    check_paths(options)
    return options


def _option_names(kind: type) -> Iterator[str]:
    """Yields the names of the options of a dataclass and its groups."""
    for name, hint in typing.get_type_hints(kind).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _option_names(hint)
        else:
            yield name
