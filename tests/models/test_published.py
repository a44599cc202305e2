"""config.json as it is published with models."""

import math
from typing import Any

import pytest

from lora_jax.models import ConfigError, DecoderConfig

PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 201088,
    },
    "OLMo 3, 7B": {
        "model_type": "olmo3",
        "attention_bias": False,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "rope_theta": 500000,
        "sliding_window": 4096,
        "vocab_size": 100278,
    },
    "Gemma 3, 4B": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    },
    "Ministral 3, 8B": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": {
            "attention_dropout": 0.0,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 262144,
            "model_type": "ministral3",
            "num_attention_heads": 32,
            "num_hidden_layers": 34,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 16.0,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 16384,
                "rope_theta": 1000000.0,
                "rope_type": "yarn",
                "type": "yarn",
            },
            "sliding_window": None,
            "vocab_size": 131072,
        },
        "vision_config": {"model_type": "pixtral"},
        "vision_feature_layer": -1,
    },
}


def read(name: str) -> DecoderConfig:
    """A published configuration, which is written as it is read."""
    config = DecoderConfig.from_hf(PUBLISHED[name])
    assert DecoderConfig.from_hf(config.to_hf()) == config
    return config


def test_published_configurations() -> None:
    gpt_oss, olmo = read("gpt-oss-20b"), read("OLMo 3, 7B")
    assert gpt_oss.rope_scaling is not None and not gpt_oss.rope_scaling.truncate
    assert gpt_oss.rope_scaling.attention_factor == pytest.approx(0.1 * math.log(32) + 1)
    assert gpt_oss.windowed_layers == tuple(range(0, 24, 2)) and gpt_oss.o_bias and gpt_oss.sinks
    assert (gpt_oss.num_experts, gpt_oss.swiglu_limit, gpt_oss.swiglu_alpha) == (32, 7.0, 1.702)
    assert gpt_oss.expert_shapes == {"gate_up_proj": (2880, 5760), "down_proj": (2880, 2880)}
    assert olmo.rope_local_theta == olmo.rope_theta == 5e5 and olmo.rope_scaling is not None
    assert olmo.windowed_layers == tuple(i for i in range(32) if (i + 1) % 4)


def test_the_texts_of_models_with_images() -> None:
    gemma, ministral = read("Gemma 3, 4B"), read("Ministral 3, 8B")
    assert (gemma.vocab_size, gemma.num_attention_heads, gemma.head_dim) == (262208, 8, 256)
    assert gemma.eos_token_ids == (1, 106) and gemma.tie_word_embeddings
    assert gemma.windowed_layers == tuple(i for i in range(34) if (i + 1) % 6)
    assert gemma.model_type == "gemma3_text" and ministral.model_type == "ministral3"
    scaling = ministral.rope_scaling
    assert scaling is not None and scaling.llama_4_scaling_beta == 0.1
    assert (scaling.attention_factor, ministral.windowed_layers) == (1.0, ())
    text = {**PUBLISHED["Ministral 3, 8B"]["text_config"], "model_type": "llama"}
    with pytest.raises(ConfigError, match="'llama': not mistral or ministral3"):
        DecoderConfig.from_hf({**PUBLISHED["Ministral 3, 8B"], "text_config": text})
    with pytest.raises(ConfigError, match=r"llama_4_scaling_beta=0.1 is not supported for llama"):
        DecoderConfig.from_hf(text)
