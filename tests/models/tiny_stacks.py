"""Tiny decoders whose layers lie in several stacks: dense and sparse, of wide and narrow heads."""

from typing import Any

# Routers of sigmoids: two groups of three experts, of which a token sees one.
ROUTED = {
    "moe_intermediate_size": 13,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.7,
}
LATENT = {
    "num_key_value_heads": None,
    "head_dim": 4,
    "q_lora_rank": 15,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}

# See tiny.CASES.
CASES: dict[str, dict[str, Any]] = {
    "glm4 moe": {
        "model_type": "glm4_moe",
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        **ROUTED,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "partial_rotary_factor": 0.6,
    },
    "glm4 moe without norms": {
        "model_type": "glm4_moe",
        "first_k_dense_replace": 0,
        **ROUTED,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
    },
    "deepseek v3": {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 5,
        "first_k_dense_replace": 2,
        **ROUTED,
        **LATENT,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 300.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
        },
    },
    "deepseek v3 with other options": {
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 0,
        **ROUTED,
        **LATENT,
        "q_lora_rank": None,
        "rope_interleave": False,
        "hidden_act": "gelu",
    },
    "gemma4": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 6,
        "head_dim": 6,
        "global_head_dim": 12,
        "num_key_value_heads": 3,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 4,
        "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full")] * 2,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 300.0,
                "partial_rotary_factor": 0.5,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 40.0},
        },
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": False,
    },
    "gemma4 with layers that share keys": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 8,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "global_head_dim": 12,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "hidden_size_per_layer_input": 9,
        "vocab_size_per_layer_input": 61,
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": True,
        "attention_bias": True,
    },
}
