"""Mistral, Mixtral and Ministral 3."""

import re

from lora_jax.models.decoder.families.family import DecoderFamily

_LEFT_OUT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")

MISTRAL = DecoderFamily(
    model_type="mistral",
    architecture="MistralForCausalLM",
    reads=frozenset({"sliding_window"}),
    defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    with_images="mistral3",
    tied_with_images=True,
    left_out=_LEFT_OUT,
)

MINISTRAL3 = DecoderFamily(
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    reads=frozenset({"sliding_window", "llama_4_scaling_beta"}),
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "rope_theta": 1e6,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    rope_kinds=("yarn",),
    with_images="mistral3",
    tied_with_images=True,
    left_out=_LEFT_OUT,
    default_targets=None,
)

MIXTRAL = DecoderFamily(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    reads=frozenset({"sliding_window", "num_local_experts", "num_experts_per_tok"}),
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 131072,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    traits={"norm_topk_prob": True},
    experts=lambda get: (get("num_local_experts"), get("intermediate_size")),
    writes={"num_local_experts": "num_experts"},
    mlp_name="block_sparse_moe",
    expert_names=("w1", "w3", "w2"),
)
