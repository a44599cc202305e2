"""Losses of language models, which are sums over tokens, at once or over chunks of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.core.types import Batch, Tree
from lora_jax.training.losses.contract import Logits, Loss, Sums, number_of_units

# Maps logits, fp32 [..., vocab], and targets, int32 [...], to the loss of each: fp32 [...].
Each = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns -log p of each target p, fp32 [...].

    Args:
      logits: fp32 [..., vocab].
      targets: int32 [...].
    """
    nll: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return nll


def dft(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns -sg(p) log p of each target with probability p, fp32 [...].

    sg stops the gradient: it is p times the gradient of the cross entropy, and small where a target
    is unlikely (Wu et al., "On the Generalization of SFT", arXiv 2508.05629).

    Args:
      logits: fp32 [..., vocab].
      targets: int32 [...].
    """
    losses = cross_entropy(logits, targets)
    return losses * jax.lax.stop_gradient(jnp.exp(-losses))


class TokenLoss(NamedTuple):
    """A loss of tokens that has a name.

    Attributes:
      each: the loss of each token.
      about: says what it is, for a list of such losses.
    """

    each: Each
    about: str


DEFAULT = "cross-entropy"
TOKEN_LOSSES = {  # by the names of `train.sft --loss`
    DEFAULT: TokenLoss(cross_entropy, "minus the log of the token's probability"),
    "dft": TokenLoss(
        dft,
        "cross-entropy times the token's probability, a constant to the gradient, so that "
        "unlikely targets do not dominate (Dynamic Fine-Tuning)",
    ),
}


_WHERE = ("positions", "segment_ids", "pixel_values")  # what a model gets beside the tokens


def token_values(
    each: Callable[[jax.Array, jax.Array], Tree],
    forward: Logits,
    params: Tree,
    batch: Batch,
    dropout_key: jax.Array | None = None,
    *,
    chunk: int = 0,
    parts: int = 1,
) -> Any:
    """Returns values of each token that a batch predicts.

    With `chunk`, logits and their gradient exist for so many predictions at a time, never as
    [batch, m, vocab]: the head runs once more for each chunk in the backward pass. A chunk takes
    the same places of all rows (at least one), so that a batch stays spread over devices.

    Where a row is split over several devices, hidden states stay where they are: the head gets all
    of them, not those alone that predict something, and a chunk takes the same places of each part.

    Args:
      each: returns a tree of values, fp32 [...], of logits, fp32 [..., vocab], and targets, int32
        [...]. (Targets may have further axes, then values may, too.)
      forward: a model's ``apply``, adapted or not: called as ``forward({"params": params}, ids,
        positions=…, segment_ids=…, logits_at=…)`` it gives logits [batch, m, vocab]. For chunks,
        ``return_hidden=True`` gives [batch, m, d_model], and ``method="head"`` logits of those.
      params: a parameter tree, adapted or plain.
      batch: arrays [batch, seq] and [batch, m]; see `Packs`. The model
        gets `pixel_values`, too, where a batch has them.
      dropout_key: turns dropout on.
      chunk: predictions a chunk; 0 for all at once.
      parts: the parts that a row is split into, each on a device. With several, a place may
        predict one token only, not counting those of weight 0, whose values are another token's.

    Returns:
      The tree, [batch, m] each.
    """
    values = _head_values(each, forward, params, batch, dropout_key, chunk, parts)
    if parts == 1:
        return values
    return jax.tree.map(lambda x: jnp.take_along_axis(x, batch["predict_at"], axis=1), values)


def sum_over_tokens(
    each: Each,
    forward: Logits,
    params: Tree,
    batch: Batch,
    dropout_key: jax.Array | None = None,
    *,
    chunk: int = 0,
    parts: int = 1,
) -> Sums:
    """Sums a loss of a batch over the tokens that count.

    Each token's is multiplied by its weight, which may be negative (an advantage, unlikelihood).
    Tokens whose weight is not zero are counted.

    Args:
      each: the loss of each token.
      forward, params, batch, dropout_key, chunk, parts: see `token_values`.

    Returns:
      The sums, without logs: an accuracy would take another pass over the vocabulary.
    """
    weights = batch["weights"].astype(jnp.float32)
    losses = _head_values(each, forward, params, batch, dropout_key, chunk, parts)
    placed = (
        weights if parts == 1 else _place_at_predictors(weights, batch)
    )  # no value moves over devices
    return Sums(jnp.sum(losses * placed), number_of_units(weights), {})


def _head_values(
    each: Callable[[jax.Array, jax.Array], Tree],
    forward: Logits,
    params: Tree,
    batch: Batch,
    dropout_key: jax.Array | None,
    chunk: int,
    parts: int,
) -> Any:
    """Returns the values of `token_values`; those of split rows where they lie: [batch, seq]."""
    variables, targets = {"params": params}, batch["targets"]
    where = {name: batch[name] for name in _WHERE if name in batch} | _dropout(dropout_key)
    if parts == 1:
        where["logits_at"] = batch["predict_at"]
    else:  # padding has weight 0; it is all at place 0
        targets = _place_at_predictors(jnp.where(batch["weights"] == 0, 0, targets), batch)
    n_chunks = number_of_chunks(targets.shape[:2], chunk, parts)
    if n_chunks == 1:
        logits = forward(variables, batch["ids"], **where)  # [batch, m, vocab]
        return each(logits.astype(jnp.float32), targets)
    hidden = forward(variables, batch["ids"], return_hidden=True, **where)  # [batch, m, d_model]

    def chunk_values(_: None, xs: Any) -> tuple[None, Any]:
        index, hidden, targets = xs
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        logits = forward(variables, hidden, method="head", **_dropout(key))  # [batch, c, vocab]
        return None, each(logits.astype(jnp.float32), targets)

    chunks = (_split_chunks(array, n_chunks, parts) for array in (hidden, targets))
    # Inside a scan, nothing can be merged with the forward pass: the barrier would only cost.
    body = jax.checkpoint(chunk_values, prevent_cse=False)
    _, values = jax.lax.scan(body, None, (jnp.arange(n_chunks), *chunks))
    return jax.tree.map(lambda x: _join_chunks(x, parts)[:, : targets.shape[1]], values)


def _dropout(key: jax.Array | None) -> dict[str, jax.Array]:
    return {} if key is None else {"dropout_key": key}


def number_of_chunks(shape: tuple[int, ...], chunk: int, parts: int = 1) -> int:
    """Returns the number of chunks of predictions of `shape`, [batch, m]; see `token_values`."""
    batch, m = shape
    if not chunk:
        return 1
    return -(-m // (parts * max(1, chunk // (batch * parts))))


def _place_at_predictors(x: jax.Array, batch: Batch) -> jax.Array:
    """Returns values, [batch, m], at the places that predict them: [batch, seq]."""
    rows = jnp.arange(x.shape[0])[:, None]
    return jnp.zeros(batch["ids"].shape, x.dtype).at[rows, batch["predict_at"]].add(x)


def _split_chunks(array: jax.Array, n: int, parts: int) -> jax.Array:
    """Reshapes [batch, m, …] to [n, batch, parts * ceil(m / (n * parts)), …], filled with zeros."""
    batch, m = array.shape[:2]
    size = -(-m // (n * parts))
    missing = n * parts * size - m
    filled = jnp.pad(array, [(0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)])
    chunks = jnp.moveaxis(filled.reshape(batch, parts, n, size, *array.shape[2:]), 2, 0)
    return chunks.reshape(n, batch, parts * size, *array.shape[2:])


def _join_chunks(chunks: jax.Array, parts: int) -> jax.Array:
    """Inverts `_split_chunks`: [n, batch, parts * size, …] to [batch, parts * n * size, …]."""
    n, batch, places, *rest = chunks.shape
    split = chunks.reshape(n, batch, parts, places // parts, *rest)
    return jnp.moveaxis(split, 0, 2).reshape(batch, n * places, *rest)


summed_loss = functools.partial(sum_over_tokens, cross_entropy)


def token_loss(name: str = DEFAULT, *, chunk: int = 0, parts: int = 1) -> Loss:
    """Returns a loss of tokens; equal arguments give the same object.

    Held-out examples are measured by the cross entropy, whatever the loss, so that runs compare.

    Args:
      name: name of `TOKEN_LOSSES`.
      chunk, parts: see `sum_over_tokens`.
    """
    return _token_loss(name, chunk, parts)


@functools.cache
def _token_loss(name: str, chunk: int, parts: int) -> Loss:
    sums = functools.partial(sum_over_tokens, TOKEN_LOSSES[name].each, chunk=chunk, parts=parts)
    return Loss(sums, measured=None if name == DEFAULT else _token_loss(DEFAULT, chunk, parts))


CROSS_ENTROPY = token_loss()
