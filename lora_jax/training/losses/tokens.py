"""Losses of language models as sums over tokens, at once or in chunks."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.core.types import Batch, Tree
from lora_jax.models.layers.placement import UNPLACED, Placement
from lora_jax.training.losses.chunks import map_chunks, number_of_chunks, predictions_at_once
from lora_jax.training.losses.contract import Logits, Loss, Sums, number_of_units

# Maps logits, fp32 [..., vocab], and targets, int32 [...], to the loss of each: fp32 [...].
Each = Callable[[jax.Array, jax.Array], jax.Array]


@jax.custom_jvp
def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns -log p of each target p, fp32 [...].

    Args:
      logits: fp32 [..., vocab].
      targets: int32 [...].
    """
    return _cross_entropy_and_log_divisor(logits, targets)[0]


def _cross_entropy_and_log_divisor(
    logits: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the cross entropy of each target and the softmax's log sum."""
    log_divisor: jax.Array = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_divisor - target_logits, log_divisor


@cross_entropy.defjvp
def _cross_entropy_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Computes the gradient as softmax - onehot.

    The gradient of a look-up would be one more array of logits.
    """
    logits, targets = primals
    losses, log_divisor = _cross_entropy_and_log_divisor(logits, targets)
    onehot = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    gradient = jnp.exp(logits - log_divisor[..., None]) - onehot.astype(logits.dtype)
    return losses, jnp.sum(gradient * tangents[0], axis=-1)


def entropy_of(logits: jax.Array) -> jax.Array:
    """Returns the entropy -Σ p log p of each token's logits, fp32 [...]."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


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
    """A named loss of tokens.

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


# A model's inputs beside the tokens.
_MODEL_INPUTS = ("positions", "segment_ids", "branches", "pixel_values", "image_grids", "routing")


def token_values(
    each: Callable[[jax.Array, jax.Array], Tree],
    forward: Logits,
    params: Tree,
    batch: Batch,
    dropout_key: jax.Array | None = None,
    *,
    chunk: int | None = 0,
    parts: int = 1,
    placement: Placement = UNPLACED,
) -> Any:
    """Returns values of each predicted token of a batch.

    With `chunk`, logits and their gradient exist for so many predictions at a time, never as
    [batch, m, vocab]. The gradient of a token's hidden state is computed along with its value, if
    it has one. If the head trains, it runs once more for each chunk in the backward pass. A chunk
    takes the same places of all rows (at least one), so that a batch stays spread over devices.

    Where a row is split over several devices, hidden states stay where they are: the head gets all
    of them, even those that predict nothing, and a chunk takes the same places of each part.

    Args:
      each: returns a tree of values, fp32 [...], of logits, fp32 [..., vocab], and targets, int32
        [...]. (Targets may have further axes, then values may, too.) A `ValueWithFacts` has its
        facts computed along with its value and the gradient of that.
      forward: a model's ``apply``, adapted or not: called as ``forward({"params": params}, ids,
        positions=…, segment_ids=…, logits_at=…)`` it gives logits [batch, m, vocab]. For chunks,
        ``return_hidden=True`` gives [batch, m, d_model], and ``method="head"`` logits of those.
      params: a parameter tree, adapted or plain.
      batch: arrays [batch, seq] and [batch, m]; see `Packs`. The model gets `pixel_values`,
        `image_grids`, `branches` and `routing`, too, where a batch has them. Where completions
        share a prompt, the others may be [batch, completions, n].
      dropout_key: turns dropout on.
      chunk: predictions a chunk; 0 for all at once, None for `predictions_at_once` on each device.
      parts: the parts that a row is split into, each on a device. With several, a place may
        predict one token only, not counting those of weight 0, whose values are another token's.
      placement: the placement on a mesh; the head is gathered once, not once a chunk.

    Returns:
      The tree, [batch, m] each, or as `predict_at` is.
    """
    shape = batch["predict_at"].shape
    batch = _flatten_predictions(batch)
    values = _head_values(each, forward, params, batch, dropout_key, chunk, parts, placement)
    if parts > 1:
        values = jax.tree.map(lambda x: jnp.take_along_axis(x, batch["predict_at"], axis=1), values)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[2:]), values)


def _flatten_predictions(batch: Batch) -> Batch:
    """Returns a batch with one axis for the predictions of each row: [batch, m]."""
    if batch["predict_at"].ndim == 2:
        return batch
    flat_batch = {**batch}
    for name in ("predict_at", "targets", "weights"):
        if name in batch:
            n_rows, _, _, *features = batch[name].shape
            flat_batch[name] = batch[name].reshape(n_rows, -1, *features)
    return flat_batch


def sum_over_tokens(
    each: Each,
    forward: Logits,
    params: Tree,
    batch: Batch,
    dropout_key: jax.Array | None = None,
    *,
    chunk: int | None = 0,
    parts: int = 1,
    placement: Placement = UNPLACED,
) -> Sums:
    """Sums a loss of a batch over the counted tokens.

    The loss of each token is multiplied by its weight, which may be negative (an advantage,
    unlikelihood). Tokens whose weight is not zero are counted.

    Args:
      each: the loss of each token.
      forward, params, batch, dropout_key, chunk, parts, placement: see `token_values`.

    Returns:
      The sums, without logs: an accuracy would take another pass over the vocabulary.
    """
    batch = _flatten_predictions(batch)
    weights = batch["weights"].astype(jnp.float32)
    losses = _head_values(each, forward, params, batch, dropout_key, chunk, parts, placement)
    count = number_of_units(weights)
    if parts > 1:  # the weights move rather than the losses, which stay on their devices
        weights = _place_at_predictors(weights, batch)
    return Sums(jnp.sum(losses * weights), count, {})


def _head_values(
    each: Callable[[jax.Array, jax.Array], Tree],
    forward: Logits,
    params: Tree,
    batch: Batch,
    dropout_key: jax.Array | None,
    chunk: int | None,
    parts: int,
    placement: Placement,
) -> Any:
    """Computes the values of `token_values` from hidden states.

    Rows that are split have their values at the places that predict the tokens: [batch, seq].
    """
    variables = {"params": params}
    targets = batch["targets"]
    options = {name: batch[name] for name in _MODEL_INPUTS if name in batch}
    options |= _dropout_options(dropout_key)
    if parts == 1:
        options["logits_at"] = batch["predict_at"]
    else:  # padding has weight 0; it is all at place 0
        targets = _place_at_predictors(jnp.where(batch["weights"] == 0, 0, targets), batch)
    head_shardings = jax.tree.leaves(placement.head_shardings(params))
    # A head that is gathered goes through the loop, even of one chunk.
    if chunk and not head_shardings and number_of_chunks(targets.shape[:2], chunk, parts) == 1:
        chunk = 0
    if chunk == 0:
        logits = forward(variables, batch["ids"], **options)  # [batch, m, vocab]
        return each(logits.astype(jnp.float32), targets)
    hidden = forward(variables, batch["ids"], return_hidden=True, **options)  # [batch, m, d_model]
    if chunk is None:
        head = functools.partial(forward, method="head")
        words = jax.eval_shape(head, variables, hidden[:, :1]).shape[-1]
        chunk = predictions_at_once(placement, words) * placement.token_parts
    n_chunks = number_of_chunks(targets.shape[:2], chunk, parts)

    def chunk_values(inputs: Any, index: jax.Array, hidden: jax.Array, targets: jax.Array) -> Any:
        params, key = inputs
        key = None if key is None else jax.random.fold_in(key, index)
        logits = forward({"params": params}, hidden, method="head", **_dropout_options(key))
        return each(logits.astype(jnp.float32), targets)  # of [batch, c, vocab]

    return map_chunks(
        chunk_values,
        (params, dropout_key),
        hidden,
        targets,
        n_chunks,
        parts=parts,
        where=head_shardings,
    )


def _dropout_options(key: jax.Array | None) -> dict[str, jax.Array]:
    return {} if key is None else {"dropout_key": key}


def _place_at_predictors(values: jax.Array, batch: Batch) -> jax.Array:
    """Returns values, [batch, m], at the positions that predict them: [batch, seq]."""
    rows = jnp.arange(values.shape[0])[:, None]
    zeros = jnp.zeros(batch["ids"].shape, values.dtype)
    return zeros.at[rows, batch["predict_at"]].add(values)


summed_loss = functools.partial(sum_over_tokens, cross_entropy)


def token_loss(
    name: str = DEFAULT, *, chunk: int | None = 0, parts: int = 1, placement: Placement = UNPLACED
) -> Loss:
    """Returns a loss of tokens, cached by its arguments.

    Held-out examples are measured by the cross entropy, whatever the loss, so that runs compare.

    Args:
      name: name of `TOKEN_LOSSES`.
      chunk, parts, placement: see `token_values`.
    """
    return _token_loss(name, chunk, parts, placement)


@functools.cache
def _token_loss(name: str, chunk: int | None, parts: int, placement: Placement) -> Loss:
    options: dict[str, Any] = {"chunk": chunk, "parts": parts, "placement": placement}
    sums = functools.partial(sum_over_tokens, TOKEN_LOSSES[name].each, **options)
    return Loss(sums, measured=None if name == DEFAULT else token_loss(DEFAULT, **options))


CROSS_ENTROPY = token_loss()
