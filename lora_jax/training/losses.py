"""The contract of a loss; the cross entropy of language models, at once or over chunks."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

Logits = Callable[..., jax.Array]
Reduction = Literal["mean", "sum"]

# The entries of a line of metrics beside the logs of a loss.
OWN_METRICS = ("step", "time", "loss", "count", "grad_norm", "lr", "skipped", "tokens_per_s")
HELD_OUT = "eval_"  # before the names of metrics on held-out data
SCORE = "score_"  # before the names of a task's own scores


class Sums(NamedTuple):
    """Holds the sums of a loss over a batch.

    Attributes:
      total: the loss, fp32 []; the only sum that is differentiated.
      count: the number of units (tokens, texts, pairs) that count, fp32 [].
      logs: further sums by name, fp32 []; each is logged divided by `count`.
    """

    total: jax.Array
    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    logs: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Loss:
    """Sums a loss over a batch, and says who divides the sum.

    With "mean", a step divides total and gradient once, by the count of all its accumulated parts
    on all devices, so that accumulation equals the large batch. With "sum", they stay sums: for a
    loss that has divided already, or whose learning rate is meant for sums.

    Attributes:
      sums: called as ``sums(forward, params, batch, dropout_key)``; ``params`` are adapted, and
        ``dropout_key`` is None without dropout.
      reduction: "mean" or "sum".
      unit: what `Sums.count` counts, for people to read.
    """

    sums: Callable[[Logits, Any, dict[str, Any], jax.Array | None], Sums]
    reduction: Reduction = "mean"
    unit: str = "token"

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f'reduction is "mean" or "sum", not {self.reduction!r}')

    def __call__(
        self,
        forward: Logits,
        params: Any,
        batch: dict[str, Any],
        dropout_key: jax.Array | None = None,
    ) -> Sums:
        """Returns the sums of a batch, in fp32.

        Raises:
          TypeError: `sums` returned no `Sums`.
          ValueError: one of them is no scalar, or a log has the name of another metric.
        """
        sums = self.sums(forward, params, batch, dropout_key)
        if not isinstance(sums, Sums):
            raise TypeError(f"a loss returns Sums(total, count, logs), not {type(sums).__name__}")
        if taken := [
            name for name in sums.logs if name in OWN_METRICS or name.startswith((HELD_OUT, SCORE))
        ]:
            raise ValueError(f"the log {taken[0]!r} has the name of another metric: rename it")
        named = {"total": sums.total, "count": sums.count, **sums.logs}
        if shaped := [name for name, value in named.items() if jnp.shape(value)]:
            shape = jnp.shape(named[shaped[0]])
            raise ValueError(f"{shaped[0]!r} has the shape {shape}: sum it over the batch")
        return jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), sums)

    @property
    def label(self) -> str:
        """Returns the name of the logged loss, for an axis."""
        return f"loss a {self.unit}" if self.reduction == "mean" else "loss"


def summed_loss(
    forward: Logits,
    params: Any,
    batch: dict[str, Any],
    dropout_key: jax.Array | None = None,
    *,
    chunk: int = 0,
    parts: int = 1,
) -> Sums:
    """Sums the cross entropy of a batch, in nats, over the tokens that count.

    Each token's is multiplied by its weight, which may be negative (an advantage, unlikelihood).
    Tokens whose weight is not zero are counted.

    With `chunk`, logits and their gradient exist for so many predictions at a time, never as
    [batch, m, vocab]: the head runs once more for each chunk in the backward pass. A chunk takes
    the same places of all rows (at least one), so that a batch stays spread over devices.

    Where a row is split over several devices, hidden states stay where they are: the head gets all
    of them, not those alone that predict something, and a chunk takes the same places of each part.

    Args:
      forward: a model's ``apply``, adapted or not: called as ``forward({"params": params}, ids,
        positions=…, segment_ids=…, logits_at=…)`` it gives logits [batch, m, vocab]. For chunks,
        ``return_hidden=True`` gives [batch, m, d_model], and ``method="head"`` logits of those.
      params: a parameter tree, adapted or plain.
      batch: arrays [batch, seq] and [batch, m]; see `lora_jax.training.batches.Packs`.
      dropout_key: turns dropout on.
      chunk: predictions a chunk; 0 for all at once.
      parts: the parts that a row is split into, each on a device. With several, a place may
        predict one token only, not counting those of weight 0.

    Returns:
      The sums, without logs: an accuracy would take another pass over the vocabulary.
    """
    variables = {"params": params}
    where = {name: batch[name] for name in ("positions", "segment_ids")} | _dropout(dropout_key)
    targets, weights = batch["targets"], batch["weights"].astype(jnp.float32)
    count = number_of_units(weights)
    if parts == 1:
        where["logits_at"] = batch["predict_at"]
    else:
        targets, weights = _spread(targets, weights, batch["predict_at"], batch["ids"].shape[1])
    n_chunks = number_of_chunks(targets.shape, chunk, parts)
    if n_chunks == 1:
        logits = forward(variables, batch["ids"], **where)  # [batch, m, vocab]
        return Sums(_cross_entropy(logits, targets, weights), count, {})
    hidden = forward(variables, batch["ids"], return_hidden=True, **where)  # [batch, m, d_model]

    def add(total: jax.Array, xs: Any) -> tuple[jax.Array, None]:
        index, hidden, targets, weights = xs
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        logits = forward(variables, hidden, method="head", **_dropout(key))  # [batch, c, vocab]
        return total + _cross_entropy(logits, targets, weights), None

    chunks = (_in_chunks(array, n_chunks, parts) for array in (hidden, targets, weights))
    # Inside a scan, nothing can be merged with the forward pass: the barrier would only cost.
    body = jax.checkpoint(add, prevent_cse=False)
    total, _ = jax.lax.scan(body, jnp.float32(0), (jnp.arange(n_chunks), *chunks))
    return Sums(total, count, {})


def _dropout(key: jax.Array | None) -> dict[str, jax.Array]:
    return {} if key is None else {"dropout_key": key}


def _cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return jnp.sum(losses * weights)


CROSS_ENTROPY = Loss(summed_loss)


def number_of_units(weights: jax.Array) -> jax.Array:
    """Returns how many weights are not zero, fp32 [].

    >>> from lora_jax import training
    >>> float(training.number_of_units(jnp.array([1.0, 0.0, -0.5])))
    2.0
    """
    return jnp.sum(weights != 0).astype(jnp.float32)


def number_of_chunks(shape: tuple[int, ...], chunk: int, parts: int = 1) -> int:
    """Returns how many chunks predictions of `shape`, [batch, m], make; see `summed_loss`."""
    batch, m = shape
    if not chunk:
        return 1
    return -(-m // (parts * max(1, chunk // (batch * parts))))


def _spread(
    targets: jax.Array, weights: jax.Array, places: jax.Array, seq: int
) -> tuple[jax.Array, jax.Array]:
    """Returns targets and weights at the places, [batch, m], that predict them: [batch, seq]."""

    def at_places(x: jax.Array) -> jax.Array:
        rows = jnp.arange(x.shape[0])[:, None]
        return jnp.zeros((x.shape[0], seq), x.dtype).at[rows, places].add(x)

    # Padding has weight 0; it is all at place 0.
    return at_places(jnp.where(weights == 0, 0, targets)), at_places(weights)


def _in_chunks(array: jax.Array, n: int, parts: int) -> jax.Array:
    """Reshapes [batch, m, …] to [n, batch, parts * ceil(m / (n * parts)), …], filled with zeros."""
    batch, m = array.shape[:2]
    size = -(-m // (n * parts))
    missing = n * parts * size - m
    filled = jnp.pad(array, [(0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)])
    chunks = jnp.moveaxis(filled.reshape(batch, parts, n, size, *array.shape[2:]), 2, 0)
    return chunks.reshape(n, batch, parts * size, *array.shape[2:])
