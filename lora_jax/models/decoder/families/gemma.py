"""Gemma 2 and the text models of Gemma 3 and 4."""

import re

from lora_jax.core.types import Fields
from lora_jax.models.decoder.families.family import DecoderFamily

_DEFAULTS: Fields = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
}
_TRAITS = {"norm_adds_one": True, "post_norms": True, "scale_embeddings": True}
_READS = frozenset(
    """
    attention_bias hidden_activation query_pre_attn_scalar sliding_window layer_types
    final_logit_softcapping
    """.split()
)


def _layers_with_window(interval: int, n_layers: int) -> tuple[int, ...]:
    """Returns all layers but the last of each ``interval``."""
    return tuple(layer for layer in range(n_layers) if (layer + 1) % interval != 0)


GEMMA2 = DecoderFamily(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    reads=_READS | {"attn_logit_softcapping"},
    defaults={
        **_DEFAULTS,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    traits=_TRAITS,
    windowed=lambda get, n_layers: _layers_with_window(2, n_layers),
)

GEMMA3 = DecoderFamily(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    reads=_READS | {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"},
    defaults={
        **_DEFAULTS,
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    traits={**_TRAITS, "qk_norm": True},
    windows_rotate_apart=True,
    windowed=lambda get, n: _layers_with_window(get("sliding_window_pattern", 6), n),
    with_images="gemma3",
    left_out=re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*"),
    gguf="gemma3",
)

GEMMA4 = DecoderFamily(
    model_type="gemma4_text",
    architecture="Gemma4ForCausalLM",
    reads=frozenset(
        """
        attention_bias hidden_activation sliding_window layer_types final_logit_softcapping
        global_head_dim num_global_key_value_heads per_layer_config attention_k_eq_v
        num_kv_shared_layers use_double_wide_mlp hidden_size_per_layer_input
        vocab_size_per_layer_input
        """.split()
    ),
    defaults={
        **_DEFAULTS,
        "vocab_size": 262144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "query_pre_attn_scalar": None,
        "max_position_embeddings": 131072,
        "sliding_window": 512,
        "global_head_dim": 512,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.25,
            },
        },
    },
    refuses={"use_bidirectional_attention": "vision", "enable_moe_block": False},
    declines=("enable_moe_block",),
    traits={
        "attention_multiplier": 1.0,
        "layer_scalars": True,
        "norm_multiplies_wide": True,
        "post_norms": True,
        "qk_norm": True,
        "scale_embeddings": True,
        "value_norm": True,
    },
    windows_rotate_apart=True,
    windowed=lambda get, n: tuple(i for i in _layers_with_window(6, n) if i < n - 1),
    rope_kinds=("proportional",),
    with_images="gemma4",
    left_out=re.compile(
        r"unused\..*|(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio)\..*"
    ),
    default_targets=None,
)
