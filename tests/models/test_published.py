"""config.json as it is published with models."""

import math
from typing import Any

import pytest

from lora_jax.models import ConfigError, DecoderConfig, key_table

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
    "Kimi K2": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "aux_loss_alpha": 0.001,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "initializer_range": 0.02,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 131072,
        "model_type": "kimi_k2",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 384,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 163840,
    },
    "GLM-4.5-Air": {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338],
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "max_position_embeddings": 131072,
        "model_type": "glm4_moe",
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 96,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 46,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": False,
        "vocab_size": 151552,
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
    with pytest.raises(ConfigError, match="'llama', which .* Use mistral or ministral3"):
        DecoderConfig.from_hf({**PUBLISHED["Ministral 3, 8B"], "text_config": text})
    with pytest.raises(ConfigError, match=r"llama_4_scaling_beta=0.1 is not supported for llama"):
        DecoderConfig.from_hf(text)


def size(config: DecoderConfig) -> int:
    """The number of parameters."""
    return sum(math.prod(row.stacked_shape) for row in key_table(config))


def test_mixtures_behind_dense_layers() -> None:
    kimi, glm = read("Kimi K2"), read("GLM-4.5-Air")
    assert kimi.model_type == "deepseek_v3"  # which transformers and engines know
    assert (kimi.head_dim, kimi.rotary_dim, kimi.num_experts) == (192, 64, 384)
    assert kimi.score_scale == pytest.approx(192**-0.5 * (0.1 * math.log(32) + 1) ** 2)
    assert kimi.stacks == {"dense": range(1), "sparse": range(1, 61)}
    assert kimi.place_of(60) == ("model/layers/sparse", 59)
    assert round(size(kimi) / 1e9) == 1026
    assert (glm.qkv_bias, glm.o_bias, glm.qk_norm, glm.rotary_dim) == (True, False, False, 64)
    assert glm.shared_expert_intermediate_size == 1408
    assert round(size(glm) / 1e9) == 107
    deepseek = {**PUBLISHED["Kimi K2"], "model_type": "deepseek_v3", "vocab_size": 129280}
    deepseek |= {"num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256}
    deepseek |= {"n_group": 8, "topk_group": 4, "first_k_dense_replace": 3}
    assert round(size(DecoderConfig.from_hf(deepseek)) / 1e9) == 671


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Kimi K2", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        ("Kimi K2", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
        (
            "Kimi K2",
            {"num_key_value_heads": 8},
            "num_key_value_heads .8. differs from num_attention_h",
        ),
        ("Kimi K2", {"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63, but"),
        ("Kimi K2", {"n_group": 5}, "num_experts .384. cannot be divided into n_group .5."),
        ("Kimi K2", {"topk_group": 2}, "topk_group is 2, .* between 1 and n_group .1."),
        ("GLM-4.5-Air", {"q_lora_rank": 5}, "q_lora_rank=5 is not known for glm4_moe"),
        ("GLM-4.5-Air", {"n_group": 64}, "num_experts_per_tok is 8, .* from 1 to 2"),
    ],
)
def test_refusals_name_the_field(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecoderConfig.from_hf({**PUBLISHED[name], **changes})
