"""Mistral and Mixtral."""

from lora_jax.models.decoder.families.family import DecoderFamily

MISTRAL = DecoderFamily(
    model_type="mistral",
    architecture="MistralForCausalLM",
    reads=frozenset({"sliding_window"}),
    defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
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
