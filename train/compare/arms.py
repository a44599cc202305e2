"""The arms of a comparison: all combinations of its settings, each as options of a run."""

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
    """The settings that a script uses by default.

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


def make_arms(compare: CompareConfig, basis: ScriptDefaults) -> list[Arm]:
    """Returns all arms, method by method.

    Args:
      compare: the settings.
      basis: the basis of the script, where none are given.
    """
    arms: list[Arm] = []
    for method in compare.methods:
        if has_adapter(method):
            arms += _make_adapter_arms(method, compare, basis)
        elif method in OF_SUBSPACE:
            arms += _make_subspace_arms(method, compare, basis)
        else:
            arms += _make_full_arms(method, compare, basis)
    return arms


def _make_adapter_arms(method: str, compare: CompareConfig, basis: ScriptDefaults) -> list[Arm]:
    """Returns the arms of LoRA or of a variant; see `make_arms`."""
    variant = COMPARED.get(method)
    ranks = compare.ranks or _default_ranks(variant.ranks if variant else None, compare.quick)
    target_sets = [tuple(text.split(",")) for text in compare.target_sets]
    batch_sizes = compare.batch_sizes or (basis.batch_size,)
    # --lrs are those of LoRA; a method with another rate gets them multiplied.
    rate_ratio = basis.rates.get(method, basis.rates["lora"]) / basis.rates["lora"]
    rates = _multiples(rate_ratio, compare.lrs) or _multiples(rate_ratio * basis.rates["lora"])
    alpha_ratio = 1.0 if variant and variant.alpha_is_rank else basis.alpha
    arms: list[Arm] = []
    for rank, targets, batch_size, rate in itertools.product(
        ranks, target_sets, batch_sizes, rates
    ):
        for alpha in compare.alphas or (alpha_ratio * rank,):
            arm = Arm(
                method=method,
                rank=rank,
                targets=targets,
                alpha=alpha,
                learning_rate=rate,
                batch_size=batch_size,
            )
            arms.append(arm)
    return arms


def _default_ranks(variant_ranks: tuple[int, ...] | None, is_quick: bool) -> tuple[int, ...]:
    """Returns the ranks to try: the variant's own, or the usual ones; only one for --quick."""
    if is_quick:
        return (variant_ranks or _QUICK_RANKS)[-1:]
    return variant_ranks or _RANKS


def _make_subspace_arms(method: str, compare: CompareConfig, basis: ScriptDefaults) -> list[Arm]:
    """Returns the arms of a random subspace; see `make_arms`."""
    arms: list[Arm] = []
    base_rates = compare.subspace_lrs or _multiples(basis.rates[method])
    for dimension, batch_size, base_rate in itertools.product(
        compare.dimensions or _DIMENSIONS, compare.batch_sizes or (basis.batch_size,), base_rates
    ):
        arm = _make_arm_without_adapter(
            method,
            learning_rate=float(f"{rate_of_dimension(dimension, base_rate):.3g}"),
            batch_size=batch_size,
            dimension=dimension,
        )
        arms.append(arm)
    return arms


def _make_full_arms(method: str, compare: CompareConfig, basis: ScriptDefaults) -> list[Arm]:
    """Returns the arms of full fine-tuning, or of a classifier's head alone; see `make_arms`."""
    is_full = method in IN_FULL
    rates = compare.full_lrs if is_full else compare.lrs
    if not rates:
        script_rate = basis.rates["full" if is_full else method]
        rates = _multiples(script_rate, basis.quick_full if compare.quick else _AROUND_FULL)
    batch_sizes = compare.batch_sizes or (basis.batch_size,)
    return [
        _make_arm_without_adapter(method, learning_rate=rate, batch_size=batch_size)
        for batch_size, rate in itertools.product(batch_sizes, rates)
    ]


def _make_arm_without_adapter(
    method: str, *, learning_rate: float, batch_size: int, dimension: int | None = None
) -> Arm:
    """Returns an arm without rank, targets and alpha."""
    return Arm(
        method=method,
        rank=None,
        targets=None,
        alpha=None,
        learning_rate=learning_rate,
        batch_size=batch_size,
        dimension=dimension,
    )


def options_of_arm(arm: Arm, seed: int) -> dict[str, object]:
    """Returns the options of a run, by the names of their fields."""
    options = {**METHODS[arm.method].sets, "lr": arm.learning_rate, "batch_size": arm.batch_size}
    if has_adapter(arm.method):
        options |= {"rank": arm.rank, "targets": arm.targets, "alpha": arm.alpha}
    if arm.dimension is not None:
        options["intrinsic"] = arm.dimension
    return {**options, "seed": seed}


def name_of_run(arm: Arm, seed: int) -> str:
    """Returns the name of a run's folder, which contains all settings."""
    words = [arm.method]
    if arm.rank is not None:
        words += [f"r{arm.rank}", f"a{arm.alpha:g}", _targets_in_name("+".join(arm.targets or ()))]
    if arm.dimension is not None:
        words.append(f"d{arm.dimension}")
    words += [f"lr{arm.learning_rate:.3g}", f"b{arm.batch_size}", f"s{seed}"]
    return "-".join(words)


def _targets_in_name(targets: str) -> str:
    """Returns targets as a part of a folder's name; a regular expression as a short hash."""
    if re.fullmatch(r"[\w+.-]{1,40}", targets):
        return targets.replace("-", "_")
    return "targets" + hashlib.sha256(targets.encode()).hexdigest()[:8]


def _multiples(rate: float, factors: Sequence[float] = _AROUND) -> tuple[float, ...]:
    return tuple(float(f"{factor * rate:.2g}") for factor in factors)
