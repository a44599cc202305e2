"""The optimiser and its schedule: defaults and checks of their options, and what these make."""

import dataclasses
import math
from typing import Any

import optax

from lora_jax.bank.together.tenants import Tenant
from lora_jax.training import optimizer as training
from lora_jax.training.losses import Loss
from lora_jax.training.optimizers.muon import described
from lora_jax.training.optimizers.named import OPTIMIZERS
from lora_jax.training.optimizers.schedules import warmed_up
from train.console.errors import UserError


def fill_optimizer_defaults(optim: Any, *, lr: float, beta2: float) -> Any:
    """Fills in the defaults of the optimiser's options and of its learning rate.

    Args:
      optim: the options.
      lr: AdamW's learning rate.
      beta2: Adam's decay rate of the squared gradients.
    """
    traits = OPTIMIZERS[optim.optimizer]
    defaults: dict[str, Any] = {**traits.options}
    if "eps" in defaults:  # Adam, with averages or without
        defaults["beta2"] = beta2
    if optim.lr_rule is None and traits.rate is not None:
        defaults["lr"] = traits.rate * lr
    changes = {name: value for name, value in defaults.items() if getattr(optim, name) is None}
    if traits.averages:
        changes["schedule"] = "constant"
    return dataclasses.replace(optim, **changes)


def warmup_steps(optim: Any, steps: int) -> int:
    """Returns the number of warmup steps, a share of all steps rounded up as in transformers."""
    if optim.warmup_ratio is None:
        return optim.warmup
    return math.ceil(optim.warmup_ratio * steps)


def check_optim(optim: Any) -> None:
    """Raises a UserError if the options of optimiser and schedule contradict each other."""
    if optim.lr_rule is not None and optim.optimizer != "adamw":
        raise UserError(
            f"--lr-rule was fitted to Adam, not {optim.optimizer} (--optimizer). Pass --lr instead."
        )
    if optim.lr is None and optim.lr_rule is None:
        raise UserError(
            f"--optimizer {optim.optimizer} has no default learning rate, since its steps scale "
            "with the gradient. Pass --lr."
        )
    if optim.lr is not None and optim.lr_rule is not None:
        raise UserError("--lr and --lr-rule both set the learning rate. Remove one of them.")
    if OPTIMIZERS[optim.optimizer].averages and not optim.beta1:
        raise UserError(
            f"--optimizer {optim.optimizer} needs a positive --beta1, but it is 0. Pass a number "
            "between 0 and 1."
        )


def make_schedule(optim: Any, rate: float, steps: int) -> optax.Schedule:
    """Returns the learning rate at each step; see `lora_jax.training.warmed_up`.

    Args:
      optim: the options.
      rate: the highest learning rate.
      steps: number of steps of the whole run.
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
    optim: Any, schedule: optax.Schedule, params: Any = None
) -> optax.GradientTransformation:
    """Returns the optimiser that the options describe; see `lora_jax.training.make_optimizer`."""
    return training.make_optimizer(optim.optimizer, schedule, params, **_optimizer_settings(optim))


def make_tenant(
    optim: Any, params: Any, schedule: optax.Schedule, steps: int, *, loss: Loss, key: Any
) -> Tenant:
    """Returns the record of an adapter that trains beside others, with the optimiser of options."""
    return Tenant(
        params=params,
        schedule=schedule,
        steps=steps,
        loss=loss,
        optimizer=optim.optimizer,
        **_optimizer_settings(optim),
        noise=optim.neftune,
        key=key,
    )


def optimizer_line(optim: Any, params: Any) -> str:
    """Returns the log line of an optimiser, such as "optimizer: lion (beta1 0.9, beta2 0.99)"."""
    line = f"optimizer: {optim.optimizer}"
    options = ", ".join(
        f"{name} {value:g}" for name, value in _values_of_optimizer_options(optim).items()
    )
    if options:
        line += f" ({options})"
    if optim.optimizer == "muon":
        line += f"; {described(params)}"
    return line


def _optimizer_settings(optim: Any) -> dict[str, Any]:
    """Returns the settings of an optimiser besides its name, schedule and parameters."""
    shared = {name: getattr(optim, name) for name in ("weight_decay", "grad_clip", "lora_plus")}
    return {**shared, "options": _values_of_optimizer_options(optim)}


def _values_of_optimizer_options(optim: Any) -> dict[str, float]:
    """Returns the options that the optimiser reads, with their values."""
    names = OPTIMIZERS[optim.optimizer].options
    values = {name: getattr(optim, name) for name in names}
    assert None not in values.values(), "the options have no defaults yet"
    return values
