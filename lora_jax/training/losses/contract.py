"""The contract of a loss: its sums over a batch, and how they are divided."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.core.types import Batch, Tree

Logits = Callable[..., jax.Array]
Reduction = Literal["mean", "sum"]

# The entries of a line of metrics that are no logs of a loss.
OWN_METRICS = ("step", "time", "loss", "count", "grad_norm", "lr", "skipped", "tokens_per_s")
HELD_OUT = "eval_"  # prefix of the metrics on held-out data
UNITS = "_units"  # suffix of the count of a log that has a count of its own
SCORE = "score_"  # prefix of a task's own scores


class Sums(NamedTuple):
    """The sums of a loss over a batch.

    Attributes:
      total: the loss, fp32 []; the only sum that is differentiated.
      count: the number of units (tokens, texts, pairs) that count, fp32 [].
      logs: further sums by name, fp32 []; each is logged divided by `count`, or by its own count.
      log_counts: the own counts of logs, by name, fp32 []: the number of units that such a log is
        about, where it is not about all. A log is left out where its own count is 0.
      tokens: the number of tokens that count, fp32 [], where `count` is another unit's; None where
        `count` tells whether anything counts. A step without a counted token is skipped.
    """

    total: jax.Array
    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    logs: dict[str, jax.Array]
    tokens: jax.Array | None = None
    log_counts: dict[str, jax.Array] | None = None

    def count_of(self, name: str) -> jax.Array:
        """Returns the number of units by which a log is divided."""
        return (self.log_counts or {}).get(name, self.count)


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss as a sum over a batch, with a rule for dividing the sum.

    With "mean", a step divides total and gradient once, by the count of all its accumulated parts
    on all devices, so that accumulation equals the large batch. With "sum", they stay sums: for a
    loss that has divided already, or whose learning rate is meant for sums.

    Attributes:
      sums: called as ``sums(forward, params, batch, dropout_key)``; ``params`` are adapted, and
        ``dropout_key`` is None without dropout.
      reduction: "mean" or "sum".
      unit: what `Sums.count` counts, for people to read.
      measured: the loss to measure on held-out examples; None for this loss.
    """

    sums: Callable[[Logits, Tree, Batch, jax.Array | None], Sums]
    reduction: Reduction = "mean"
    unit: str = "token"
    measured: "Loss | None" = None

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f'reduction is {self.reduction!r}. Pass "mean" or "sum".')

    def __call__(
        self, forward: Logits, params: Tree, batch: Batch, dropout_key: jax.Array | None = None
    ) -> Sums:
        """Returns the sums of a batch, in fp32.

        Raises:
          TypeError: `sums` returned no `Sums`.
          ValueError: one of them is no scalar, or a log has the name of another metric.
        """
        sums = self.sums(forward, params, batch, dropout_key)
        if not isinstance(sums, Sums):
            raise TypeError(
                f"the loss returned {type(sums).__name__}. Return Sums(total, count, logs)."
            )
        for name in sums.logs:
            if name in OWN_METRICS or name.startswith((HELD_OUT, SCORE)):
                raise ValueError(
                    f"the log {name!r} has the name of another metric. Rename the log."
                )
        sum_by_name = {"total": sums.total, "count": sums.count, **sums.logs}
        for name, value in sum_by_name.items():
            shape = jnp.shape(value)
            if shape:
                raise ValueError(
                    f"{name!r} has the shape {shape}, but it must be a scalar. Sum it over the "
                    "batch."
                )
        fp32_sums: Sums = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), sums)
        return fp32_sums

    @property
    def held_out(self) -> "Loss":
        """Returns the loss that is measured on held-out examples."""
        return self.measured or self

    @property
    def label(self) -> str:
        """Returns the name of the logged loss, for an axis."""
        return f"loss per {self.unit}" if self.reduction == "mean" else "loss"


def number_of_units(weights: jax.Array) -> jax.Array:
    """Returns the number of non-zero weights, fp32 [].

    >>> from lora_jax import training
    >>> float(training.number_of_units(jnp.array([1.0, 0.0, -0.5])))
    2.0
    """
    return jnp.sum(weights != 0).astype(jnp.float32)
