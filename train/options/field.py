"""An option's field, which says what is known of the option beside its type, default and help.

A part of a script's options declares each of its fields by `option`. A field that overrides another
only to have another default or help keeps what that one says. A part may declare all of its fields
at once, by `TRAITS`. Options that have no effect beside others are refused: a run does all that it
is asked to do.
"""

import dataclasses
import enum
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar

from lora_jax.training.optimizers.named import OPTIMIZERS
from train.console.errors import UserError, flag
from train.options.conditions import DatasetFacts, NoEffect, reasons

Value = TypeVar("Value")

REQUIRED: Any = dataclasses.MISSING  # the default of an option that has none
_TRAITS = "traits"


class CardSection(enum.IntEnum):
    """A place on the model card, in its order; in one place, options stand as --help lists them.

    Options about the machine, the output and other files stand nowhere, so that no path of a
    machine is on a card; steps and rate are shown as they came out.
    """

    NOWHERE, ADAPTER, TRAINED, ROWS, OPTIMISATION, LENGTH, ROPE = range(7)
    PACKING, LOSS, SKIPPED, STREAM, BEST, CODES = range(7, 13)


class SharedOption(enum.Enum):
    """The reason why the runs of a table cannot differ in an option."""

    BASE = "all runs of a table share one base"
    PROCESS = "all runs of a table share one process and its devices"
    TABLE = "it says where and how the whole table runs"


class Uncompared(enum.Enum):
    """The reason why a comparison has no use for an option."""

    PROCESS = "a comparison has one process"
    START = "a comparison begins at the base"
    ADAPTER = "a comparison sets the adapter's options itself"
    RATES = "a comparison sweeps the learning rate: give --lrs"
    MANY_RUNS = "a comparison has many runs: try one of them with its script"
    TABLE = "a comparison makes its table of runs itself"
    LAST_STEP = "all runs are compared after their last step"
    SAMPLER = "the runs of a comparison draw themselves"
    EARLY_STOPPING = f"{LAST_STEP}; see --early-stopping"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """The facts of an option.

    Attributes:
      card: its place on the model card.
      idle: the conditions in which it has no effect. An optimiser's own options need none: the
        optimisers say which they read.
      excludes: an option that it excludes, and which excludes it. Given on the command line, either
        overrides the other in a file.
      shared: why the runs of a table cannot differ in it; None if they can.
      single: whether it is for a single run: a table refuses it, unless it is off.
      of: whether it says what a run is, or is about one call of the script, or about one process,
        so that it may differ between the processes of a run.
      changeable: whether a resumed run may change it, such as length, devices, reports and
        checkpoints. Any other change would make it another run.
      older: the value that it had in runs older than the option, where that is not its default.
      of_inputs: whether rows, outline and examples depend on it, for some task.
      compared_by: the option of train.compare that sets it for each run.
      uncompared: why a comparison has no use for it.
    """

    card: CardSection
    idle: tuple[NoEffect, ...] = ()
    excludes: str | None = None
    shared: SharedOption | None = None
    single: bool = False
    of: Literal["run", "call", "process"] = "run"
    changeable: bool = False
    older: Any = None
    of_inputs: bool = True
    compared_by: str | None = None
    uncompared: Uncompared | None = None


def option(default: Value, traits: Traits, *idle: NoEffect, **others: Any) -> Value:
    """Declares an option: returns the field of a dataclass.

    Args:
      default: the value of an option that is not given, or `REQUIRED`.
      traits: what is known of it.
      idle: conditions in which it has no effect, beside those of `traits`.
      others: fields that differ from those of `traits`.
    """
    own = dataclasses.replace(traits, idle=(*traits.idle, *idle), **others)
    return dataclasses.field(default=default, metadata={_TRAITS: own})


def traits_of(options: Any) -> dict[str, Traits]:
    """Returns the traits of all options of a script, by their names, in the order of --help.

    Raises:
      TypeError: a field says nothing about itself.
    """
    parts = [type(getattr(options, group.name)) for group in dataclasses.fields(options)]
    fields = ((group, field.name) for group in parts for field in dataclasses.fields(group))
    return {name: _declared(group, name) for group, name in fields}


def excluded(options: Any, given: Collection[str]) -> set[str]:
    """Returns the options that some of those given exclude, and that are not given themselves."""
    names = set()
    for name, traits in traits_of(options).items():
        if not traits.excludes:
            continue
        # Each of the two excludes the other.
        if name in given and traits.excludes not in given:
            names.add(traits.excludes)
        if traits.excludes in given and name not in given:
            names.add(name)
    return names


def _declared(group: type, name: str) -> Traits:
    """Returns the traits of an option: those of its field, of an overridden one, or of its group.

    Args:
      group: the class of options that has it.
      name: the option's name.
    """
    for kind in group.__mro__:
        field = vars(kind).get("__dataclass_fields__", {}).get(name)
        if field is not None and _TRAITS in field.metadata:
            return field.metadata[_TRAITS]
    traits: Traits | None = getattr(group, "TRAITS", None)
    if traits is None:
        raise TypeError(
            f"{group.__name__}.{name} says nothing about itself: declare it by `option`"
        )
    return traits


# What many options have in common.
HIDDEN = Traits(card=CardSection.NOWHERE)
CHANGEABLE = Traits(card=CardSection.NOWHERE, changeable=True)
COURSE = Traits(card=CardSection.NOWHERE, changeable=True, of_inputs=False)
OF_BASE = Traits(card=CardSection.NOWHERE, shared=SharedOption.BASE)
OF_FIELD = Traits(card=CardSection.NOWHERE, idle=(NoEffect.HAS_ROWS,))
OF_HUB = Traits(card=CardSection.NOWHERE, idle=(NoEffect.FILES, NoEffect.HAS_ROWS))
ROWS = Traits(card=CardSection.ROWS)
RULES = Traits(
    card=CardSection.ADAPTER,
    idle=(NoEffect.FULL, NoEffect.INIT_ADAPTER, NoEffect.PEFT_CONFIG, NoEffect.INTRINSIC),
    of_inputs=False,
)
TARGETS = dataclasses.replace(RULES, idle=(*RULES.idle, NoEffect.HEAD_ONLY))
FACTORS = dataclasses.replace(RULES, idle=(*TARGETS.idle, NoEffect.NO_TARGETS))
# Those about an A and a B that train, or that are drawn.
PLAIN = dataclasses.replace(RULES, idle=(*FACTORS.idle, NoEffect.ALONE))
START = Traits(card=CardSection.NOWHERE, of_inputs=False, uncompared=Uncompared.START)
BEST = Traits(card=CardSection.BEST, of_inputs=False, uncompared=Uncompared.LAST_STEP)
TRAINED = Traits(card=CardSection.TRAINED, of_inputs=False)
OPTIMISATION = Traits(card=CardSection.OPTIMISATION, of_inputs=False)
LORA_PLUS = dataclasses.replace(
    OPTIMISATION,
    idle=(
        NoEffect.FULL,
        NoEffect.INTRINSIC,
        NoEffect.HEAD_ONLY,
        NoEffect.NO_TARGETS,
        NoEffect.ALONE,
    ),
)
OF_CALL = Traits(card=CardSection.NOWHERE, shared=SharedOption.TABLE, of="call")
# With --dry-run, other options may stand, so that it can be added to any command of one process.
OF_PROCESSES = Traits(
    card=CardSection.NOWHERE,
    idle=(NoEffect.DRY_RUN,),
    shared=SharedOption.PROCESS,
    of="call",
    uncompared=Uncompared.PROCESS,
)


def check_effects(
    options: Any,
    facts: DatasetFacts,
    given: Collection[str],
    lines: Mapping[str, int] | None = None,
) -> None:
    """Raises a UserError for an option that was given and has no effect beside the others.

    Args:
      options: the options as they were given, without a task's defaults.
      facts: facts about their data sets.
      given: the options of the command line, by the names of their fields.
      lines: the lines of the file of --config, with the line of each.
    """
    lines = lines or {}
    for reason, idle_names in _reasons(options, facts).items():
        line_options = [name for name in idle_names if name in given]
        file_options = [name for name in idle_names if name in lines and name not in given]
        remedies = [flag(name) for name in line_options]
        if file_options:
            location = f"line {min(lines[name] for name in file_options)} of {options.run.config}"
            if len(file_options) > 1:
                location += " on"
            remedies.append(f"{', '.join(file_options)} ({location})")
        if remedies:
            raise UserError(f"{reason}: leave out {' and '.join(remedies)}")


def idle_options(options: Any, facts: DatasetFacts) -> dict[str, str]:
    """Returns all options that have no effect beside the others, each with the first reason why."""
    idle: dict[str, str] = {}
    for reason, names in reversed(_reasons(options, facts).items()):
        for name in reversed(names):
            idle[name] = reason
    return idle


def given_options(args: Sequence[str]) -> frozenset[str]:
    """Returns the names of the fields that a command line sets."""
    names = set()
    for arg in args:
        if arg.startswith("--"):
            name, _, _ = arg.removeprefix("--").partition("=")
            names.add(name.replace("-", "_"))
    return frozenset(names)


def _reasons(options: Any, facts: DatasetFacts) -> dict[str, list[str]]:
    """Returns the options that have no effect, by the reason why; the first to tell first."""
    traits = traits_of(options)
    optimizer = options.optim.optimizer
    optimizer_options: set[str] = set()  # of all optimizers
    for optimizer_traits in OPTIMIZERS.values():
        optimizer_options |= optimizer_traits.options.keys()
    unread = optimizer_options - OPTIMIZERS[optimizer].options.keys()
    names_by_reason = {
        f"--optimizer {optimizer} does not read it": [name for name in traits if name in unread]
    }
    for condition, reason in reasons(options, facts).items():
        names = [name for name, trait in traits.items() if condition in trait.idle]
        names_by_reason.setdefault(reason, []).extend(names)
    return names_by_reason
