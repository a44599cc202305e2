"""Learning rate schedules: a warmup, and a decay."""

from typing import Literal

import jax.numpy as jnp
import optax

ScheduleKind = Literal["constant", "linear", "cosine", "wsd", "inverse-sqrt"]
DECAY = 0.2  # of a run's steps, for "wsd"


def warmed_up(
    rate: float,
    steps: int,
    *,
    kind: ScheduleKind = "cosine",
    warmup: int = 3,
    floor: float = 0.0,
    decay: float = DECAY,
) -> optax.Schedule:
    """Returns a learning rate schedule with a linear warmup, followed by a decay of `kind`.

    The warmup's first step has rate / warmup rather than 0, so that no step is lost. After it:

    - "constant": `rate`.
    - "linear", "cosine": down to ``floor * rate``, over all steps that are left.
    - "wsd" (warmup, stable, decay): `rate`, and linearly down to ``floor * rate`` over the last
      steps, a share `decay` of all (Hu et al., *MiniCPM*, arXiv 2404.06395, section 4).
    - "inverse-sqrt": rate · sqrt(w / n) at step n, w being the warmup, 1 at least (Vaswani et al.,
      arXiv 1706.03762, section 5.3).

    Args:
      rate: the highest learning rate.
      steps: number of steps of the whole run.
      kind: the way the rate falls after the warmup.
      warmup: steps over which the rate rises; one at least is left after it.
      floor: the last learning rate, as a share of `rate`.
      decay: share of the steps over which the rate of "wsd" falls.

    Raises:
      ValueError: there is no such kind.

    >>> from lora_jax import training
    >>> schedule = training.warmed_up(1e-3, 100, kind="linear", warmup=10)
    >>> round(float(schedule(10)), 6)
    0.001
    """
    warmup = min(warmup, steps - 1)
    main_steps = steps - warmup
    last_rate = floor * rate
    if kind == "constant":
        main_schedule = optax.constant_schedule(rate)
    elif kind == "linear":
        main_schedule = optax.linear_schedule(rate, last_rate, main_steps)
    elif kind == "cosine":
        main_schedule = optax.cosine_decay_schedule(rate, main_steps, alpha=floor)
    elif kind == "wsd":
        decay_steps = min(max(1, round(decay * steps)), main_steps)
        stable_steps = main_steps - decay_steps
        main_schedule = optax.linear_schedule(
            rate, last_rate, decay_steps, transition_begin=stable_steps
        )
    elif kind == "inverse-sqrt":
        main_schedule = _inverse_sqrt(rate, max(warmup, 1))
    else:
        raise ValueError(f"there is no schedule {kind!r}")
    if not warmup:
        return main_schedule
    warmup_schedule = optax.linear_schedule(rate / warmup, rate, max(warmup - 1, 1))
    return optax.join_schedules([warmup_schedule, main_schedule], [warmup])


def _inverse_sqrt(rate: float, warmup: int) -> optax.Schedule:
    """Returns rate · sqrt(warmup / n), n being the steps since the warmup began."""

    def schedule(count: optax.Params) -> optax.Params:
        return rate / jnp.sqrt(1 + jnp.asarray(count, jnp.float32) / warmup)

    return schedule
