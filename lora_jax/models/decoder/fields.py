"""A decoder's fields in Hugging Face's config.json: what each family reads, and its defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.hf.fields import ConfigError, refuse_unknown
from lora_jax.models.decoder.rope_fields import read_rope, write_rope

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

# transformers' defaults where a family's differ from Llama's.
_GEMMA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
    "mixtral": {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 131072,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen2": {
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "max_position_embeddings": 32768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    },
    "gemma2": {
        **_GEMMA,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {**_GEMMA, "max_position_embeddings": 131072, "rope_theta": 1e6},
    "phi3": {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    },
}

FAMILIES = tuple(_DEFAULTS)

# The traits of a family, by the configuration's fields.
_GEMMA_TRAITS = {"norm_adds_one": True, "post_norms": True, "scale_embeddings": True}
_TRAITS: dict[str, dict[str, bool]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "mixtral": {"norm_topk_prob": True},
    "qwen3_moe": {"qk_norm": True},
    "gemma2": _GEMMA_TRAITS,
    "gemma3_text": {**_GEMMA_TRAITS, "qk_norm": True},
    "phi3": {"fused_projections": True},
}

# Fields that a family's forward pass reads, beyond those that all families read.
_QWEN_WINDOW = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
_GEMMA_OWN = {
    "attention_bias",
    "hidden_activation",
    "query_pre_attn_scalar",
    "sliding_window",
    "layer_types",
    "final_logit_softcapping",
}
_OWN: dict[str, set[str]] = {
    "llama": {"attention_bias", "mlp_bias"},
    "mistral": {"sliding_window"},
    "mixtral": {"sliding_window", "num_local_experts", "num_experts_per_tok"},
    "qwen2": _QWEN_WINDOW,
    "qwen3": {"attention_bias", *_QWEN_WINDOW},
    "qwen3_moe": {
        "attention_bias",
        "use_sliding_window",
        "sliding_window",
        "num_experts",
        "num_local_experts",  # transformers 5 writes num_experts under this name
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "decoder_sparse_step",
        "mlp_only_layers",
    },
    "gemma2": {*_GEMMA_OWN, "attn_logit_softcapping"},
    "gemma3_text": {
        *_GEMMA_OWN,
        "rope_local_base_freq",
        "sliding_window_pattern",
        "_sliding_window_pattern",
    },
    "phi3": {"sliding_window", "original_max_position_embeddings"},
}

_COMMON = frozenset(_REQUIRED) | {
    "model_type",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}

# Known options that would change the forward pass, and the only value that is supported.
_UNSUPPORTED: dict[str, Any] = {
    "attention_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "router_jitter_noise": 0.0,
    "rope_interleaved": False,
    "use_bidirectional_attention": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}

# Further ones, in files of one family.
_UNSUPPORTED_IN: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"use_qk_norm": True, "shared_expert_intermediate_size": 0},
    "phi3": {"full_attn_mod": 1, "interpolate_factor": 1},
}

_Get = Callable[..., Any]


def read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the fields of ``DecoderConfig`` from a parsed config.json.

    Args:
      config: the parsed config.json.

    Returns:
      Field -> value.

    Raises:
      ConfigError: names the fields that are missing, unsupported or unknown.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    missing = [name for name in _REQUIRED if config.get(name) is None]
    if missing:
        raise ConfigError(f"the configuration lacks {', '.join(missing)}")
    unsupported = _UNSUPPORTED | _UNSUPPORTED_IN.get(family, {})
    refuse_unknown(config, family, _COMMON | _OWN[family], unsupported)

    def get(name: str, default: Any = None) -> Any:
        return config.get(name, _DEFAULTS[family].get(name, default))

    heads = config["num_attention_heads"]
    window, windowed = _read_window(family, config["num_hidden_layers"], get)
    attention_bias = bool(get("attention_bias", False))
    eos = config.get("eos_token_id")
    return {
        "model_type": family,
        **{name: config[name] for name in _REQUIRED},
        "num_key_value_heads": get("num_key_value_heads") or heads,
        "head_dim": get("head_dim") or config["hidden_size"] // heads,
        "hidden_act": _read_activation(family, get),
        "rms_norm_eps": get("rms_norm_eps", 1e-6),
        **read_rope(family, config, _DEFAULTS[family]),
        "max_position_embeddings": get("max_position_embeddings", 2048),
        "tie_word_embeddings": bool(get("tie_word_embeddings", False)),
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
        "mlp_bias": bool(get("mlp_bias", False)),
        "sliding_window": window,
        "windowed_layers": windowed,
        "query_pre_attn_scalar": get("query_pre_attn_scalar"),
        "attn_logit_softcapping": get("attn_logit_softcapping"),
        "final_logit_softcapping": get("final_logit_softcapping"),
        **_read_experts(family, config, get),
        "initializer_range": get("initializer_range", 0.02),
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        "pad_token_id": config.get("pad_token_id"),
        **_TRAITS.get(family, {}),
    }


def write_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the fields of ``DecoderConfig`` as a config.json for transformers 4 and 5.

    Args:
      fields: field -> value.

    Returns:
      A dict of plain JSON values.
    """
    family = fields["model_type"]
    own = _OWN[family]
    same = """
        model_type num_key_value_heads head_dim rms_norm_eps max_position_embeddings
        tie_word_embeddings initializer_range bos_token_id pad_token_id
    """
    also = own & {
        "mlp_bias",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "sliding_window",
    }
    out = {name: fields[name] for name in (*_REQUIRED, *same.split(), *sorted(also))}
    out["architectures"] = [_ARCHITECTURES.get(family, f"{family.capitalize()}ForCausalLM")]
    out["hidden_activation" if "hidden_activation" in own else "hidden_act"] = fields["hidden_act"]
    eos = fields["eos_token_ids"]
    out["eos_token_id"] = list(eos) if len(eos) > 1 else eos[0] if eos else None
    if "attention_bias" in own:
        out["attention_bias"] = fields["o_bias"]
    if family == "mixtral":
        out["num_local_experts"] = fields["num_experts"]
    if "use_sliding_window" in own:
        out["use_sliding_window"] = fields["sliding_window"] is not None
    if "layer_types" in own:
        out["layer_types"] = [
            "sliding_attention" if i in fields["windowed_layers"] else "full_attention"
            for i in range(fields["num_hidden_layers"])
        ]
    return {**out, **write_rope(family, fields)}


_ARCHITECTURES = {"qwen3_moe": "Qwen3MoeForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}


def _read_activation(family: str, get: _Get) -> str:
    """Reads the activation. Gemma's files name it twice, and hidden_activation counts."""
    plain = get("hidden_act")
    if not family.startswith("gemma"):
        return plain or "silu"
    chosen = get("hidden_activation")
    if plain not in (None, chosen):
        raise ConfigError(
            f"hidden_act={plain!r} contradicts hidden_activation={chosen!r}, which {family} uses"
        )
    return chosen


def _read_experts(family: str, config: Mapping[str, Any], get: _Get) -> dict[str, Any]:
    if family == "mixtral":
        size, count = config["intermediate_size"], get("num_local_experts")
    elif family == "qwen3_moe":
        size = get("moe_intermediate_size")
        count = config.get("num_local_experts") or get("num_experts")
        step, dense = get("decoder_sparse_step", 1), list(get("mlp_only_layers") or ())
        if step != 1:
            raise ConfigError(f"decoder_sparse_step={step} is not supported, only 1: {_ALL_SPARSE}")
        if dense:
            raise ConfigError(f"mlp_only_layers={dense} is not supported, only []: {_ALL_SPARSE}")
    else:
        return {}
    return {
        "num_experts": count,
        "num_experts_per_tok": get("num_experts_per_tok"),
        "moe_intermediate_size": size,
        "norm_topk_prob": bool(get("norm_topk_prob", False)),
    }


_ALL_SPARSE = "layers are scanned, so that all of them have experts or none"


def _read_window(family: str, layers: int, get: _Get) -> tuple[int | None, tuple[int, ...]]:
    """Reads the sliding window and the layers that use it."""
    if family == "llama":
        return None, ()
    window = get("sliding_window")
    if "use_sliding_window" in _OWN[family] and not get("use_sliding_window", False):
        window = None
    if "layer_types" not in _OWN[family]:
        return window, () if window is None else tuple(range(layers))
    types = get("layer_types")
    if types is None:
        windowed = _default_windowed(family, layers, get) if window is not None else ()
    else:
        unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
        if unknown or len(types) != layers:
            raise ConfigError(f"layer_types {list(types)} do not describe {layers} layers")
        windowed = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
        if windowed and window is None:
            raise ConfigError("layer_types has sliding_attention, but no sliding_window is in use")
    return (window, windowed) if windowed else (None, ())


def _default_windowed(family: str, layers: int, get: _Get) -> tuple[int, ...]:
    """Returns the layers with a window in a file without layer_types."""
    if not family.startswith("gemma"):
        return tuple(range(get("max_window_layers", 28), layers))
    pattern = 2 if family == "gemma2" else get("sliding_window_pattern", 6)
    return tuple(i for i in range(layers) if (i + 1) % pattern)
