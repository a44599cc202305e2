"""The cross entropy of tokens, in nats."""

import functools

import jax
import optax

from lora_jax.training.losses.tokens import TokenLoss, sum_over_tokens


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns -log p of each target p, fp32 [...].

    Args:
      logits: fp32 [..., vocab].
      targets: int32 [...].
    """
    nll: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return nll


summed_loss = functools.partial(sum_over_tokens, cross_entropy)
LOSS = TokenLoss(each=cross_entropy, about="minus the log of the token's probability")
