"""Rotary position embedding, with the scalings of long-context Llamas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.config import DecoderConfig


def inverse_frequencies(config: DecoderConfig) -> np.ndarray:
    """The rotation per position of each pair of a head's dimensions: [head_dim / 2], fp32.

    f_i = theta^(-2i / head_dim) (Su et al. 2021, RoFormer, section 3.4.2), then scaled: by 1/factor
    ("linear"; Chen et al. 2023), or as Llama 3.1 does ("llama3"), where with L = the original
    context and wavelength w = 2*pi/f, f is kept for w < L/high, divided by the factor for
    w > L/low, and blended linearly in L/w between.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    freqs = np.float32(1.0) / np.float32(config.rope_theta) ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return (freqs / np.float32(scaling.factor)).astype(np.float32)
    turns = scaling.original_max_position_embeddings * freqs / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1.0 - keep) * freqs / scaling.factor + keep * freqs).astype(np.float32)


def rotations(positions: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position's angles.

    Args:
      positions: [batch, seq], int.
      config: the decoder's.

    Returns:
      cos and sin, each [batch, seq, 1, head_dim / 2], fp32.
    """
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates heads, [batch, seq, heads, head_dim], pairing dimension i with i + head_dim/2.

    Runs in fp32 and returns x's dtype.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
