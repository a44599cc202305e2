"""A tiny random decoder with a tokenizer of bytes, as a folder that `--model` accepts."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from lora_jax.models import Decoder, DecoderConfig, hf_tensors, key_table
from tests.models.tiny import draw

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops what an assistant thought (before the bar) from all turns but the last.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('|')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
CONFIG = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 258,
    "pad_token_id": 256,
}


def tokenizer(template: str | None = CHATML) -> Any:
    """One token a byte, and the special tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        tokenizer_models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>"
    )
    made.chat_template = template
    return made


@functools.cache
def decoder(**fields: Any) -> tuple[Decoder, dict[str, Any]]:
    """A decoder of two layers with random weights; `fields` change its configuration."""
    model = Decoder(DecoderConfig.from_hf(CONFIG | fields))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(3)
    return model, jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(draw(rng, jax.tree_util.keystr(path), leaf.shape)),
        shapes,
    )


def write_model(
    folder: Path, template: str | None = CHATML, *, scale: float = 1.0, **fields: Any
) -> Path:
    """Writes the decoder, its parameters times `scale`, and its tokenizer."""
    model, params = decoder(**fields)
    params = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(scale), params)
    tokenizer(template).save_pretrained(folder)
    save_file(dict(hf_tensors(params, key_table(model.config))), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))
    return folder


def write_rows(path: Path, n: int = 24) -> Path:
    """A JSONL file of prompts and completions, of different lengths."""
    rows = [
        {"prompt": f"{i} plus {i * 7}?", "completion": str(i * 8) * (1 + i % 3)} for i in range(n)
    ]
    return write_jsonl(path, rows)


def write_jsonl(path: Path, rows: list[Mapping[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path
