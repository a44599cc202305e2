"""The shapes of the model whose steps a check runs."""

from typing import Any

_GIB = 2**30
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def choose_shapes(platform: str, memory: int | None) -> tuple[str, dict[str, Any]]:
    """Returns the name and the fields of config.json of a model that fits.

    Args:
      platform: the platform of the devices.
      memory: the bytes of a device; None if they are not known.
    """
    if platform == "cpu":  # which takes seconds for a step of this one
        return "60M", _make_fields(768, 8, heads=12, kv_heads=4, vocab=16_384, longest=4096)
    if memory is not None and memory < 8 * _GIB:
        return "135M", _make_fields(576, 30, heads=9, kv_heads=3, vocab=49_152, longest=131_072)
    return "1B", _make_fields(2048, 16, heads=32, kv_heads=8, vocab=128_256, longest=131_072)


def _make_fields(
    hidden: int, layers: int, *, heads: int, kv_heads: int, vocab: int, longest: int
) -> dict[str, Any]:
    return _LLAMA | {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden if hidden > 1024 else 8 * hidden // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": longest,
        "tie_word_embeddings": True,
    }
