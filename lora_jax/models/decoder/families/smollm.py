"""SmolLM3. (SmolLM and SmolLM2 are Llamas.)"""

from lora_jax.models.decoder.families.family import DecoderFamily, Get


def _layers_without_rope(get: Get, n_layers: int) -> tuple[int, ...]:
    """Returns the indices of the layers without RoPE."""
    layers = range(n_layers)
    has_rope = get("no_rope_layers")  # 1 for a layer with RoPE, and 0 for one without
    if not has_rope:
        interval = get("no_rope_layer_interval")
        has_rope = [(layer + 1) % interval != 0 for layer in layers]
    return tuple(layer for layer in layers if not has_rope[layer])


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
    windowed=_layers_without_rope,
    rope_free=_layers_without_rope,
    default_targets=None,
)
