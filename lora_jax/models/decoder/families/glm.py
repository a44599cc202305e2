"""GLM-4.5 and 4.6: the mixtures of experts of GLM-4."""

import re

from lora_jax.models.decoder.families.family import DecoderFamily, Get

# The fields of a mixture whose router is of sigmoids; DeepSeek's have the same.
MIXTURE = frozenset(
    """
    attention_bias moe_intermediate_size num_experts_per_tok norm_topk_prob n_routed_experts
    num_local_experts n_shared_experts routed_scaling_factor n_group topk_group
    first_k_dense_replace num_nextn_predict_layers num_mtp_layers
    """.split()
)
LEFT_OUT = re.compile(r"further\..*")  # see ``keys.decoder_name``


def read_experts(get: Get) -> tuple[int, int]:
    """Returns the number of experts, under either name, and their inner size."""
    return get("num_local_experts") or get("n_routed_experts"), get("moe_intermediate_size")


GLM4_MOE = DecoderFamily(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    reads=MIXTURE | {"use_qk_norm", "partial_rotary_factor"},
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "partial_rotary_factor": 0.5,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
    },
    traits={"sigmoid_router": True, "o_bias": False},
    experts=read_experts,
    writes={"n_routed_experts": "num_experts", "use_qk_norm": "qk_norm"},
    shared_name="shared_experts",
    shared_is_gated=False,
    left_out=LEFT_OUT,
    default_targets=None,
)
