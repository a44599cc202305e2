"""Refuses options that have no effect beside others: a run does all that it is asked to do."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_jax.training.optimizers.named import OPTIMIZERS
from train.console.errors import UserError, flag
from train.options.conditions import reasons
from train.options.field import traits_of


def check_effects(
    options: Any, given: Collection[str], lines: Mapping[str, int] | None = None
) -> None:
    """Raises a UserError for an option that was given and has no effect beside the others.

    Args:
      options: the options as they were given, without a task's defaults.
      given: the options of the command line, by the names of their fields.
      lines: the lines of the file of --config, with the line of each.
    """
    lines = lines or {}
    for why, idle in _reasons(options).items():
        if named := [name for name in idle if name in given or name in lines]:
            parts = [flag(name) for name in named if name in given]
            if of_file := [name for name in named if name not in given]:
                where = f"line {min(lines[name] for name in of_file)} of {options.run.config}"
                parts.append(f"{', '.join(of_file)} ({where}{' on' * (len(of_file) > 1)})")
            raise UserError(f"{why}: leave out {' and '.join(parts)}")


def idle_options(options: Any) -> frozenset[str]:
    """Returns the names of all options that have no effect beside the others."""
    return frozenset(name for idle in _reasons(options).values() for name in idle)


def given_options(args: Sequence[str]) -> frozenset[str]:
    """Returns the names of the fields that a command line sets."""
    flags = (arg.partition("=")[0] for arg in args if arg.startswith("--"))
    return frozenset(name.removeprefix("--").replace("-", "_") for name in flags)


def _reasons(options: Any) -> dict[str, list[str]]:
    """Returns the options that have no effect, by the reason why; the first to tell first."""
    traits = traits_of(options)
    optimizer = options.optim.optimizer
    read = OPTIMIZERS[optimizer].options
    unread = {name for one in OPTIMIZERS.values() for name in one.options if name not in read}
    found = {
        f"--optimizer {optimizer} does not read it": [name for name in traits if name in unread]
    }
    for case, why in reasons(options).items():
        idle = [name for name, one in traits.items() if case in one.idle]
        found.setdefault(why, []).extend(idle)
    return found
