"""The cross entropy of a classifier's texts, in nats."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.core.types import Batch, Tree
from lora_jax.training.losses.contract import Loss, Sums, number_of_units


def logits_of(
    forward: Callable[..., jax.Array], params: Tree, batch: Batch, **options: Any
) -> jax.Array:
    """Returns the logits of a batch's classes: [batch, classes], fp32."""
    return forward(
        {"params": params},
        batch["ids"],
        attention_mask=batch["attention_mask"],
        token_type_ids=batch["token_type_ids"],
        **options,
    ).astype(jnp.float32)


def classification_loss(
    forward: Callable[..., jax.Array],
    params: Tree,
    batch: Batch,
    dropout_key: jax.Array | None = None,
) -> Sums:
    """Sums the cross entropy of a batch's classes, in nats, over the texts that count.

    Each text's is multiplied by its weight, which may be negative. Texts whose weight is not zero
    are counted.

    Args:
      forward: a classifier's ``apply``, adapted or not; see `logits_of`.
      params: a parameter tree, adapted or plain.
      batch: arrays [batch, …]; see `lora_jax.training.Labelled`.
      dropout_key: turns dropout on.

    Returns:
      The sums. `logs` has "accuracy", the number of counted texts whose label has the largest
      logit.
    """
    dropout = {} if dropout_key is None else {"dropout_key": dropout_key}
    logits, labels = logits_of(forward, params, batch, **dropout), batch["labels"]
    weights = batch["weights"].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = number_of_units(jnp.where(jnp.argmax(logits, axis=-1) == labels, weights, 0))
    return Sums(jnp.sum(losses * weights), number_of_units(weights), {"accuracy": right})


CLASSES = Loss(classification_loss, unit="text")
