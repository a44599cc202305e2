"""Granite 3: the dense models."""

from lora_jax.models.decoder.families.family import DecoderFamily

GRANITE = DecoderFamily(
    model_type="granite",
    architecture="GraniteForCausalLM",
    reads=frozenset(
        """
        attention_bias mlp_bias embedding_multiplier residual_multiplier attention_multiplier
        logits_scaling
        """.split()
    ),
    defaults={"attention_multiplier": 1.0},
    default_targets=None,
)
