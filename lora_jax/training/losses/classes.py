"""Cross entropy of a classifier, and the loss of a reward model, in nats."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.core.types import Batch, Tree
from lora_jax.training.losses.contract import Loss, Sums, number_of_units

_TEXT_ARRAYS = ("ids", "attention_mask", "token_type_ids")


def logits_of(
    forward: Callable[..., jax.Array], params: Tree, batch: Batch, **options: Any
) -> jax.Array:
    """Returns the class logits of a batch's texts or images: [batch, classes], fp32."""
    if "pixel_values" in batch:
        logits = forward({"params": params}, batch["pixel_values"], **options)
    else:
        logits = forward(
            {"params": params},
            batch["ids"],
            attention_mask=batch["attention_mask"],
            token_type_ids=batch["token_type_ids"],
            **options,
        )
    return logits.astype(jnp.float32)


def classification_loss(
    forward: Callable[..., jax.Array],
    params: Tree,
    batch: Batch,
    dropout_key: jax.Array | None = None,
) -> Sums:
    """Sums the cross entropy over the counted texts or images of a batch, in nats.

    The cross entropy of each text or image is multiplied by its weight, which may be negative.
    Those whose weight is not zero are counted.

    Args:
      forward: a classifier's ``apply``, adapted or not; see `logits_of`.
      params: a parameter tree, adapted or plain.
      batch: arrays [batch, …]; see `lora_jax.training.Labelled` and `lora_jax.training.Images`.
      dropout_key: turns dropout on.

    Returns:
      The sums. `logs` has "accuracy", the number of those counted whose label has the largest
      logit.
    """
    dropout = {} if dropout_key is None else {"dropout_key": dropout_key}
    logits = logits_of(forward, params, batch, **dropout)
    labels = batch["labels"]
    weights = batch["weights"].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    is_correct = jnp.argmax(logits, axis=-1) == labels
    n_correct = number_of_units(jnp.where(is_correct, weights, 0))
    return Sums(jnp.sum(losses * weights), number_of_units(weights), {"accuracy": n_correct})


def comparison_loss(
    forward: Callable[..., jax.Array],
    params: Tree,
    batch: Batch,
    dropout_key: jax.Array | None = None,
) -> Sums:
    """Sums -log σ(s - r) over pairs; s scores the chosen text, r the rejected one.

    The model of Bradley and Terry (1952): σ(s - r) is the probability that s is chosen. TRL's
    RewardTrainer has the same loss.

    Args:
      forward: the ``apply`` of a classifier of one class, adapted or not.
      params: a parameter tree, adapted or plain.
      batch: arrays [batch, …]; see `lora_jax.training.comparisons`.
      dropout_key: turns dropout on.

    Returns:
      The sums. `logs` has "margin", the sum of s - r, and "accuracy", the number of pairs whose
      chosen text has the higher score.
    """
    dropout = {} if dropout_key is None else {"dropout_key": dropout_key}
    margin = pair_margins(forward, params, batch, **dropout)
    weights = batch["weights"].astype(jnp.float32)
    logs = {
        "margin": jnp.sum(jnp.where(weights != 0, margin, 0)),
        "accuracy": number_of_units(jnp.where(margin > 0, weights, 0)),
    }
    total = -jnp.sum(jax.nn.log_sigmoid(margin) * weights)
    return Sums(total, number_of_units(weights), logs)


def pair_margins(
    forward: Callable[..., jax.Array], params: Tree, batch: Batch, **dropout: jax.Array
) -> jax.Array:
    """Returns each chosen text's score minus the rejected one's; see `comparison_loss`.

    Args:
      forward: the ``apply`` of a classifier of one class, adapted or not.
      params: a parameter tree, adapted or plain.
      batch: arrays [batch, 2, …]; see `lora_jax.training.comparisons`.
      **dropout: the key `dropout_key`, which turns dropout on.

    Returns:
      Float array [batch].
    """
    texts = {}  # [2 * batch, seq] each
    for name in _TEXT_ARRAYS:
        texts[name] = batch[name].reshape(-1, batch[name].shape[-1])
    scores = logits_of(forward, params, texts, **dropout).reshape(-1, 2)
    return scores[:, 0] - scores[:, 1]


CLASSES = Loss(classification_loss, unit="text")
IMAGES = Loss(classification_loss, unit="image")
COMPARISONS = Loss(comparison_loss, unit="pair")
