"""Qwen2, Qwen3, Qwen3-MoE, Qwen3-Next and the text models of Qwen3.5."""

import re

from lora_jax.core.types import Fields
from lora_jax.hf.fields import ConfigError
from lora_jax.models.decoder.families.family import DecoderFamily, Get

_WINDOW = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
_DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768}


def _layers_with_window(get: Get, n_layers: int) -> range:
    return range(get("max_window_layers", 28), n_layers)


QWEN2 = DecoderFamily(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    reads=_WINDOW,
    defaults=_DEFAULTS,
    traits={"qkv_bias": True},
    windowed=_layers_with_window,
    gguf="qwen2",
    reads_gguf=True,
)

QWEN3 = DecoderFamily(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    reads=_WINDOW | {"attention_bias"},
    defaults={**_DEFAULTS, "head_dim": 128},
    traits={"qk_norm": True},
    windowed=_layers_with_window,
    gguf="qwen3",
    reads_gguf=True,
)

_ALL_SPARSE = "Either all layers of a model have experts, or none. Use another model."


def _read_experts(get: Get) -> tuple[int, int]:
    """Returns the number of experts and their inner size; rejects dense layers."""
    sparse_step = get("decoder_sparse_step", 1)
    dense_layers = list(get("mlp_only_layers") or ())
    if sparse_step != 1:
        raise ConfigError(
            f"decoder_sparse_step={sparse_step} is not supported, only 1 is. {_ALL_SPARSE}"
        )
    if dense_layers:
        raise ConfigError(
            f"mlp_only_layers={dense_layers} is not supported, only [] is. {_ALL_SPARSE}"
        )
    # transformers 5 writes num_experts as num_local_experts
    return get("num_local_experts") or get("num_experts"), get("moe_intermediate_size")


QWEN3_MOE = DecoderFamily(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    reads=frozenset(
        """
        attention_bias use_sliding_window sliding_window num_experts num_local_experts
        num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers
        """.split()
    ),
    defaults={
        **_DEFAULTS,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    },
    refuses={"use_qk_norm": True, "shared_expert_intermediate_size": 0},
    traits={"qk_norm": True},
    experts=_read_experts,
    gguf="qwen3moe",
    default_targets=None,
)


def _linear_layers(get: Get, n_layers: int) -> tuple[int, ...]:
    interval = get("full_attention_interval", 4)  # the last of so many layers has attention
    return tuple(layer for layer in range(n_layers) if (layer + 1) % interval != 0)


_LINEAR = frozenset(
    """
    attention_bias layer_types full_attention_interval partial_rotary_factor linear_num_key_heads
    linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim
    """.split()
)
_MIXTURE = frozenset(
    """
    num_experts num_local_experts num_experts_per_tok moe_intermediate_size
    shared_expert_intermediate_size
    """.split()
)
_OF_MTP = frozenset({"mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"})
_LINEAR_DEFAULTS: Fields = {
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.25,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
_MIXTURE_DEFAULTS: Fields = {
    **_LINEAR_DEFAULTS,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
_REFUSED = {"attn_output_gate": True, "output_gate_type": "swish", "mamba_ssm_dtype": "float32"}
_GATED = {"qk_norm": True, "norm_adds_one": True, "attn_output_gate": True}
_LEFT_OUT = re.compile(r"(mtp|(model\.)?visual)\..*")

QWEN3_NEXT = DecoderFamily(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    reads=_LINEAR | _MIXTURE | {"norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"},
    defaults={
        **_MIXTURE_DEFAULTS,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "norm_topk_prob": True,
    },
    refuses=_REFUSED,
    traits={**_GATED, "linear_projections_joined": True},
    linear=_linear_layers,
    experts=_read_experts,
    left_out=_LEFT_OUT,
    default_targets=None,
)

QWEN3_5 = DecoderFamily(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    reads=_LINEAR | _OF_MTP,
    defaults={**_LINEAR_DEFAULTS, "num_key_value_heads": 4},
    refuses={**_REFUSED, "mlp_only_layers": []},
    traits=_GATED,
    linear=_linear_layers,
    with_images="qwen3_5",
    left_out=_LEFT_OUT,
    default_targets=None,
)

QWEN3_5_MOE = DecoderFamily(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    reads=_LINEAR | _MIXTURE | _OF_MTP,
    defaults={
        **_MIXTURE_DEFAULTS,
        "intermediate_size": 0,
        "num_experts": 256,
        "num_experts_per_tok": 8,
    },
    refuses={**_REFUSED, "mlp_only_layers": []},
    traits={**_GATED, "norm_topk_prob": True},
    linear=_linear_layers,
    experts=_read_experts,
    with_images="qwen3_5_moe",
    left_out=_LEFT_OUT,
    default_targets=None,
)
