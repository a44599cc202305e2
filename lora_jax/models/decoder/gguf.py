"""Reads a decoder's configuration from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.hf.fields import ConfigError
from lora_jax.hf.keys import WeightsError
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.rope_fields import RopeScaling

_FAMILY = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def config_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> DecoderConfig:
    """Reads a configuration from GGUF metadata.

    Args:
      metadata: the file's key-value pairs.
      shapes: Hugging Face's name -> shape. Biases, the size of the vocabulary and a tied head
        follow from them, since the metadata lacks these.

    Returns:
      The configuration.

    Raises:
      ConfigError: names what is missing or not supported.
    """
    arch = metadata.get("general.architecture")
    if arch not in _FAMILY:
        raise ConfigError(
            f"GGUF architecture {arch!r} is not supported; supported are {', '.join(_FAMILY)}"
        )

    def get(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{name}", default)
        if value is None:
            raise ConfigError(f"the metadata lacks {arch}.{name}")
        # fp32 in the file: the shortest decimal is the number that was meant.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // heads)
    supported = {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "expert_count": 0,
    }
    for name, value in supported.items():
        if get(name, value) != value:
            raise ConfigError(f"{arch}.{name}={get(name)} is not supported, only {value} is")
    if "rope_freqs.weight" in shapes:
        raise ConfigError("RoPE with scaled frequencies (rope_freqs.weight) is not supported")
    scaling = None
    kind = get("rope.scaling.type", "none")
    if kind == "linear":
        scaling = RopeScaling(kind="linear", factor=get("rope.scaling.factor"))
    elif kind != "none":
        raise ConfigError(f"RoPE scaling {kind!r} is not supported")
    if "model.embed_tokens.weight" not in shapes:
        raise WeightsError("there is no token_embd.weight")
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    return DecoderConfig(
        model_type=_FAMILY[arch],
        vocab_size=shapes["model.embed_tokens.weight"][0],
        hidden_size=width,
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_theta=get("rope.freq_base", 10000.0),
        rope_scaling=scaling,
        max_position_embeddings=get("context_length"),
        tie_word_embeddings="lm_head.weight" not in shapes,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in shapes,
        o_bias="model.layers.0.self_attn.o_proj.bias" in shapes,
        mlp_bias="model.layers.0.mlp.gate_proj.bias" in shapes,
        qk_norm=arch == "qwen3",
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=() if eos is None else (eos,),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )
