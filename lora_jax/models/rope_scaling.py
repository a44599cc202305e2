"""Scales RoPE for rows longer than those that a model was trained on."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.hf.fields import ConfigError
from lora_jax.models.decoder.config import DecoderConfig

# Llama 3.1's values, for fields that are not given.
_DEFAULTS: dict[str, dict[str, float]] = {
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
}
_ORIGINAL = "original_max_position_embeddings"


def with_rope_scaling(config: Any, scaling: Mapping[str, Any]) -> Any:
    """Returns a configuration whose RoPE is scaled, with ``factor`` times as many positions.

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
        raise ConfigError(f"a {config.model_type} model has no RoPE to scale")
    if config.rope_scaling is not None:
        was = config.rope_scaling
        raise ConfigError(
            f"the model scales its RoPE already ({was.kind}, factor {was.factor:g}), and what it "
            "learned with that would be lost"
        )
    kind = scaling.get("rope_type")
    if kind == "dynamic":
        raise ConfigError(
            "RoPE type 'dynamic' changes its frequencies with the length of a text, so that they "
            "would not fit the keys in a cache: use its successor yarn, whose frequencies are fixed"
        )
    if (known := config.family.rope_kinds) and kind not in known:
        raise ConfigError(
            f"RoPE type {kind!r} is not supported for {config.model_type}, only {', '.join(known)}"
        )
    factor = scaling.get("factor", 0.0)
    if not factor > 1:
        raise ConfigError(
            f"factor {factor:g}: give a number above 1, the ratio of the new length to the old"
        )
    original = scaling.get(_ORIGINAL, config.max_position_embeddings)
    fields = {**_DEFAULTS.get(str(kind), {}), **scaling}
    if kind != "linear":
        fields[_ORIGINAL] = original
    written = {
        **config.to_hf(),
        "rope_scaling": fields,
        "max_position_embeddings": round(original * factor),
    }
    read = DecoderConfig.from_hf(written)
    return dataclasses.replace(
        config, rope_scaling=read.rope_scaling, max_position_embeddings=read.max_position_embeddings
    )
