"""Optimiser and schedule from their options."""

from typing import Any

import optax

from lora_jax.bank.together.tenants import Tenant
from lora_jax.training import optimizer as training
from lora_jax.training.losses import Loss
from lora_jax.training.optimizers.muon import described
from lora_jax.training.optimizers.named import OPTIMIZERS
from lora_jax.training.optimizers.schedules import warmed_up
from train.run.options.common import OptimConfig
from train.run.options.optim import warmup_steps


def make_schedule(optim: OptimConfig, rate: float, steps: int) -> optax.Schedule:
    """Returns the learning rate at each step; see `lora_jax.training.warmed_up`.

    Args:
      optim: the options.
      rate: the highest learning rate.
      steps: of the whole run.
    """
    return warmed_up(
        rate,
        steps,
        kind=optim.schedule,
        warmup=warmup_steps(optim, steps),
        floor=optim.min_lr,
        decay=optim.decay,
    )


def make_optimizer(
    optim: OptimConfig, schedule: optax.Schedule, params: Any = None
) -> optax.GradientTransformation:
    """Returns the optimiser that the options describe; see `lora_jax.training.make_optimizer`."""
    return training.make_optimizer(
        optim.optimizer,
        schedule,
        params,
        weight_decay=optim.weight_decay,
        grad_clip=optim.grad_clip,
        lora_plus=optim.lora_plus,
        options=_options(optim),
    )


def make_tenant(
    optim: OptimConfig, params: Any, schedule: optax.Schedule, steps: int, *, loss: Loss, key: Any
) -> Tenant:
    """Returns an adapter that trains beside others, by the optimiser that the options describe."""
    return Tenant(
        params=params,
        schedule=schedule,
        steps=steps,
        loss=loss,
        optimizer=optim.optimizer,
        weight_decay=optim.weight_decay,
        grad_clip=optim.grad_clip,
        lora_plus=optim.lora_plus,
        options=_options(optim),
        noise=optim.neftune,
        key=key,
    )


def optimizer_line(optim: OptimConfig, params: Any) -> str:
    """Returns a line that tells the optimiser: "optimizer: lion (beta1 0.9, beta2 0.99)"."""
    options = ", ".join(f"{name} {value:g}" for name, value in _options(optim).items())
    said = f"optimizer: {optim.optimizer}" + f" ({options})" * bool(options)
    return f"{said}; {described(params)}" if optim.optimizer == "muon" else said


def _options(optim: OptimConfig) -> dict[str, float]:
    """Returns the options that the optimiser reads, with their values."""
    names = OPTIMIZERS[optim.optimizer].options
    given = {name: getattr(optim, name) for name in names}
    assert None not in given.values(), "the options have no defaults yet"
    return given
