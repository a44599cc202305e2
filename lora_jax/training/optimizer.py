"""AdamW for an adapter, its schedule, and what an adapted tree says of its training."""

import re
from typing import Any, Literal

import optax

import lora_jax as lj
from lora_jax.paths import flatten_with_paths
from lora_jax.weight import LoraWeight, is_node

ScheduleKind = Literal["constant", "linear", "cosine"]


def warmed_up(
    rate: float, steps: int, *, kind: ScheduleKind = "cosine", warmup: int = 3
) -> optax.Schedule:
    """Returns a schedule: linear from 0 over the warmup, then constant, or down to 0 at `steps`.

    The warmup's first step already has rate / warmup, so that no step is lost.

    Args:
      rate: the highest learning rate.
      steps: of the whole run.
      kind: the way the rate falls after the warmup.
      warmup: steps over which the rate rises; one at least is left after it.

    >>> from lora_jax import training
    >>> schedule = training.warmed_up(1e-3, 100, kind="linear", warmup=10)
    >>> round(float(schedule(10)), 6)
    0.001
    """
    warmup = min(warmup, steps - 1)
    left = steps - warmup
    after = {
        "constant": optax.constant_schedule(rate),
        "linear": optax.linear_schedule(rate, 0.0, left),
        "cosine": optax.cosine_decay_schedule(rate, left),
    }[kind]
    if not warmup:
        return after
    rise = optax.linear_schedule(rate / warmup, rate, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def adamw(
    schedule: optax.Schedule,
    params: Any = None,
    *,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    grad_clip: float = 1.0,
    lora_plus: float | None = None,
) -> optax.GradientTransformation:
    """Returns AdamW with the gradient clipped to a norm; norms and biases do not decay.

    Args:
      schedule: the learning rate at each step.
      params: the adapted tree; needed where A is frozen, for B's gradient to be projected.
      b2: Adam's memory of squared gradients.
      weight_decay: of A, B and kernels.
      grad_clip: the largest norm of the gradient; 0 for no limit.
      lora_plus: B learns so many times as fast as A (LoRA+).

    >>> from lora_jax import training
    >>> tree = lj.lorafy({"kernel": jnp.ones((4, 3))}, [lj.LoraRule(targets=["kernel"], rank=2)])
    >>> optimizer = training.adamw(optax.constant_schedule(1e-3), tree)
    """
    parts = [optax.clip_by_global_norm(grad_clip)] if grad_clip else []
    if any("a" in weight.frozen for weight in _adapted(params)):
        parts.append(lj.optim.project_b(params))
    parts.append(optax.adamw(schedule, b2=b2, weight_decay=weight_decay, mask=decays))
    if lora_plus is not None:
        parts.append(lj.optim.lora_plus(lora_plus))
    return optax.chain(*parts)


def decays(adapter: dict[str, dict[str, Any]]) -> dict[str, dict[str, bool]]:
    """Returns which arrays of an adapter weight decay applies to: A and B, kernels, embeddings."""

    def is_matrix(path: str, name: str) -> bool:
        if name == "value":
            return re.search(r"(^|/)(kernel|embedding|w)$", path) is not None
        return name in ("a", "b")

    return {path: {name: is_matrix(path, name) for name in p} for path, p in adapter.items()}


def takes_from_base(params: Any) -> bool:
    """Returns whether an adapter started from what the base holds, which takes a decomposition."""
    return any(weight.start is not None for weight in _adapted(params))


def has_dropout(params: Any) -> bool:
    """Returns whether an adapter's input is dropped in training."""
    return any(weight.dropout > 0 for weight in _adapted(params))


def _adapted(params: Any) -> list[LoraWeight]:
    leaves, _ = flatten_with_paths(params, is_leaf=is_node)
    return [leaf for _, leaf in leaves if isinstance(leaf, LoraWeight)]
