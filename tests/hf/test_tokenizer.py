"""A tokenizer built from GGUF metadata, and one read from a folder."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from lora_jax.hf.tokenizer import tokenizer_from_gguf
from lora_jax.models import ConfigError, load_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def metadata() -> dict[str, Any]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet, "Ġt", "he", "Ġthe", "12"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


@pytest.mark.parametrize("text", ["the heat", "  two  spaces\n\n", "12 é 世界 🙂", "<|im_end|>x"])
def test_round_trip(text: str) -> None:
    tokenizer = tokenizer_from_gguf(metadata())
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


def test_tokens() -> None:
    tokenizer = tokenizer_from_gguf(metadata())
    # Digits stand alone, though the vocabulary has "12"; special tokens are found in running text.
    assert tokenizer.tokenize("x the 12<|im_end|>") == "x Ġthe Ġ 1 2 <|im_end|>".split()
    assert tokenizer.encode("<|im_start|>") == [1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>"), skip_special_tokens=True) == "a"
    assert len(tokenizer) == len(metadata()["tokenizer.ggml.tokens"])


def test_chat_template() -> None:
    tokenizer = tokenizer_from_gguf(metadata())
    chat = [{"role": "user", "content": "the heat"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nthe heat<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer.encode(text)


def test_other_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="'gpt2' with pre-tokenizer 'qwen2' is not supported"):
        tokenizer_from_gguf({**metadata(), "tokenizer.ggml.pre": "qwen2"})


def test_a_folder(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_gguf(metadata())
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "the heat 12<|im_end|>"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.chat_template == TEMPLATE
