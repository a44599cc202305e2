"""The arms of a comparison: all combinations of its settings, as options of a run each."""

import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from train.compare.options import (
    COMPARED,
    IN_FULL,
    METHODS,
    OF_SUBSPACE,
    CompareConfig,
    has_adapter,
)
from train.compare.result import Arm
from train.options.scripts.classify import rate_of_dimension

_RANKS = (4, 16, 64)
_QUICK_RANKS = (8,)
# Around the script's learning rate. Neighbours are a factor of three apart, about the distance at
# which a loss curve begins to differ.
_AROUND = (1 / 3, 1.0, 3.0)
_AROUND_FULL = (1 / 3, 1.0, 3.0, 9.0)  # the scripts' rates are careful ones, for long runs
_DIMENSIONS = (100, 1000, 10_000)


class ScriptDefaults(NamedTuple):
    """The settings that a script would choose by itself.

    Attributes:
      alpha: a multiple of the rank.
      rates: the learning rate of an adapter ("lora"), and of each method that has another; of a
        subspace the one at 10,000 dimensions.
      batch_size: rows a step.
      quick_full: the multiples of full fine-tuning's rate to try in a first look.
    """

    alpha: float
    rates: dict[str, float]
    batch_size: int
    quick_full: tuple[float, ...]


def arms_of(compare: CompareConfig, basis: ScriptDefaults) -> list[Arm]:
    """Returns all arms, method by method.

    Args:
      compare: the settings.
      basis: the basis of the script, where none are given.
    """
    sets = [tuple(text.split(",")) for text in compare.target_sets]
    batch_sizes = compare.batch_sizes or (basis.batch_size,)
    arms: list[Arm] = []
    for method in compare.methods:
        if has_adapter(method):
            times = basis.rates.get(method, basis.rates["lora"]) / basis.rates["lora"]
            rates = _times(times, compare.lrs) or _times(times * basis.rates["lora"])
            variant = COMPARED.get(method)
            own = variant.ranks if variant else None
            usual = (own or _QUICK_RANKS)[-1:] if compare.quick else own or _RANKS
            ranks = compare.ranks or usual
            times_rank = 1.0 if variant and variant.alpha_is_rank else basis.alpha
            for rank, targets, size, rate in itertools.product(ranks, sets, batch_sizes, rates):
                alphas = compare.alphas or (times_rank * rank,)
                arms += [Arm(method, rank, targets, alpha, rate, size) for alpha in alphas]
        elif method in OF_SUBSPACE:
            lrs = compare.subspace_lrs or _times(basis.rates[method])
            sizes = itertools.product(compare.dimensions or _DIMENSIONS, batch_sizes, lrs)
            for dimension, size, lr in sizes:
                rate = float(f"{rate_of_dimension(dimension, lr):.3g}")
                arms.append(Arm(method, None, None, None, rate, size, dimension))
        else:
            factors = basis.quick_full if compare.quick else _AROUND_FULL
            is_full = method in IN_FULL
            lrs = compare.full_lrs if is_full else compare.lrs
            lrs = lrs or _times(basis.rates["full" if is_full else method], factors)
            arms += [Arm(method, None, None, None, lr, size) for size in batch_sizes for lr in lrs]
    return arms


def settings(arm: Arm, seed: int) -> dict[str, object]:
    """Returns the options of a run, by the names of their fields."""
    given = {**METHODS[arm.method].sets, "lr": arm.learning_rate, "batch_size": arm.batch_size}
    if has_adapter(arm.method):
        given |= {"rank": arm.rank, "targets": arm.targets, "alpha": arm.alpha}
    if arm.dimension is not None:
        given["intrinsic"] = arm.dimension
    return {**given, "seed": seed}


def name_of(arm: Arm, seed: int) -> str:
    """Returns the name of a run's folder, which tells all settings."""
    parts = [arm.method]
    if arm.rank is not None:
        parts += [f"r{arm.rank}", f"a{arm.alpha:g}", _word("+".join(arm.targets or ()))]
    if arm.dimension is not None:
        parts.append(f"d{arm.dimension}")
    return "-".join([*parts, f"lr{arm.learning_rate:.3g}", f"b{arm.batch_size}", f"s{seed}"])


def _word(targets: str) -> str:
    """Returns targets as a part of a folder's name; a regular expression as a short hash."""
    if re.fullmatch(r"[\w+.-]{1,40}", targets):
        return targets.replace("-", "_")
    return "targets" + hashlib.sha256(targets.encode()).hexdigest()[:8]


def _times(rate: float, factors: Sequence[float] = _AROUND) -> tuple[float, ...]:
    return tuple(float(f"{factor * rate:.2g}") for factor in factors)
