"""Optimisers by name: each one's direction, the options that it reads, and its learning rate."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import optax

from lora_jax.core.types import Tree
from lora_jax.training.optimizers.adafactor import factored_rms
from lora_jax.training.optimizers.muon import orthogonalised

Name = Literal["adamw", "lion", "adafactor", "muon", "schedule-free", "sgd"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedOptimizer:
    """An optimiser of the table.

    Attributes:
      direction: (adapted tree or None, **options) -> the direction of a step, which weight decay
        is added to and the learning rate multiplies.
      options: the options that it reads, with their defaults.
      rate: the learning rate to begin with, as a multiple of AdamW's; None for no rule.
      averages: whether the parameters to evaluate and to keep are an average over the steps; the
        nearer the option `beta1` is to 1, the nearer to it gradients are taken.
    """

    direction: Callable[..., optax.GradientTransformation]
    options: Mapping[str, float]
    rate: float | None
    averages: bool = False


def _adam(params: Tree, *, beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps)


def _lion(params: Tree, *, beta1: float, beta2: float) -> optax.GradientTransformation:
    return optax.scale_by_lion(b1=beta1, b2=beta2)


def _sgd(params: Tree, *, momentum: float) -> optax.GradientTransformation:
    return optax.trace(momentum) if momentum else optax.identity()


def _without_momentum(
    params: Tree, *, beta1: float, beta2: float, eps: float
) -> optax.GradientTransformation:
    """Returns Adam's direction without its first moment, which averaging replaces."""
    return optax.scale_by_rms(decay=beta2, eps=eps, eps_in_sqrt=False, bias_correction=True)


_ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}

# Sources of the learning rates:
# - lion: 3 to 10 times lower than AdamW's (Chen et al., arXiv 2302.06675, section 5); a third,
#   since adapters train for few steps.
# - adafactor: as transformers' Trainer uses it, with AdamW's own rate (scale_parameter=False).
# - muon: updates have AdamW's root mean square, so that AdamW's rate fits (Liu et al.,
#   arXiv 2502.16982, section 2.2).
# - schedule-free: 1 to 10 times AdamW's (Defazio et al., arXiv 2405.15682, and their README).
# - sgd: its steps scale with the gradient, so that no rate suits two models.
OPTIMIZERS: dict[str, NamedOptimizer] = {
    "adamw": NamedOptimizer(direction=_adam, options=_ADAM, rate=1.0),
    "lion": NamedOptimizer(direction=_lion, options={"beta1": 0.9, "beta2": 0.99}, rate=1 / 3),
    "adafactor": NamedOptimizer(direction=factored_rms, options={}, rate=1.0),
    "muon": NamedOptimizer(direction=orthogonalised, options={"momentum": 0.95}, rate=1.0),
    "schedule-free": NamedOptimizer(
        direction=_without_momentum, options=_ADAM, rate=1.0, averages=True
    ),
    "sgd": NamedOptimizer(direction=_sgd, options={"momentum": 0.9}, rate=None),
}


def optimizer_named(name: str) -> NamedOptimizer:
    """Returns an optimiser of the table.

    Raises:
      ValueError: there is none of this name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"there is no optimizer {name!r}: {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def settings(name: str, given: Mapping[str, float | None]) -> dict[str, float]:
    """Returns the options of an optimiser: those given (not None), and defaults for the others.

    Raises:
      ValueError: it does not read one that is given, or there is no optimiser of this name.
    """
    options = optimizer_named(name).options
    set_ = {option: value for option, value in given.items() if value is not None}
    if unread := sorted(set(set_) - set(options)):
        reads = ", ".join(options) or "none"
        raise ValueError(f"{name} does not read {', '.join(unread)}; the options it has: {reads}")
    return {**options, **set_}
