"""DeepSeek-V3 and V3.1; Kimi K2's configuration is read in the same way."""

from lora_jax.models.decoder.families import glm
from lora_jax.models.decoder.families.family import DecoderFamily

DEEPSEEK_V3 = DecoderFamily(
    model_type="deepseek_v3",
    other_types=("kimi_k2",),
    architecture="DeepseekV3ForCausalLM",
    reads=glm.MIXTURE
    | frozenset(
        """
        q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim qk_head_dim v_head_dim
        rope_interleave aux_loss_alpha seq_aux ep_size
        """.split()
    ),
    defaults={
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 2048,
        "num_experts_per_tok": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleave": True,
    },
    refuses={"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    traits={"sigmoid_router": True},
    rope_kinds=("yarn",),
    experts=glm.read_experts,
    writes={"n_routed_experts": "num_experts"},
    shared_name="shared_experts",
    shared_is_gated=False,
    left_out=glm.LEFT_OUT,
    default_targets=None,
)
