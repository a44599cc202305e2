"""Optimisers by name: the transformation, the options, and the default learning rate of each."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from lora_jax.core.types import Shaped, Tree
from lora_jax.core.weight import LoraWeight
from lora_jax.lorafy import map_parts, nodes_of
from lora_jax.training.optimizers.muon import orthogonalised

Name = Literal["adamw", "lion", "adafactor", "muon", "schedule-free", "sgd"]
_MIN_FACTORED_SIZE = (
    128  # matrices narrower than this keep all second moments: a row would save little
)
_MAX_RMS = 1.0  # the largest root mean square of a matrix's update


def factored_rms(params: Tree = None) -> optax.GradientTransformation:
    """Returns Adafactor's transformation, without scaling by the parameters' size.

    As transformers' Trainer uses it: the learning rate is the size of a step, as Adam's is. Second
    moments of a matrix are factored where both its sides have 128 or more; in a stack, each layer
    and expert by itself. A and B of a low rank keep all of theirs. A matrix's update is clipped to
    a root mean square of 1.

    Args:
      params: the adapted tree, which has the batch axes of A and B. Without it, an array's two
        largest axes are taken for its matrix.

    Source: Shazeer & Stern, *Adafactor*, arXiv 1804.04235.
    """
    batch_axes = {} if params is None else _batch_axes(params)

    def moments_of_array(path: str, name: str, array: Shaped) -> str:
        """Returns "factored" or "whole", for an array's second moments."""
        axes_by_size = sorted(range(array.ndim), key=lambda axis: array.shape[axis])
        has_large_batch = set(axes_by_size[-2:]) & batch_axes.get((path, name), set())
        return "whole" if has_large_batch else "factored"

    def clip_update(path: str, name: str, update: jax.Array) -> jax.Array:
        array_batch_axes = batch_axes.get((path, name), set())
        matrix_axes = tuple(axis for axis in range(update.ndim) if axis not in array_batch_axes)
        rms = jnp.sqrt(jnp.mean(update * update, axis=matrix_axes, keepdims=True))
        return update / jnp.maximum(1, rms / _MAX_RMS)

    factored = optax.partition(
        {
            "factored": optax.scale_by_factored_rms(min_dim_size_to_factor=_MIN_FACTORED_SIZE),
            "whole": optax.scale_by_factored_rms(factored=False),
        },
        lambda adapter: map_parts(moments_of_array, adapter),
    )
    clip = optax.stateless(lambda updates, _: map_parts(clip_update, updates))
    return optax.chain(factored, clip)


def _batch_axes(params: Tree) -> dict[tuple[str, str], set[int]]:
    """Returns the layer and expert axes of each trained array."""
    batch_axes: dict[tuple[str, str], set[int]] = {}
    for path, node in nodes_of(params).items():
        for name, array in node.parts().items():
            if not isinstance(node, LoraWeight):
                batch_axes[path, name] = set(range(array.ndim - 2))  # Flax's convention
                continue
            batch_axes[path, name] = {
                axis
                for axis, axis_of_kernel in enumerate(node.layout(name))
                if axis_of_kernel >= 0 and node.labels[axis_of_kernel] == "batch"
            }
    return batch_axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedOptimizer:
    """An entry of the optimiser table.

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
    """Returns Adam's transformation without the first moment, which averaging replaces."""
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
        raise ValueError(f"there is no optimizer {name!r}. Choose one of {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[name]


def settings(name: str, values: Mapping[str, float | None]) -> dict[str, float]:
    """Returns an optimiser's options: the given values, else the defaults.

    Raises:
      ValueError: it does not read an option with a value, or there is no optimiser of this name.
    """
    defaults = optimizer_named(name).options
    user_values = {option: value for option, value in values.items() if value is not None}
    unread_options = sorted(set(user_values) - set(defaults))
    if unread_options:
        option_list = ", ".join(defaults) or "none"
        raise ValueError(
            f"{name} does not read {', '.join(unread_options)}. Remove it, or use one of the "
            f"options of {name}: {option_list}."
        )
    return {**defaults, **user_values}
