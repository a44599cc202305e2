"""Tiny decoders of the families that are written as GGUF files, and their tokenizer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from lora_jax.hf.gguf.tokenizer import build_tokenizer
from lora_jax.models import Decoder, DecoderConfig
from tests.hf.vocabularies import TEMPLATE, byte_level, sentencepiece
from tests.models.tiny import LLAMA3_ROPE, draw

_UNUSED_ROWS = 3
# Rows of q8_0's blocks of 32; no two sizes are equal, but for hidden = heads * head_dim in some.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2", "head_dim": 16},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "rope_theta": 900.0,
        "rope_local_base_freq": 40.0,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        "tie_word_embeddings": True,
    },
    "phi3": {"model_type": "phi3", "head_dim": 16, "sliding_window": None},
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "sliding_window": 8,
        "rope_theta": 150.0,
        "rope_scaling": {**_YARN, "truncate": True},
    },
}


@functools.cache
def words() -> Any:
    """Returns the tokenizer: Llama 3's splits."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=byte_level("llama-bpe"), bos_token="<|begin|>", eos_token="<|im_end|>"
    )
    made.chat_template = TEMPLATE
    return made


PHI3_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@functools.cache
def phi3_words(*whole: str) -> Any:
    """Returns a tokenizer like Phi-3's, whose special tokens take the spaces behind them along.

    Args:
      whole: further special tokens, behind which spaces stay.
    """
    core, special = build_tokenizer(sentencepiece())
    core.pre_tokenizer = None
    space = "\u2581"
    steps = [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    core.normalizer = normalizers.Sequence(steps)
    core.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    for token in ("<|endoftext|>", *whole):
        core.add_special_tokens([AddedToken(token, special=True)])
    for role in ("assistant", "end", "user", "system"):
        token = AddedToken(f"<|{role}|>", special=True, rstrip=True, normalized=False)
        core.add_special_tokens([token])
    made = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    made.chat_template = PHI3_TEMPLATE
    return made


def fields_of(family: str, **changed: Any) -> dict[str, Any]:
    """Returns the config.json of a family's tiny model."""
    tokenizer = words()
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos")}
    size = {"vocab_size": len(tokenizer) + _UNUSED_ROWS}
    return {**SIZES, **size, **ids, **FAMILIES[family], **changed}


def make(family: str, **changed: Any) -> tuple[Decoder, Any]:
    """Returns the model and random parameters."""
    model = Decoder(DecoderConfig.from_hf(fields_of(family, **changed)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(3)
    return model, jax.tree_util.tree_map_with_path(
        lambda path, leaf: draw(rng, jax.tree_util.keystr(path), leaf.shape), shapes
    )
