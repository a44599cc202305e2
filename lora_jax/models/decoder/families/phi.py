"""Phi-3."""

from lora_jax.models.decoder.families.family import DecoderFamily

PHI3 = DecoderFamily(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    reads=frozenset(
        {"sliding_window", "original_max_position_embeddings", "partial_rotary_factor"}
    ),
    defaults={
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    },
    refuses={"full_attn_mod": 1, "interpolate_factor": 1},
    traits={"fused_projections": True},
    rope_kinds=("longrope",),
    rope_aliases={"su": "longrope", "yarn": "longrope"},
    gguf="phi3",
    default_targets=None,
)
