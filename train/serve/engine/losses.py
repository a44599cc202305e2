"""The losses that clients choose: sums over all targets, from their log-probabilities.

Each takes `logps`, fp32 [rows, length, k], and the `inputs` that a client gave for its targets, and
returns terms of the same shape. Padding has advantage and weight 0, and `target_mask` 0. Docstrings
call the log-probability p, that at the time of drawing q, the advantage A, and the ratio
r = exp(p - q).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.training.losses.online import clipped_loss, weighted_loss

LossArrays = Mapping[str, jax.Array]  # by the names of `DEFAULTS`, "target_mask" and "beta"
# PPO's bounds of a ratio of probabilities.
MIN_RATIO = 0.8
MAX_RATIO = 1.2


def cross_entropy(logps: jax.Array, inputs: LossArrays) -> jax.Array:
    """Returns -w p for weights w, which may be negative."""
    return -inputs["weights"] * logps


def importance_sampling(logps: jax.Array, inputs: LossArrays) -> jax.Array:
    """Returns -r A."""
    return -jnp.exp(logps - inputs["logprobs"]) * inputs["advantages"]


def ppo(logps: jax.Array, inputs: LossArrays) -> jax.Array:
    """Returns -min(r A, clip(r) A)."""
    ratio = jnp.exp(logps - inputs["logprobs"])
    return clipped_loss(ratio, inputs["advantages"], *_ratio_bounds(inputs))


def cispo(logps: jax.Array, inputs: LossArrays) -> jax.Array:
    """Returns -sg(clip(r)) p A, where sg stops the gradient."""
    ratio = jnp.exp(logps - inputs["logprobs"])
    return weighted_loss(ratio, logps, inputs["advantages"], *_ratio_bounds(inputs))


def dro(logps: jax.Array, inputs: LossArrays) -> jax.Array:
    """Returns -(p A - β/2 (p - q)²)."""
    log_ratio = inputs["target_mask"] * (logps - inputs["logprobs"])
    return -(logps * inputs["advantages"] - 0.5 * inputs["beta"] * log_ratio**2)


def gspo(logps: jax.Array, inputs: LossArrays) -> jax.Array:
    """Returns PPO's terms, with a sequence's ratio in the place of each token's.

    It is exp of the mean of p - q over the targets of `sequence_ratio_mask`.
    """
    is_in_ratio = (inputs["sequence_ratio_mask"] != 0).astype(jnp.float32)
    mask = inputs["target_mask"] * is_in_ratio
    constant_logps = lax.stop_gradient(logps)
    log_ratios = mask * (constant_logps - inputs["logprobs"])
    log_ratio_sum = jnp.sum(log_ratios, axis=(1, 2), keepdims=True)
    n_targets = jnp.sum(mask, axis=(1, 2), keepdims=True)
    sequence_log_ratio = log_ratio_sum / jnp.maximum(n_targets, 1.0)
    # The value is the sequence's ratio, and the gradient that of each token.
    ratio = jnp.exp(sequence_log_ratio + logps - constant_logps)
    return clipped_loss(ratio, inputs["advantages"], *_ratio_bounds(inputs))


def _ratio_bounds(inputs: LossArrays) -> tuple[jax.Array, jax.Array]:
    """Returns the lower and the upper bound of each target's ratio."""
    return inputs["clip_low_threshold"], inputs["clip_high_threshold"]


FUNCTIONS: dict[str, Callable[[jax.Array, LossArrays], jax.Array]] = {
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
    "clip_low_threshold": MIN_RATIO,
    "clip_high_threshold": MAX_RATIO,
}


def total_weight(loss: str, inputs: Mapping[str, np.ndarray]) -> float:
    """Returns the sum of a datum's target weights, which turns a summed loss into a mean.

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
        weights = weights[..., None]  # a token's weight is that of all its k targets
    return float(np.broadcast_to(weights, targets.shape).sum())


def sum_loss(loss_index: jax.Array, logps: jax.Array, inputs: LossArrays) -> jax.Array:
    """Returns the sum of a loss over all targets, [] fp32.

    Args:
      loss_index: [] int32, of the loss in `ORDER`.
      logps: log-probabilities.
      inputs: by name, [rows, length, k] fp32; beta [].
    """
    terms = lax.switch(loss_index, [*FUNCTIONS.values()], logps, inputs)
    return jnp.sum(jnp.where(inputs["target_mask"] > 0, terms, 0.0))
