"""Losses of language models: cross entropy, over all predictions at once or over chunks of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Logits = Callable[..., jax.Array]
# (forward, params, batch, dropout_key) -> the loss summed over the predictions that count
Loss = Callable[[Logits, Any, dict[str, Any], jax.Array | None], jax.Array]


def summed_loss(
    forward: Logits,
    params: Any,
    batch: dict[str, Any],
    dropout_key: jax.Array | None = None,
    *,
    chunk: int = 0,
) -> jax.Array:
    """The cross entropy of a batch, summed over the tokens that count. fp32 [].

    With `chunk`, logits and their gradient exist for so many predictions at a time, never as
    [batch, m, vocab]: the head runs once more for each chunk in the backward pass. A chunk takes
    the same places of all rows (at least one), so that a batch stays spread over devices.

    Args:
      forward: a model's ``apply``, adapted or not: called as ``forward({"params": params}, ids,
        positions=…, segment_ids=…, logits_at=…)`` it gives logits [batch, m, vocab]. For chunks,
        ``return_hidden=True`` gives [batch, m, d_model], and ``method="head"`` logits of those.
      params: a parameter tree, adapted or plain.
      batch: arrays [batch, seq] and [batch, m]; see `train.batches.Packs`.
      dropout_key: turns dropout on.
      chunk: predictions a chunk; 0, or as many as there are: all at once.
    """
    variables = {"params": params}
    where = {name: batch[name] for name in ("positions", "segment_ids")}
    where |= {"logits_at": batch["predict_at"], **_dropout(dropout_key)}
    targets, weights = batch["targets"], batch["weights"].astype(jnp.float32)
    n_chunks = number_of_chunks(targets.shape, chunk)
    if n_chunks == 1:
        return _cross_entropy(forward(variables, batch["ids"], **where), targets, weights)
    hidden = forward(variables, batch["ids"], return_hidden=True, **where)  # [batch, m, d_model]

    def add(total: jax.Array, xs: Any) -> tuple[jax.Array, None]:
        index, hidden, targets, weights = xs
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        logits = forward(variables, hidden, method="head", **_dropout(key))  # [batch, c, vocab]
        return total + _cross_entropy(logits, targets, weights), None

    chunks = (_in_chunks(array, n_chunks) for array in (hidden, targets, weights))
    # Inside a scan, nothing can be merged with the forward pass: the barrier would only cost.
    body = jax.checkpoint(add, prevent_cse=False)
    total, _ = jax.lax.scan(body, jnp.float32(0), (jnp.arange(n_chunks), *chunks))
    return total


def _dropout(key: jax.Array | None) -> dict[str, jax.Array]:
    return {} if key is None else {"dropout_key": key}


def _cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return jnp.sum(losses * weights)


def number_of_chunks(shape: tuple[int, ...], chunk: int) -> int:
    """How many chunks a batch's predictions, [batch, m], are taken in; see `summed_loss`."""
    batch, m = shape
    if not chunk:
        return 1
    return -(-m // max(1, chunk // batch))


def _in_chunks(array: jax.Array, n: int) -> jax.Array:
    """[batch, m, …] as [n, batch, ceil(m / n), …], filled up with zeros."""
    batch, m = array.shape[:2]
    size = -(-m // n)
    filled = jnp.pad(array, [(0, 0), (0, n * size - m), *[(0, 0)] * (array.ndim - 2)])
    return jnp.moveaxis(filled.reshape(batch, n, size, *array.shape[2:]), 1, 0)
