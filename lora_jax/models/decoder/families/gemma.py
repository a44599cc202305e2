"""Gemma 2 and the text models of Gemma 3."""

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


def _all_but_each_last(pattern: int, n_layers: int) -> tuple[int, ...]:
    return tuple(i for i in range(n_layers) if (i + 1) % pattern)


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
    windowed=lambda get, n_layers: _all_but_each_last(2, n_layers),
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
    windowed=lambda get, n: _all_but_each_last(get("sliding_window_pattern", 6), n),
    with_images="gemma3",
    left_out=re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*"),
    gguf="gemma3",
)
