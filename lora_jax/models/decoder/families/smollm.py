"""SmolLM3. (SmolLM and SmolLM2 are Llamas.)"""

from lora_jax.models.decoder.families.family import DecoderFamily, Get


def _rope_free(get: Get, n_layers: int) -> tuple[int, ...]:
    every = get("no_rope_layer_interval")
    rotated = get("no_rope_layers") or [(i + 1) % every for i in range(n_layers)]
    return tuple(i for i in range(n_layers) if not rotated[i])


SMOLLM3 = DecoderFamily(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    reads=frozenset(
        """
        attention_bias mlp_bias no_rope_layers no_rope_layer_interval use_sliding_window
        sliding_window layer_types
        """.split()
    ),
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2e6,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    windowed=_rope_free,
    rope_free=_rope_free,
    default_targets=None,
)
