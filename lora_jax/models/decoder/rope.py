"""Rotary position embedding, and its scalings for contexts longer than in pretraining."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.types import Fields
from lora_jax.hf.fields import ConfigError
from lora_jax.hf.format import ModelConfig
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.rope_fields import RopeScaling
from lora_jax.models.layers.attention import wide_dtype


class RopeAngles(NamedTuple):
    """cos and sin of the angles at every position: [batch, seq, 1, rotated / 2] each, fp32.

    ``queries``, [batch, seq, 1, 1] fp32, multiplies a position's queries; None for nothing.
    """

    cos: jax.Array
    sin: jax.Array
    queries: jax.Array | None = None


def compute_rope_angles(
    positions: jax.Array, config: DecoderConfig, length: jax.Array | int, *, local: bool = False
) -> RopeAngles:
    """Returns cos and sin of RoPE's angles at every position.

    Args:
      positions: [batch, seq], int; or [batch, seq, rotated / 2], of each pair.
      config: the decoder's.
      length: [] int, the number of tokens by which "longrope" chooses its frequencies. Without a
        cache it is the length of the batch's longest row, as in transformers; with one, the cache's
        size, since cached keys keep the frequencies that they were rotated by.
      local: use the frequencies of layers with a sliding window.

    Returns:
      cos and sin, [batch, seq, 1, rotated / 2] each, fp32.
    """
    if local:
        freqs = jnp.asarray(_unscaled_frequencies(config.rotary_dim, config.rope_local_theta))
        factor = 1.0
    else:
        freqs = compute_frequencies(config, length)
        factor = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    if positions.ndim == 2:  # one position for all pairs
        positions = positions[..., None]
    positions = positions[..., None, :].astype(jnp.float32)
    angles = positions * freqs
    return RopeAngles(
        cos=jnp.cos(angles) * factor,
        sin=jnp.sin(angles) * factor,
        queries=_query_factors(positions, config.rope_scaling),
    )


def _query_factors(positions: jax.Array, scaling: RopeScaling | None) -> jax.Array | None:
    """Returns the scale of each query beyond the pretraining context; see ``RopeScaling``."""
    if scaling is None or not scaling.llama_4_scaling_beta:
        return None
    contexts = jnp.floor(positions / scaling.original_max_position_embeddings)
    return 1 + scaling.llama_4_scaling_beta * jnp.log1p(contexts)


def rotate(x: jax.Array, rotation: RopeAngles, *, neighbours: bool = False) -> jax.Array:
    """Rotates heads, [batch, seq, heads, head_dim], pairing dimension i with i + rotated/2.

    Dimensions beyond the rotated ones stay. Runs in fp32 at least and returns x's dtype. With
    ``neighbours``, dimensions 2i and 2i + 1 are a pair, and lie as if they had been i and
    i + rotated/2.
    """
    n_pairs = rotation.cos.shape[-1]
    y = x.astype(wide_dtype(x.dtype))
    x1, x2, unrotated = jnp.split(y, [n_pairs, 2 * n_pairs], axis=-1)
    if neighbours:
        x1 = y[..., 0 : 2 * n_pairs : 2]
        x2 = y[..., 1 : 2 * n_pairs : 2]
    cos = rotation.cos.astype(y.dtype)
    sin = rotation.sin.astype(y.dtype)
    rotated = [x1 * cos - x2 * sin, x2 * cos + x1 * sin, unrotated]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def compute_frequencies(config: DecoderConfig, length: jax.Array | int) -> jax.Array:
    """Returns the angle per position of each pair of a head's dimensions: [rotated / 2], fp32.

    f_i = theta^(-2i / rotated) (Su et al. 2021, RoFormer, section 3.4.2), then scaled. With L the
    original context and s the factor:

    - "linear": f / s (Chen et al. 2023).
    - "llama3": with wavelength w = 2 pi / f, f is kept for w < L/high, divided by s for w > L/low,
      and blended linearly in L/w between (Llama 3.1).
    - "yarn": f is kept where it turns more than beta_fast times in L, divided by s where it turns
      less than beta_slow times, and blended linearly in i between (Peng et al. 2023).
    - "proportional": f is of the whole head, theta^(-2i / head_dim), and 0 beyond a share of the
      pairs; all divided by s (Gemma 4).
    - "longrope": f / short_factor, or f / long_factor once the text exceeds L (Ding et al. 2024).

    Frequencies that change with every token ("dynamic") are refused: they would not fit the keys in
    a cache, nor what was computed from them.
    """
    freqs = _unscaled_frequencies(config.rotary_dim, config.rope_theta)
    scaling = config.rope_scaling
    if scaling is None:
        return jnp.asarray(freqs)
    if scaling.kind == "proportional":
        head_dim = config.global_head_dim or config.head_dim
        n_rotated = int(scaling.rotated_share * head_dim // 2)
        head_freqs = _unscaled_frequencies(head_dim, config.rope_theta) / np.float32(scaling.factor)
        is_rotated = np.arange(head_dim // 2) < n_rotated
        return jnp.asarray(np.where(is_rotated, head_freqs, np.float32(0)))
    if scaling.kind == "longrope":
        short_freqs = (freqs / np.asarray(scaling.short_factor, np.float32)).astype(np.float32)
        long_freqs = (freqs / np.asarray(scaling.long_factor, np.float32)).astype(np.float32)
        is_long = length > scaling.original_max_position_embeddings
        return jnp.where(is_long, jnp.asarray(long_freqs), jnp.asarray(short_freqs))
    # The other kinds blend each frequency with the frequency divided by the factor.
    share = _undivided_fraction(config, scaling, freqs)
    blended = (1.0 - share) * freqs / scaling.factor + share * freqs
    return jnp.asarray(blended.astype(np.float32))


def _unscaled_frequencies(dim: int, theta: float | None) -> np.ndarray:
    """Returns theta^(-2i / dim) for the dim / 2 pairs, fp32."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1.0) / np.float32(theta) ** exponents


def _undivided_fraction(
    config: DecoderConfig, scaling: RopeScaling, freqs: np.ndarray
) -> np.ndarray:
    """Returns the fraction of each frequency, 0 to 1, that scaling leaves undivided."""
    if scaling.kind == "linear":
        return np.zeros_like(freqs)
    context = scaling.original_max_position_embeddings
    if scaling.kind == "llama3":
        turns = context * freqs / (2 * np.pi)  # of each pair, in the context trained on
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        return np.clip((turns - low) / (high - low), 0.0, 1.0)
    # YaRN: the share falls linearly from the pair that turns beta_fast times on.
    dim = config.rotary_dim

    def pair_with_turns(turns: float) -> float:
        """Returns the (fractional) pair that makes this many turns in the context."""
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    fast_pair = pair_with_turns(scaling.beta_fast)
    slow_pair = pair_with_turns(scaling.beta_slow)
    if scaling.truncate:
        fast_pair = math.floor(fast_pair)
        slow_pair = math.ceil(slow_pair)
    fast_pair = max(fast_pair, 0)
    slow_pair = min(slow_pair, dim - 1)
    if slow_pair == fast_pair:  # no division by zero
        slow_pair += 0.001
    pairs = np.arange(dim // 2, dtype=np.float32)
    scaled_share = np.clip((pairs - fast_pair) / (slow_pair - fast_pair), 0.0, 1.0)
    share: np.ndarray = 1.0 - scaled_share
    return share


# Llama 3.1's values, for fields that are not given.
_DEFAULTS: dict[str, dict[str, float]] = {
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
}
_ORIGINAL = "original_max_position_embeddings"


def with_rope_scaling(config: ModelConfig, scaling: Fields) -> DecoderConfig:
    """Returns a configuration with scaled RoPE and ``factor`` times as many positions.

    Saved in config.json like any other configuration, it is read by transformers.

    Args:
      config: configuration of a decoder whose RoPE is not scaled.
      scaling: the fields of transformers' ``rope_parameters``: {"rope_type": "yarn", "factor":
        4.0}, and others of the type. ``original_max_position_embeddings`` is the configuration's
        number of positions by default; "llama3" has Llama 3.1's values for its other fields.

    Raises:
      ConfigError: the model has no RoPE, or scales it already; or the scaling is not supported, or
        lacks a field.

    >>> from lora_jax import models
    >>> sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8}
    >>> layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    >>> config = models.read_config({"model_type": "llama", **sizes, **layers})
    >>> longer = models.with_rope_scaling(config, {"rope_type": "yarn", "factor": 4.0})
    >>> config.max_position_embeddings, longer.max_position_embeddings
    (2048, 8192)
    """
    if not isinstance(config, DecoderConfig):
        problem = f"A {config.model_type} model has no RoPE to scale."
        if isinstance(getattr(config, "text", None), DecoderConfig):
            problem = f"The RoPE of a {config.model_type} model, which reads images, is not scaled."
        raise ConfigError(f"{problem} Remove the RoPE scaling, or use a decoder of texts alone.")
    existing = config.rope_scaling
    if existing is not None:
        raise ConfigError(
            f"The model scales its RoPE already ({existing.kind}, factor {existing.factor:g}), and "
            "another scaling would lose what it learned. Remove the RoPE scaling, or use a model "
            "without one."
        )
    kind = scaling.get("rope_type")
    if kind == "dynamic":
        raise ConfigError(
            "RoPE type 'dynamic' changes its frequencies with the length of a text, so they do not "
            "fit the keys in a cache. Use 'yarn', whose frequencies are fixed."
        )
    supported = config.family.rope_kinds
    if supported and kind not in supported:
        raise ConfigError(
            f"RoPE type {kind!r} is not supported for {config.model_type}. Use "
            f"{' or '.join(supported)}."
        )
    factor = scaling.get("factor", 0.0)
    if not factor > 1:
        raise ConfigError(
            f"The RoPE factor is {factor:g}, but it must be above 1. Use the ratio of the new "
            "length to the old."
        )
    original = scaling.get(_ORIGINAL, config.max_position_embeddings)
    fields = {**_DEFAULTS.get(str(kind), {}), **scaling}
    if kind != "linear":
        fields[_ORIGINAL] = original
    scaled = DecoderConfig.from_hf(
        {
            **config.to_hf(),
            "rope_scaling": fields,
            "max_position_embeddings": round(original * factor),
        }
    )
    return dataclasses.replace(
        config,
        rope_scaling=scaled.rope_scaling,
        max_position_embeddings=scaled.max_position_embeddings,
    )
