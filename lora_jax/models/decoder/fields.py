"""A decoder's fields in a config.json; ``families`` says which fields each family reads."""

from collections.abc import Mapping
from typing import Any

from lora_jax.core.types import Fields
from lora_jax.hf.fields import (
    ConfigError,
    check_no_unknown_fields,
    check_supported,
    read_boolean,
    read_eos,
    write_eos,
)
from lora_jax.models.decoder.families.family import DecoderFamily, Get
from lora_jax.models.decoder.families.registry import FAMILIES
from lora_jax.models.decoder.rope_fields import read_rope, write_rope

_REQUIRED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
).split()

# Fields that ``DecoderConfig`` has under the same name, with the same default: of all families, and
# of those that read them.
_SAME = (
    "rms_norm_eps max_position_embeddings tie_word_embeddings "
    "initializer_range bos_token_id pad_token_id"
).split()
_SAME_WHERE_READ = """
    mlp_bias shared_expert_intermediate_size query_pre_attn_scalar embedding_multiplier
    residual_multiplier attention_multiplier logits_scaling swiglu_limit swiglu_alpha
    first_k_dense_replace n_group topk_group routed_scaling_factor q_lora_rank kv_lora_rank
    qk_nope_head_dim qk_rope_head_dim v_head_dim rope_interleave global_head_dim
    num_global_key_value_heads attention_k_eq_v num_kv_shared_layers use_double_wide_mlp
    hidden_size_per_layer_input vocab_size_per_layer_input linear_num_key_heads
    linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim
    attn_logit_softcapping final_logit_softcapping
    """.split()

# Fields of a model with images that say nothing of its texts.
_IMAGE_FIELDS = frozenset(
    """
    vision_config image_token_id video_token_id vision_start_token_id vision_end_token_id
    image_token_index boi_token_index eoi_token_index mm_tokens_per_image initializer_range
    audio_config boi_token_id eoi_token_id boa_token_id eoa_token_id eoa_token_index audio_token_id
    vision_soft_tokens_per_image multimodal_projector_bias projector_hidden_act spatial_merge_size
    vision_feature_layer
    """.split()
)
# Fields that outweigh those of the text.
_OUTWEIGHING_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")

_KNOWN_FIELDS = frozenset(
    """
    model_type num_key_value_heads head_dim hidden_act rope_theta rope_scaling rope_parameters
    partial_rotary_factor eos_token_id
    """.split()
).union(_REQUIRED, _SAME)

# Known options that would change the forward pass, and the only value that is supported.
_UNSUPPORTED: dict[str, object] = {
    "attention_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "router_jitter_noise": 0.0,
    "rope_interleaved": False,
    "use_bidirectional_attention": False,
}


def read_fields(config: Fields, defaults: Fields) -> Fields:
    """Reads the fields of ``DecoderConfig`` from a parsed config.json.

    A null stands for the default where that is 0 or False.

    Args:
      config: the parsed config.json.
      defaults: the defaults of ``DecoderConfig``.

    Returns:
      Field -> value.

    Raises:
      ConfigError: names the fields that are missing, unsupported or unknown.
    """
    config = _text_fields(config)
    check_supported("model_type", config.get("model_type"), FAMILIES)
    family = FAMILIES[config["model_type"]]
    config = _without_overrides(family, config)
    fields_with_defaults = {**family.defaults, **config}
    missing = [name for name in _REQUIRED if fields_with_defaults.get(name) is None]
    if missing:
        raise ConfigError(
            f"config.json lacks {', '.join(missing)}. Add these fields, or download the model "
            "again."
        )
    unsupported = {**_UNSUPPORTED, **family.refuses}
    check_no_unknown_fields(config, family.model_type, _KNOWN_FIELDS | family.reads, unsupported)

    def get(name: str, default: object = None) -> Any:
        return config.get(name, family.defaults.get(name, default))

    def switch(name: str) -> bool:
        return read_boolean(name, get(name))

    attention_bias = switch("attention_bias")
    # Fields under the same name in both; null stands for 0 and False.
    common_fields = {}
    for name in (*_SAME, *_SAME_WHERE_READ):
        default = defaults[name]
        value = get(name, default)
        if value is None and default in (0, False):
            value = default
        common_fields[name] = value
    return {
        "model_type": family.model_type,
        **{name: get(name) for name in _REQUIRED},
        **common_fields,
        "num_key_value_heads": _read_kv_heads(get),
        "head_dim": _read_head_dim(get),
        "hidden_act": _read_activation(family, get),
        **read_rope(family, config, get),
        "qk_norm": switch("use_qk_norm"),
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
        **_read_layers(family, get("num_hidden_layers"), get),
        "rope_free_layers": family.rope_free(get, get("num_hidden_layers")),
        **_read_experts(family, get),
        "eos_token_ids": read_eos(config),
        **family.traits,
    }


def write_fields(fields: Fields) -> dict[str, object]:
    """Writes the fields of ``DecoderConfig`` as a config.json for transformers 4 and 5.

    Args:
      fields: field -> value.

    Returns:
      A dict of plain JSON values.
    """
    family = FAMILIES[fields["model_type"]]
    family_names = family.reads
    optional_names = family_names & {
        *_SAME_WHERE_READ,
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "sliding_window",
    }
    names = ("model_type", "num_key_value_heads", "head_dim", *_REQUIRED, *_SAME)
    out = {name: fields[name] for name in (*names, *sorted(optional_names))}
    out |= {hf_name: fields[name] for hf_name, name in family.writes.items()}
    out["architectures"] = [family.architecture]
    activation_name = "hidden_act"
    if "hidden_activation" in family_names:
        activation_name = "hidden_activation"
    out[activation_name] = fields["hidden_act"]
    out["eos_token_id"] = write_eos(fields["eos_token_ids"])
    if "attention_bias" in family_names:
        out["attention_bias"] = fields["qkv_bias"]
    if "n_shared_experts" in family_names:
        shared = fields["shared_expert_intermediate_size"]
        out["n_shared_experts"] = shared // fields["moe_intermediate_size"]
    if "kv_lora_rank" in family_names:  # transformers' name of those that are rotated
        out["head_dim"] = fields["qk_rope_head_dim"]
    if "use_sliding_window" in family_names:
        out["use_sliding_window"] = fields["sliding_window"] is not None
    # The kinds of layers, one entry for each.
    layers = range(fields["num_hidden_layers"])
    if "no_rope_layers" in family_names:
        out["no_rope_layers"] = [int(i not in fields["rope_free_layers"]) for i in layers]
    if "layer_types" in family_names:
        kinds = dict.fromkeys(layers, "full_attention")
        kinds |= dict.fromkeys(fields["windowed_layers"], "sliding_attention")
        kinds |= dict.fromkeys(fields["linear_layers"], "linear_attention")
        out["layer_types"] = list(kinds.values())
    return {**out, **write_rope(family, fields)}


def _without_overrides(family: DecoderFamily, config: Fields) -> Fields:
    """Returns the fields with per_layer_config resolved to fields of global layers."""
    listed = config.get("per_layer_config")
    if "per_layer_config" not in family.reads:
        return config
    if not listed:  # heads of another number are for layers whose keys are values
        unused = () if config.get("attention_k_eq_v") else ("num_global_key_value_heads",)
        return {name: value for name, value in config.items() if name not in unused}
    # All layers of full attention must be listed, with the same values of the two known fields.
    types = config.get("layer_types") or ()
    full_layers = {str(i) for i, kind in enumerate(types) if kind == "full_attention"}
    first, *others = listed.values()
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    lists_other_layers = set(listed) != full_layers
    differs = any(first != other for other in others)
    has_unknown_fields = bool(set(first) - set(names))
    if lists_other_layers or differs or has_unknown_fields:
        raise ConfigError(
            f"per_layer_config {dict(listed)} is not supported. Use only head_dim and "
            "num_key_value_heads, with the same values in all layers of full_attention."
        )
    return {**config, **{names[name]: value for name, value in first.items()}}


def _text_fields(config: Fields) -> Fields:
    """Returns the decoder's fields, which a model with images stores in text_config."""
    kind: Any = config.get("model_type")
    of_text = [name for name, family in FAMILIES.items() if kind and family.with_images == kind]
    if not of_text:  # a model of texts alone
        return config
    tied = "tie_word_embeddings"
    text = config.get("text_config")
    check_no_unknown_fields(
        config, kind, _IMAGE_FIELDS | {"model_type", "text_config", tied, *_OUTWEIGHING_FIELDS}
    )
    if not isinstance(text, Mapping):
        raise ConfigError(
            f"config.json of {kind} lacks text_config. Add the text model's fields there, or "
            "download the model again."
        )
    model_type = text.get("model_type", of_text[0])
    if model_type not in of_text:
        raise ConfigError(
            f"text_config has model_type {model_type!r}, which {kind} cannot have. Use "
            f"{' or '.join(of_text)}."
        )
    tied_values = {read_boolean(tied, fields[tied]) for fields in (config, text) if tied in fields}
    if FAMILIES[model_type].tied_with_images and config.get(tied) is None:
        tied_values = {True}  # whatever text_config says
    if len(tied_values) > 1:
        raise ConfigError(
            f"{tied} has one value in config.json of {kind}, and another in its text_config. Set "
            "both to the same value."
        )
    outer = {name: config[name] for name in _OUTWEIGHING_FIELDS if config.get(name) is not None}
    text_fields = {**text, **outer, "model_type": model_type}
    if tied_values:
        text_fields[tied] = True in tied_values
    return text_fields


def _read_activation(family: DecoderFamily, get: Get) -> str:
    """Reads the activation; for Gemma, hidden_activation has priority."""
    plain = get("hidden_act")
    if "hidden_activation" not in family.reads:
        return plain or "silu"
    chosen: str = get("hidden_activation")
    if plain not in (None, chosen):
        raise ConfigError(
            f"hidden_act={plain!r} contradicts hidden_activation={chosen!r}, which "
            f"{family.model_type} uses. Remove hidden_act."
        )
    return chosen


def _read_kv_heads(get: Get) -> Any:
    heads = get("num_key_value_heads")
    return get("num_attention_heads") if heads is None else heads


def _read_head_dim(get: Get) -> Any:
    if get("kv_lora_rank"):
        return get("qk_nope_head_dim") + get("qk_rope_head_dim")
    head_dim = get("head_dim")
    return get("hidden_size") // get("num_attention_heads") if head_dim is None else head_dim


def _read_experts(family: DecoderFamily, get: Get) -> Fields:
    """Reads the fields of experts; {} for dense families."""
    if family.experts is None:
        return {}
    count, size = family.experts(get)
    shared = {}
    if "n_shared_experts" in family.reads:
        shared = {"shared_expert_intermediate_size": (get("n_shared_experts") or 0) * size}
    return shared | {
        "num_experts": count,
        "num_experts_per_tok": get("num_experts_per_tok"),
        "moe_intermediate_size": size,
        "norm_topk_prob": read_boolean("norm_topk_prob", get("norm_topk_prob")),
    }


def _read_layers(family: DecoderFamily, n_layers: int, get: Get) -> Fields:
    """Reads the sliding window, its layers, and the linear layers."""
    window = get("sliding_window") if "sliding_window" in family.reads else None
    switch = "use_sliding_window"
    if switch in family.reads and not read_boolean(switch, get(switch)):
        window = None
    types = get("layer_types") if "layer_types" in family.reads else None
    if types is None:
        windowed = () if window is None else tuple(family.windowed(get, n_layers))
        linear = family.linear(get, n_layers) if family.linear else ()
    else:
        known = {"full_attention", "linear_attention" if family.linear else "sliding_attention"}
        if set(types) - known or len(types) != n_layers:
            raise ConfigError(
                f"layer_types {list(types)} do not describe {n_layers} layers. Give one of "
                f"{' and '.join(sorted(known))} for each layer."
            )
        windowed = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
        linear = tuple(i for i, kind in enumerate(types) if kind == "linear_attention")
        if windowed and window is None:
            raise ConfigError(
                "layer_types has sliding_attention, but no sliding_window is in use. Set "
                "sliding_window, or use full_attention."
            )
    return {
        "sliding_window": window if windowed else None,
        "windowed_layers": windowed if window else (),
        "linear_layers": linear,
    }
