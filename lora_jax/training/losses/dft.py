"""Dynamic Fine-Tuning: the cross entropy of tokens, of which unlikely ones count less."""

import jax
import jax.numpy as jnp

from lora_jax.training.losses.cross_entropy import cross_entropy
from lora_jax.training.losses.tokens import TokenLoss


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


LOSS = TokenLoss(
    each=dft,
    about="cross-entropy times the token's probability, a constant to the gradient, so that "
    "unlikely targets do not dominate (Dynamic Fine-Tuning)",
)
