"""Labelled texts as arrays, the loss, and what a model makes of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.training.batches import Batch, Examples
from lora_jax.training.losses import Sums, number_of_units


@dataclasses.dataclass(frozen=True)
class Labelled(Examples):
    """Texts ready to be batched, int32.

    Attributes:
      ids: [n, seq], tokens.
      attention_mask: [n, seq], 0 for padding.
      token_type_ids: [n, seq], 1 in the second text of a pair, for models that tell them apart.
      labels: [n], indices of classes.
      weights: [n].
    """

    ids: np.ndarray
    attention_mask: np.ndarray
    token_type_ids: np.ndarray
    labels: np.ndarray

    def tokens(self, batch: Batch) -> int:
        """Returns the number of tokens in a batch, without padding."""
        return int(batch["attention_mask"].sum())


def logits_of(
    forward: Callable[..., jax.Array], params: Any, batch: dict[str, Any], **options: Any
) -> jax.Array:
    """The logits of a batch's classes: [batch, classes], fp32."""
    return forward(
        {"params": params},
        batch["ids"],
        attention_mask=batch["attention_mask"],
        token_type_ids=batch["token_type_ids"],
        **options,
    ).astype(jnp.float32)


def classification_loss(
    forward: Callable[..., jax.Array],
    params: Any,
    batch: dict[str, Any],
    dropout_key: jax.Array | None = None,
) -> Sums:
    """Sums the cross entropy of a batch's classes, in nats, over the texts that count.

    Each text's is multiplied by its weight, which may be negative. Texts whose weight is not zero
    are counted.

    Args:
      forward: a classifier's ``apply``, adapted or not; see `logits_of`.
      params: a parameter tree, adapted or plain.
      batch: arrays [batch, …]; see `Labelled`.
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


def predict(model: Any, params: Any, examples: Labelled, batch_size: int) -> np.ndarray:
    """The probability of each class for each text, by `params` (plain): [n, classes]."""

    def probabilities(params: Any, batch: dict[str, Any]) -> jax.Array:
        return jax.nn.softmax(logits_of(model.apply, params, batch))

    run = jax.jit(probabilities)
    parts = [np.asarray(run(params, part)) for part in examples.parts(batch_size)]
    return np.concatenate(parts)[: len(examples)]
