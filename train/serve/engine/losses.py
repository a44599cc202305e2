"""The losses of clients: sums over the targets of all places, of log-probabilities p.

Each takes p, fp32 [rows, length, k], and what a client gave, and returns terms of the same shape.
Places that are padding have advantage and weight 0, and `there` 0.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.training.losses.online import clipped_loss, weighted_loss

Given = Mapping[str, jax.Array]
LOW, HIGH = 0.8, 1.2  # PPO's bounds of a ratio of probabilities


def cross_entropy(p: jax.Array, given: Given) -> jax.Array:
    """Returns -w p, w the weight, which may be negative."""
    return -given["weights"] * p


def importance_sampling(p: jax.Array, given: Given) -> jax.Array:
    """Returns -exp(p - q) A, q the log-probability when the token was drawn, A the advantage."""
    return -jnp.exp(p - given["logprobs"]) * given["advantages"]


def ppo(p: jax.Array, given: Given) -> jax.Array:
    """Returns -min(r A, clip(r) A), r = exp(p - q)."""
    return clipped_loss(jnp.exp(p - given["logprobs"]), given["advantages"], *_limits(given))


def cispo(p: jax.Array, given: Given) -> jax.Array:
    """Returns -sg(clip(r)) p A, r = exp(p - q), sg without a gradient."""
    ratio = jnp.exp(p - given["logprobs"])
    return weighted_loss(ratio, p, given["advantages"], *_limits(given))


def dro(p: jax.Array, given: Given) -> jax.Array:
    """Returns -(p A - β/2 (p - q)²)."""
    apart = given["there"] * (p - given["logprobs"])
    return -(p * given["advantages"] - 0.5 * given["beta"] * apart**2)


def gspo(p: jax.Array, given: Given) -> jax.Array:
    """Returns PPO's terms, with a sequence's ratio in the place of each token's.

    It is exp of the mean of p - q over the places of `sequence_ratio_mask`.
    """
    mask = given["there"] * (given["sequence_ratio_mask"] != 0).astype(jnp.float32)
    apart = jnp.sum(mask * (lax.stop_gradient(p) - given["logprobs"]), axis=(1, 2), keepdims=True)
    mean = apart / jnp.maximum(jnp.sum(mask, axis=(1, 2), keepdims=True), 1.0)
    ratio = jnp.exp(mean + p - lax.stop_gradient(p))
    return clipped_loss(ratio, given["advantages"], *_limits(given))


def _limits(given: Given) -> tuple[jax.Array, jax.Array]:
    return given["clip_low_threshold"], given["clip_high_threshold"]


FUNCTIONS: dict[str, Callable[[jax.Array, Given], jax.Array]] = {
    function.__name__: function
    for function in (cross_entropy, importance_sampling, ppo, cispo, dro, gspo)
}
ORDER = tuple(FUNCTIONS)
# What a client may give for each target, and what stands for it otherwise.
DEFAULTS = {
    "weights": 1.0,
    "logprobs": 0.0,
    "advantages": 0.0,
    "sequence_ratio_mask": 1.0,
    "clip_low_threshold": LOW,
    "clip_high_threshold": HIGH,
}


def total_weight(loss: str, inputs: Mapping[str, np.ndarray]) -> float:
    """Returns the weight of a datum's targets, by which its summed loss is divided for a status.

    The weight of a target is |w| in the cross entropy. In a loss of advantages, it is 1 where the
    advantage is not 0: other targets add nothing to the loss but DRO's penalty.

    Args:
      loss: the loss's name, a key of `FUNCTIONS`.
      inputs: the arrays of the datum: target_tokens, [n] or [n, k], and arrays of its shape or [n].
    """
    targets = inputs["target_tokens"]
    if loss == "cross_entropy":
        weights = np.abs(inputs.get("weights", np.float32(DEFAULTS["weights"])))
    else:
        weights = (inputs["advantages"] != 0).astype(np.float32)
    if weights.ndim < targets.ndim:
        weights = weights[..., None]  # each is that of all k targets of its place
    return float(np.broadcast_to(weights, targets.shape).sum())


def sum_loss(which: jax.Array, p: jax.Array, given: Given) -> jax.Array:
    """Returns the sum of one loss's terms, [] fp32.

    Args:
      which: [] int32, its place in `ORDER`.
      p: log-probabilities.
      given: by name, [rows, length, k] fp32; beta [].
    """
    terms = lax.switch(which, [*FUNCTIONS.values()], p, given)
    return jnp.sum(jnp.where(given["there"] > 0, terms, 0.0))
