"""gpt-oss, with experts in floats."""

from lora_jax.hf.fields import ConfigError
from lora_jax.models.decoder.families.family import DecoderFamily, Get

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read_experts(get: Get) -> tuple[int, int]:
    """Returns the number of experts and their inner size."""
    n_chosen = get("num_experts_per_tok")
    n_chosen_again = get("experts_per_token")  # a second name of the same field
    if n_chosen_again not in (None, n_chosen):
        raise ConfigError(
            f"experts_per_token={n_chosen_again} contradicts num_experts_per_tok={n_chosen}. "
            "Remove one of the two fields."
        )
    return get("num_local_experts"), get("intermediate_size")


GPT_OSS = DecoderFamily(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    reads=frozenset(
        """
        attention_bias sliding_window layer_types num_local_experts num_experts_per_tok
        experts_per_token initial_context_length swiglu_limit swiglu_alpha
        """.split()
    ),
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "sliding_window": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": _YARN,
        "max_position_embeddings": 131072,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
    },
    traits={
        "norm_multiplies_wide": True,
        "norm_topk_prob": True,
        "expert_biases": True,
        "sinks": True,
    },
    windowed=lambda get, n_layers: range(0, n_layers, 2),
    experts=_read_experts,
    writes={"num_local_experts": "num_experts"},
    router_name="router",
    expert_names=("gate_up_proj", "down_proj"),
    gguf="gpt-oss",
    default_targets=None,
)
