"""OLMo 2 and OLMo 3."""

from lora_jax.core.types import Fields
from lora_jax.models.decoder.families.family import DecoderFamily

_TRAITS: Fields = {
    "pre_norms": False,
    "post_norms": True,
    "norm_multiplies_wide": True,
    "qk_norm": True,
    "qk_norm_joins_heads": True,
}

OLMO2 = DecoderFamily(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    reads=frozenset({"attention_bias"}),
    defaults={"rms_norm_eps": 1e-5},
    refuses={"clip_qkv": None},
    traits=_TRAITS,
    default_targets=None,
)

OLMO3 = DecoderFamily(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    reads=frozenset({"attention_bias", "sliding_window", "layer_types"}),
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "sliding_window": 4096},
    refuses={"clip_qkv": None},
    traits=_TRAITS,
    windowed=lambda get, n_layers: tuple(i for i in range(n_layers) if (i + 1) % 4),
    windows_rotate_apart=True,
    default_targets=None,
)
