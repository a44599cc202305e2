"""The traits of options: properties besides their types, defaults and help texts.

A group of a script's options declares each of its fields by `option`. A field that overrides
another one only to change its default or help keeps the traits of that field. A group may declare
all of its fields at once, by `TRAITS`. Options that have no effect together with others are
refused, so that a run does everything that it was asked to do.
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
    """A section of the model card, in the order of the card. Within a section, options are in the
    order of --help.

    Options about the machine, the output and other files stand nowhere, so that no path of a
    machine is on a card. Steps and learning rate are shown as the run used them.
    """

    NOWHERE, ADAPTER, TRAINED, ROWS, OPTIMISATION, LENGTH, ROPE = range(7)
    PACKING, LOSS, SKIPPED, STREAM, BEST, CODES = range(7, 13)


class SharedOption(enum.Enum):
    """The reason why the runs of a table cannot differ in an option."""

    BASE = "all runs of a table share one base"
    PROCESS = "all runs of a table share one process and its devices"
    TABLE = "it sets where and how the whole table runs"


class Uncompared(enum.Enum):
    """The reason why a comparison does not accept an option."""

    PROCESS = "a comparison has one process"
    START = "a comparison starts from the base"
    ADAPTER = "a comparison sets the adapter's options itself"
    RATES = "a comparison sweeps the learning rates of --lrs"
    MANY_RUNS = "a comparison has many runs, and this option is for a single run"
    TABLE = "a comparison creates its table of runs itself"
    LAST_STEP = "all runs are compared after their last step"
    SAMPLER = "the runs of a comparison draw completions themselves"
    EARLY_STOPPING = f"{LAST_STEP} (see --early-stopping)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """The properties of an option besides its type, default and help.

    Attributes:
      card: the option's section of the model card.
      idle: the conditions in which the option has no effect. An optimiser's own options need no
        condition: `OPTIMIZERS` lists the options that each optimiser reads.
      excludes: another option that cannot be used together with this one. Passed on the command
        line, each of the two overrides the other one in a file.
      shared: the reason why the runs of a table cannot differ in the option; None if they can.
      single: whether the option is for a single run. A table refuses it, unless it is off.
      of: whether the option describes the run, one call of the script, or one process. An option
        of a process may differ between the processes of a run.
      changeable: whether a resumed run may change the option, such as length, devices, reports and
        checkpoints. Any other change would make it a different run.
      older: the value in runs that are older than the option, if it is not the default.
      of_inputs: whether rows, outline and examples depend on the option, for some task.
      compared_by: the option of train.compare that sets this option for each run.
      uncompared: the reason why a comparison does not accept the option.
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
    """Returns a dataclass field that declares an option with its traits.

    Args:
      default: the value of an option that the user does not pass, or `REQUIRED`.
      traits: the traits that the option has in common with others.
      idle: conditions in which the option has no effect, besides those of `traits`.
      others: further traits, in place of those of `traits`.
    """
    option_traits = dataclasses.replace(traits, idle=(*traits.idle, *idle), **others)
    return dataclasses.field(default=default, metadata={_TRAITS: option_traits})


def traits_of(options: Any) -> dict[str, Traits]:
    """Returns the traits of all options of a script, by their names, in the order of --help.

    Raises:
      TypeError: a field has no traits.
    """
    traits = {}
    for group_field in dataclasses.fields(options):
        group = type(getattr(options, group_field.name))
        for field in dataclasses.fields(group):
            traits[field.name] = _traits_of_field(group, field.name)
    return traits


def excluded(options: Any, given: Collection[str]) -> set[str]:
    """Returns the options that the given options exclude and that are not given themselves."""
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


def _traits_of_field(group: type, name: str) -> Traits:
    """Returns the traits of an option from its field, an overridden field, or its group.

    Args:
      group: the class of options that has the field.
      name: the option's name.
    """
    # The nearest class that declares the field by `option`.
    for kind in group.__mro__:
        field = vars(kind).get("__dataclass_fields__", {}).get(name)
        if field is not None and _TRAITS in field.metadata:
            return field.metadata[_TRAITS]
    traits: Traits | None = getattr(group, "TRAITS", None)
    if traits is None:
        raise TypeError(f"{group.__name__}.{name} has no traits. Declare the field by `option`.")
    return traits


# The traits that many options have in common.
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
# Options of A and B that train or are drawn, as in plain LoRA.
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
# --dry-run allows all other options, so that it can be added to any command of one process.
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
    """Raises a UserError for an option that the user passed and that has no effect with the others.

    Args:
      options: the options as the user passed them, without a task's defaults.
      facts: facts about their data sets.
      given: the names of the options on the command line.
      lines: the options in the file of --config, with the line of each.
    """
    lines = lines or {}
    for reason, idle_names in _idle_names_by_reason(options, facts).items():
        command_line_options = [name for name in idle_names if name in given]
        file_options = [name for name in idle_names if name in lines and name not in given]
        remedies = [flag(name) for name in command_line_options]
        if file_options:
            # Such as "rank, alpha (line 2 of run.yaml on)".
            location = f"line {min(lines[name] for name in file_options)} of {options.run.config}"
            if len(file_options) > 1:
                location += " on"
            remedies.append(f"{', '.join(file_options)} ({location})")
        if remedies:
            message = reason[0].upper() + reason[1:]
            raise UserError(f"{message}. Remove {' and '.join(remedies)}.")


def idle_options(options: Any, facts: DatasetFacts) -> dict[str, str]:
    """Returns all options that have no effect together with the others, with the first reason."""
    reason_by_name: dict[str, str] = {}
    # The first reason of an option is written last.
    for reason, names in reversed(_idle_names_by_reason(options, facts).items()):
        for name in reversed(names):
            reason_by_name[name] = reason
    return reason_by_name


def given_options(args: Sequence[str]) -> frozenset[str]:
    """Returns the names of the fields that a command line sets."""
    names = set()
    for arg in args:
        if arg.startswith("--"):
            name, _, _ = arg.removeprefix("--").partition("=")
            names.add(name.replace("-", "_"))
    return frozenset(names)


def _idle_names_by_reason(options: Any, facts: DatasetFacts) -> dict[str, list[str]]:
    """Returns the options that have no effect, by the reason. Messages use the first reason."""
    traits = traits_of(options)
    # Options of other optimizers than the chosen one.
    optimizer = options.optim.optimizer
    options_of_all_optimizers: set[str] = set()
    for optimizer_traits in OPTIMIZERS.values():
        options_of_all_optimizers |= optimizer_traits.options.keys()
    unread_options = options_of_all_optimizers - OPTIMIZERS[optimizer].options.keys()
    names_by_reason = {
        f"--optimizer {optimizer} does not use this option": [
            name for name in traits if name in unread_options
        ]
    }
    # Options whose conditions hold.
    for condition, reason in reasons(options, facts).items():
        names = [name for name, trait in traits.items() if condition in trait.idle]
        names_by_reason.setdefault(reason, []).extend(names)
    return names_by_reason
