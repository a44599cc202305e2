"""A command line as the options of a script without --config."""

import contextlib
import dataclasses
import io
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro

from train.console.errors import UserError
from train.console.help import option_forms, show_help
from train.console.program import program
from train.options.elsewhere import check_names
from train.options.paths import check_paths
from train.options.problems import option_problem

Kind = TypeVar("Kind")


def parse_options(kind: type[Kind], args: Sequence[str] | None, script: str) -> Kind:
    """Parses the command line of a script without --config.

    Args:
      kind: a dataclass of its options, or of groups of options.
      args: the command line; None for the command line of this process.
      script: the module of the script, such as "train.export".

    Raises:
      UserError: the command line has an option or a value that the script does not take; a path
        has a scheme; or an option has the name of another tool.
    """
    if args is None:
        args = sys.argv[1:]
    show_help(kind, args, script)
    check_names(args, set(_option_names(kind)))
    options = parse_values(kind, args, script)
    check_paths(options)
    return options


def parse_values(
    kind: type[Kind], args: Sequence[str], script: str, default: Kind | None = None
) -> Kind:
    """Parses the options and their values, without any other check.

    Args:
      kind, args, script: see `parse_options`.
      default: the options where the command line has none; None for the defaults of `kind`.

    Raises:
      UserError: the command line has an option or a value that the script does not take. The
        message has one line.
    """
    # tyro has no flag for a switch's present value.
    without_prefixes: Any = tyro.conf.OmitArgPrefixes[tyro.conf.FlagCreatePairsOff[kind]]  # type: ignore[valid-type,misc]
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            options: Kind = tyro.cli(without_prefixes, args=args, prog=program(script), **defaults)
    except SystemExit as error:
        forms = option_forms(kind, default)
        raise UserError(option_problem(printed.getvalue(), args, forms, script)) from error
    return options


def _option_names(kind: type) -> Iterator[str]:
    """Yields the names of the options of a dataclass and its groups."""
    for name, hint in typing.get_type_hints(kind).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _option_names(hint)
        else:
            yield name
