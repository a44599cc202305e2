"""The options of `python -m train.compare`: what to compare, beside the options of the script."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from tyro.conf import arg

from lora_jax.variants import VARIANTS
from train.console.errors import UserError, flag
from train.options.common import Options
from train.options.field import HIDDEN, traits_of
from train.reporters.registry import check_many

COMPARED = {variant.method: variant for variant in VARIANTS if variant.is_compared}
WITH_OWN_RATE = tuple(method for method, variant in COMPARED.items() if variant.rate)
OF_SUBSPACE = ("said", "did")
OF_CLASSIFIER = ("head-only", *OF_SUBSPACE)  # methods that train.sft has not
OF_EXAMPLES = ("sft", "sft-full")  # methods beside rewards, by --demonstrations
IN_FULL = ("full", "sft-full")


class TrainingMethod(NamedTuple):
    """A method of training that a comparison can include.

    Attributes:
      name: the method, as people write it.
      sets: the options of a script that it sets. Variants are LoRA but for one thing.
    """

    name: str
    sets: Mapping[str, object]


METHODS = {
    "lora": TrainingMethod("LoRA", {}),
    "rslora": TrainingMethod("rsLoRA", {"scaling": "alpha/sqrt(rank)"}),
    "pissa": TrainingMethod("PiSSA", {"init": "pissa"}),
    "olora": TrainingMethod("OLoRA", {"init": "olora"}),
    "lora-plus": TrainingMethod("LoRA+", {"lora_plus": 16.0}),
    **{
        method: TrainingMethod(variant.name, {variant.option: True})
        for method, variant in COMPARED.items()
    },
    "full": TrainingMethod("full fine-tuning", {"full": True}),
    "head-only": TrainingMethod("head alone", {"head_only": True}),
    "said": TrainingMethod("SAID", {"intrinsic_kind": "said"}),
    "did": TrainingMethod("DID", {"intrinsic_kind": "did"}),
    "sft": TrainingMethod("SFT of LoRA", {}),
    "sft-full": TrainingMethod("SFT in full", {"full": True}),
}
if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(METHODS)]


def has_adapter(method: str) -> bool:
    """Returns True if a method trains an adapter, so that several train side by side."""
    return method not in (*IN_FULL, *OF_CLASSIFIER)


_OWN_RANKS = [f"of {m} {' '.join(map(str, v.ranks))}" for m, v in COMPARED.items() if v.ranks]
_ABOUT_RANKS = arg(help=f"{', '.join(['Ranks of the adapters. By default 4 16 64', *_OWN_RANKS])}.")
_ABOUT_ALPHAS = arg(
    help="Alphas of the adapters. By default the script's: a multiple of the rank, of "
    f"{' and '.join(m for m, v in COMPARED.items() if v.alpha_is_rank)} the rank itself."
)
_ABOUT_RATES = arg(
    help="Learning rates of the adapters. By default the script's, a third of it and three times "
    f"it. Those of {' and '.join(WITH_OWN_RATE)} are as many times these as the script's are with "
    f"{' and '.join(flag(COMPARED[method].option) for method in WITH_OWN_RATE)}."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The comparison: each method with all combinations of its settings, each with all seeds."""

    TRAITS = HIDDEN  # of all fields

    methods: tuple[Method, ...] = ("lora", "full")
    """Ways to train. lora and its variants train adapters, and full trains all weights. For
    classifiers, head-only trains the head on the frozen encoder, and said and did train a random
    subspace of all weights (--intrinsic). For rewards, sft and sft-full train LoRA and all weights
    on --demonstrations."""
    ranks: Annotated[tuple[int, ...], _ABOUT_RANKS] = ()
    target_sets: tuple[str, ...] = ("all-linear",)
    """Sets of modules to adapt, each as --targets takes it, with commas: all-linear
    attention q_proj,v_proj."""
    alphas: Annotated[tuple[float, ...], _ABOUT_ALPHAS] = ()
    lrs: Annotated[tuple[float, ...], _ABOUT_RATES] = ()
    full_lrs: tuple[float, ...] = ()
    """Learning rates of full fine-tuning. By default the script's with --full, a third of it, and
    three and nine times it."""
    dimensions: tuple[int, ...] = ()
    """Numbers of parameters that said and did train. By default 100 1000 10000."""
    subspace_lrs: tuple[float, ...] = ()
    """Learning rates of said and did at 10000 dimensions; at D they are (10000 / D)^0.75 times as
    large. By default the script's, a third of it and three times it."""
    batch_sizes: tuple[int, ...] = ()
    """Rows per step. By default the script's."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs. The spread over the seeds shows which differences are real."""
    early_stopping: bool = True
    """Stop hopeless settings early: after an eighth of the steps, when the warmup is over, the best
    quarter of each method goes on, and after half of them the best half of those. Without it, all
    are run to the end."""
    at_once: int = 8
    """Number of adapters that train side by side in one step."""
    outside: str | None = None
    """The path of a text outside the task, which measures what the model forgets; or off. By
    default Python's own documentation."""
    demonstrations: str | None = None
    """Rows with right answers, as train.sft takes them, that sft and sft-full learn from."""
    kl: bool = False
    """Measure how far each run moves from the base: the exact KL divergence of its next tokens from
    the base's, on the base's completions of the held-out prompts, whenever the reward is
    measured."""
    intruders: bool = False
    """Count the intruder dimensions of each run's weights: strong directions that the base does not
    have. This takes from seconds to a minute per run."""
    costs: bool = True
    """Measure the memory and the time of a step of the best of each method, each alone in a process
    of its own, and the time of an answer: base, merged, and with the adapter beside it."""
    topology: str | None = None
    """Plan the best of each method for a machine that is not there, such as v5e:2x4; see
    train.plan."""
    price: float | None = None
    """The price of one chip-hour of --topology, in any currency."""
    keep_weights: bool = False
    """Keep all weights of full fine-tuning, one model per run. By default their size is measured,
    and they are deleted."""
    quick: bool = False
    """Take a first look, in about ten minutes on two cores. The defaults of settings, seeds, rows
    and steps are smaller."""


_RATES = ("alphas", "lrs", "full_lrs", "subspace_lrs")
_COUNTS = ("ranks", "batch_sizes", "dimensions")
_OF_GRID = ("methods", "target_sets", *_RATES, *_COUNTS)


def check_options(compare: CompareConfig, options: Options, given: Collection[str]) -> None:
    """Raises a UserError for invalid options of a comparison.

    Args:
      compare: what to compare.
      options: the options of the script.
      given: the names of the options that were given.
    """
    for name, traits in traits_of(options).items():
        if name in given and traits.compared_by:
            raise UserError(
                f"{flag(name)} is set by the comparison itself. Use {flag(traits.compared_by)} "
                "instead."
            )
        if name in given and traits.uncompared:
            raise UserError(
                f"{flag(name)} does not work in a comparison: {traits.uncompared.value}. Remove "
                f"{flag(name)}."
            )
    if options.adapter.weight_tying:
        raise UserError(
            "--weight-tying trains one vector for several weights, but adapters side by side "
            "cannot share a vector. Remove --weight-tying."
        )
    for field in ("methods", "target_sets", "seeds"):
        if not getattr(compare, field):
            raise UserError(f"{flag(field)} is empty. Pass at least one value.")
    for field in (*_OF_GRID, "seeds"):
        values = getattr(compare, field)
        repeated_values = [value for value in values if values.count(value) > 1]
        if repeated_values:
            raise UserError(
                f"{flag(field, *values)} lists {repeated_values[0]} twice. Remove one of the two."
            )
    for field in (*_RATES, "price"):
        for value in _option_values(compare, field):
            if not 0 < value < math.inf:
                raise UserError(f"{flag(field)} {value} is out of range. Pass a number above 0.")
    for field in (*_COUNTS, "at_once"):
        for value in _option_values(compare, field):
            if value < 1:
                raise UserError(f"{flag(field)} {value} is out of range. Pass a number from 1 on.")
    _check_methods(compare, given)
    if compare.price is not None and compare.topology is None:
        raise UserError("--price needs a machine. Pass one with --topology, or remove --price.")
    check_many(options.run.report_to, "a comparison")


def _option_values(compare: CompareConfig, field: str) -> tuple[Any, ...]:
    """Returns an option's values as a tuple, also for a single value or None."""
    value = getattr(compare, field)
    if isinstance(value, tuple):
        return value
    return () if value is None else (value,)


def _check_methods(compare: CompareConfig, given: Collection[str]) -> None:
    """Raises a UserError for settings of methods that are not compared."""
    methods = set(compare.methods)
    unused: dict[str, str] = {}  # option -> why it has no effect
    has_adapters = any(map(has_adapter, methods))
    if not has_adapters:
        reason = "only applies to adapters, but --methods names no adapter"
        unused |= dict.fromkeys(("ranks", "target_sets", "alphas", "at_once"), reason)
        if "head-only" not in methods:
            unused["lrs"] = reason
    if methods.isdisjoint(OF_SUBSPACE):
        reason = "only applies to said and did, but --methods names neither"
        unused |= dict.fromkeys(("dimensions", "subspace_lrs"), reason)
    if methods.isdisjoint(IN_FULL):
        reason = "only applies to full fine-tuning, but --methods does not name it"
        unused |= dict.fromkeys(("full_lrs", "keep_weights"), reason)
    if methods.isdisjoint(OF_EXAMPLES):
        unused["demonstrations"] = "only applies to sft and sft-full, but --methods names neither"
    for field, reason in unused.items():
        if field in given:
            raise UserError(f"{flag(field)} {reason}. Remove {flag(field)}.")
