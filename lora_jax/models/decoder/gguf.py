"""Decoders in GGUF files: tensor names, and the configuration in the metadata."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.types import Fields
from lora_jax.hf.fields import ConfigError
from lora_jax.hf.format import GGUFLayout
from lora_jax.hf.gguf.tokenizer import END_ROLES
from lora_jax.hf.keys import WeightsError
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.families.family import DecoderFamily, Get
from lora_jax.models.decoder.rope import compute_frequencies
from lora_jax.models.decoder.rope_fields import RopeScaling

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

ROPE_FACTORS = "rope_freqs.weight"  # what each of RoPE's frequencies is divided by

_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def gguf_layout(family: DecoderFamily) -> GGUFLayout | None:
    """Returns the layout of a family's GGUF files; None if they are not supported."""
    if family.gguf is None or not family.reads_gguf:
        return None
    read = functools.partial(_read_metadata, family)
    return GGUFLayout(family.gguf, _hf_name, read, _order_as_hf, config_tensors=(ROPE_FACTORS,))


def _hf_name(name: str) -> str:
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return _OUTER_NAMES.get(name, name)


def _order_as_hf(rows: np.ndarray, name: str, config: DecoderConfig) -> np.ndarray:
    return _swap_head_halves(rows, name, config, (-1, 2))


def order_rows_as_gguf(rows: np.ndarray, name: str, config: DecoderConfig) -> np.ndarray:
    """Returns the rows of a Hugging Face tensor, or of its B, in GGUF's order.

    Args:
      rows: [out, ...].
      name: Hugging Face's name of the tensor.
      config: the model's.
    """
    return _swap_head_halves(rows, name, config, (2, -1))


def _swap_head_halves(
    rows: np.ndarray, name: str, config: DecoderConfig, halves: tuple[int, int]
) -> np.ndarray:
    """Swaps the two axes into which each head's rows of q and k are split."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    module = name.split(".")[-2]
    if not config.family.gguf_pairs_rows or module not in heads:
        return rows
    pairs = rows.reshape(heads[module], *halves, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _read_metadata(
    family: DecoderFamily,
    metadata: Fields,
    shapes: Mapping[str, tuple[int, ...]],
    facts: Mapping[str, np.ndarray],
) -> DecoderConfig:
    """Reads a configuration from GGUF metadata.

    Args:
      family: the model's family.
      metadata: the file's key-value pairs.
      shapes: Hugging Face's name -> shape. Biases, the size of the vocabulary and a tied head
        follow from them, since the metadata lacks these.
      facts: the factors of RoPE, by their name, if the file has some.

    Raises:
      ConfigError: names what is missing or not supported.
    """
    arch = family.gguf

    def get(name: str, default: object = None) -> Any:
        """Returns a metadata field; raises a ConfigError if a required one is missing."""
        value = metadata.get(f"{arch}.{name}", default)
        if value is None:
            raise ConfigError(
                f"The GGUF file's metadata lacks {arch}.{name}. Convert or download the file again."
            )
        # fp32 in the file: the shortest decimal is the number that was meant.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // heads)
    _check_sizes(arch, get, head_dim)
    scaling = _read_scaling(get)
    if scaling is not None and ROPE_FACTORS in facts:
        raise ConfigError(
            f"The GGUF file scales RoPE twice, by {arch}.rope.scaling and by {ROPE_FACTORS}. "
            "Convert the model again, with one of them."
        )
    if "model.embed_tokens.weight" not in shapes:
        raise WeightsError(
            "The GGUF file has no tensor token_embd.weight. Convert or download the file again."
        )
    end_ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in END_ROLES)
    # The metadata does not name biases: the tensors of layer 0 tell which there are.
    modules = {
        "qkv_bias": "self_attn.q_proj",
        "o_bias": "self_attn.o_proj",
        "mlp_bias": "mlp.gate_proj",
    }
    biases = {name: f"model.layers.0.{path}.bias" in shapes for name, path in modules.items()}
    config = DecoderConfig(
        model_type=family.model_type,
        **{**family.traits, **biases},
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
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(end for end in end_ids if end is not None)),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )
    if ROPE_FACTORS not in facts:
        return config
    return dataclasses.replace(
        config, rope_scaling=_scaling_by_factors(facts[ROPE_FACTORS], config)
    )


def _check_sizes(arch: str | None, get: Get, head_dim: int) -> None:
    """Raises a ConfigError for heads of several sizes, and for experts."""
    supported_values = {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "expert_count": 0,
    }
    for name, value in supported_values.items():
        if get(name, value) != value:
            raise ConfigError(
                f"{arch}.{name}={get(name)} is not supported in a GGUF file, only {value} is. Load "
                "the model from safetensors."
            )


def _read_scaling(get: Get) -> RopeScaling | None:
    """Returns the RoPE scaling in the metadata, or None."""
    kind = get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ConfigError(
            f"RoPE scaling {kind!r} is not supported in a GGUF file, only 'linear' is. Load the "
            "model from safetensors."
        )
    return None if kind == "none" else RopeScaling(kind=kind, factor=get("rope.scaling.factor"))


def _scaling_by_factors(factors: np.ndarray, config: DecoderConfig) -> RopeScaling | None:
    """Returns the RoPE scaling for per-frequency factors in a GGUF file.

    The file has the factors of Llama 3.1's formula, and not its numbers: where the published ones
    give the same frequencies, it is that formula, else a list of factors (LongRoPE's).

    Args:
      factors: one for each frequency.
      config: the model's, without a scaling.

    Raises:
      ConfigError: there are more or fewer factors than frequencies.
    """
    unscaled_freqs = np.asarray(compute_frequencies(config, 0))
    if factors.shape != unscaled_freqs.shape:
        raise ConfigError(
            f"{ROPE_FACTORS} has {factors.size} factors, but RoPE has {unscaled_freqs.size} "
            "frequencies. Convert or download the GGUF file again."
        )
    if np.all(factors == 1):  # nothing is scaled
        return None
    # Llama 3.1's formula divides the lowest frequencies by its factor, the largest one.
    largest = float(str(factors.max()))
    published = RopeScaling(kind="llama3", factor=largest)
    published_freqs = compute_frequencies(dataclasses.replace(config, rope_scaling=published), 0)
    if np.allclose(published_freqs, unscaled_freqs / factors, rtol=1e-6, atol=0):
        return published
    # Any other factors are those of LongRoPE, the same for short and long texts.
    factor_of_pair = tuple(map(float, factors))
    return RopeScaling(
        kind="longrope",
        short_factor=factor_of_pair,
        long_factor=factor_of_pair,
        original_max_position_embeddings=config.max_position_embeddings,
    )
