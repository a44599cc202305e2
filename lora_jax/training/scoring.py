"""The log-probabilities of given tokens, by the forward pass that trains."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lora_jax.core.types import Batch, Tree
from lora_jax.models.layers.placement import UNPLACED, Placement
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Logits, token_values
from lora_jax.training.losses.tokens import cross_entropy, entropy_of


class Scores(NamedTuple):
    """Holds scores of the tokens that a batch predicts, fp32 [batch, m] each.

    Attributes:
      logps: log p of each token.
      entropy: -Σ p log p over the vocabulary, at each token's place.
    """

    logps: jax.Array
    entropy: jax.Array


def make_scorer(
    forward: Logits,
    *,
    layout: Layout | None = None,
    temperature: float = 1.0,
    chunk: int | None = 0,
    parts: int = 1,
    placement: Placement = UNPLACED,
) -> Callable[[Tree, Batch], Scores]:
    """Returns ``(params, batch) -> scores``, compiled for each shape; without dropout or gradient.

    Args:
      forward: see `lora_jax.training.losses.token_values`.
      layout: where parameters and batches lie; by default on one device. Each device gets all the
        scores.
      temperature: divides the logits, as it did where the tokens were drawn; above 0.
      chunk, parts, placement: see `lora_jax.training.losses.token_values`.

    Returns:
      The function. It takes parameters, adapted or plain, and a batch whose ``weights`` matter only
      with several parts.

    Raises:
      ValueError: the temperature is not above 0.

    >>> from lora_jax import models, training
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> model = models.GPT2(models.read_config(fields | {"n_positions": 16}))
    >>> ids = jnp.array([[1, 2, 3]])
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> batch = {"ids": ids, "segment_ids": jnp.ones_like(ids), "positions": jnp.array([[0, 1, 2]])}
    >>> batch |= {"predict_at": jnp.array([[0, 1]]), "targets": ids[:, 1:]}
    >>> training.make_scorer(model.apply)(params, batch).logps.shape
    (1, 2)
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: the logits are divided by it; give 1")

    def each(logits: jax.Array, targets: jax.Array) -> Scores:
        logits = logits / temperature
        return Scores(-cross_entropy(logits, targets), entropy_of(logits))

    def score(params: Tree, batch: Batch) -> Any:
        how: dict[str, Any] = {"chunk": chunk, "parts": parts, "placement": placement}
        return token_values(each, forward, params, batch, **how)

    return jax.jit(score) if layout is None else layout.jitted(score)
