"""Noise on embedded tokens, for training."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class EmbeddingNoise(NamedTuple):
    """Uniform noise to add to the vectors that a model looks up for its tokens.

    Attributes:
      key: the PRNG key to draw it with.
      bound: [batch, seq] fp32. A token's noise lies between ± bound / sqrt(d_model).
    """

    key: jax.Array
    bound: jax.Array


def add_noise(x: jax.Array, noise: EmbeddingNoise | None) -> jax.Array:
    """Returns embedded tokens, [batch, seq, d_model], with the noise added; None adds nothing."""
    if noise is None:
        return x
    drawn = jax.random.uniform(noise.key, x.shape, jnp.float32, -1.0, 1.0)
    bound = noise.bound[..., None] / math.sqrt(x.shape[-1])
    return x + (bound * drawn).astype(x.dtype)
