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
    parts = [type(getattr(options, part.name)) for part in dataclasses.fields(options)]
    fields = ((part, field.name) for part in parts for field in dataclasses.fields(part))
    return {name: _declared(part, name) for part, name in fields}


def excluded(options: Any, given: Collection[str]) -> set[str]:
    """Returns the options that some of those given exclude, and that are not given themselves."""
    pairs = [(name, trait.excludes) for name, trait in traits_of(options).items() if trait.excludes]
    pairs += [(other, name) for name, other in pairs]
    return {trait for trait, other in pairs if other in given and trait not in given}


def _declared(part: type, name: str) -> Traits:
    for kind in part.__mro__:
        field = vars(kind).get("__dataclass_fields__", {}).get(name)
        if field is not None and _TRAITS in field.metadata:
            return field.metadata[_TRAITS]
    if (traits := getattr(part, "TRAITS", None)) is not None:
        return traits
    raise TypeError(f"{part.__name__}.{name} says nothing about itself: declare it by `option`")


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
    for why, idle in _reasons(options, facts).items():
        if named := [name for name in idle if name in given or name in lines]:
            parts = [flag(name) for name in named if name in given]
            if of_file := [name for name in named if name not in given]:
                where = f"line {min(lines[name] for name in of_file)} of {options.run.config}"
                parts.append(f"{', '.join(of_file)} ({where}{' on' * (len(of_file) > 1)})")
            raise UserError(f"{why}: leave out {' and '.join(parts)}")


def idle_options(options: Any, facts: DatasetFacts) -> dict[str, str]:
    """Returns all options that have no effect beside the others, each with the first reason why."""
    named = [(name, why) for why, idle in _reasons(options, facts).items() for name in idle]
    return dict(reversed(named))


def given_options(args: Sequence[str]) -> frozenset[str]:
    """Returns the names of the fields that a command line sets."""
    flags = (arg.partition("=")[0] for arg in args if arg.startswith("--"))
    return frozenset(name.removeprefix("--").replace("-", "_") for name in flags)


def _reasons(options: Any, facts: DatasetFacts) -> dict[str, list[str]]:
    """Returns the options that have no effect, by the reason why; the first to tell first."""
    traits = traits_of(options)
    optimizer = options.optim.optimizer
    read = OPTIMIZERS[optimizer].options
    unread = {name for trait in OPTIMIZERS.values() for name in trait.options if name not in read}
    names_by_reason = {
        f"--optimizer {optimizer} does not read it": [name for name in traits if name in unread]
    }
    for case, why in reasons(options, facts).items():
        idle = [name for name, trait in traits.items() if case in trait.idle]
        names_by_reason.setdefault(why, []).extend(idle)
    return names_by_reason
