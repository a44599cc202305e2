"""A tokenizer built from GGUF metadata, and one read from a folder."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from lora_jax.hf.tokenizer import find_tokenizer, tokenizer_from_gguf
from lora_jax.models import ConfigError, load_tokenizer
from tests.hf.test_gguf import write
from tests.hf.vocabularies import TEXTS, byte_level, metadata_of, sentencepiece
from tests.train.tiny import decoder

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


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe"])
def test_ids_are_those_of_the_original(pre: str) -> None:
    """Rows of the vocabulary that only make its size round stand for no text."""
    core, found = byte_level(pre), metadata_of(byte_level(pre), pre)
    tokenizer = tokenizer_from_gguf(found)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == core.encode(text, add_special_tokens=False).ids, text
        if pre != "qwen2":  # which composes what it reads
            assert tokenizer.decode(ids) == text
    assert len(tokenizer) == core.get_vocab_size() < len(found["tokenizer.ggml.tokens"])
    begins = [found["tokenizer.ggml.bos_token_id"]] if pre == "llama-bpe" else []
    assert tokenizer.encode("x") == [*begins, *core.encode("x").ids]
    without = tokenizer_from_gguf({**found, "tokenizer.ggml.add_bos_token": False})
    assert without.encode("x") == core.encode("x").ids
    assert "<|im_end|>" in tokenizer.all_special_tokens
    assert "<think>" not in tokenizer.all_special_tokens
    both = tokenizer_from_gguf({**found, "tokenizer.ggml.add_eos_token": True})
    end = tokenizer.eos_token_id
    assert both.encode("x", "y")[-2:] == [core.encode("y").ids[-1], end]


def test_sentencepiece_falls_back_on_bytes() -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece())
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id == 1
        # A space comes first, but for a text that begins with one: the first space is not told.
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.removeprefix(" ")
    assert tokenizer.tokenize("<s>x</s>")[0] == "<s>"
    bare = tokenizer_from_gguf({**sentencepiece(), "tokenizer.ggml.add_space_prefix": False})
    assert bare.decode(bare.encode(" x"), skip_special_tokens=True) == " x"


def test_other_kinds_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="'gpt2' with the pre-tokenizer 'falcon' is not supported"
    ):
        tokenizer_from_gguf({**metadata(), "tokenizer.ggml.pre": "falcon"})
    with pytest.raises(ConfigError, match="'t5' with .* from a folder with tokenizer.json"):
        tokenizer_from_gguf({**metadata(), "tokenizer.ggml.model": "t5"})
    with pytest.raises(ConfigError, match="lists are incomplete"):
        tokenizer_from_gguf({**metadata(), "tokenizer.ggml.eos_token_id": 9999})
    with pytest.raises(ConfigError, match="cannot be built"):
        tokenizer_from_gguf({**metadata(), "tokenizer.ggml.merges": ["no such"]})


def test_several_templates() -> None:
    more = {"tokenizer.chat_templates": ["tools"], "tokenizer.chat_template.tools": "tools!"}
    tokenizer = tokenizer_from_gguf({**metadata(), **more})
    assert tokenizer.chat_template == {"default": TEMPLATE, "tools": "tools!"}


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["qwen2", "llama-bpe", "llama"])
def test_ids_are_those_of_transformers_own_reader(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    found = sentencepiece() if kind == "llama" else metadata_of(byte_level(kind), kind)
    size = len(found["tokenizer.ggml.tokens"])
    model, params = decoder(vocab_size=size, model_type="qwen2" if kind == "qwen2" else "llama")
    write(tmp_path / "model.gguf", model.config, params, tokenizer=found)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    ours = load_tokenizer(tmp_path / "model.gguf")
    composed = [text for text in TEXTS if unicodedata.is_normalized("NFC", text)]
    for text in composed if kind == "qwen2" else TEXTS:  # theirs forgets that Qwen2's composes
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.chat_template == theirs.chat_template


def test_a_saved_one_is_read_back_with_a_model(tmp_path: Path) -> None:
    """As `save_pretrained` writes it beside config.json, whose model_type transformers looks at."""
    for kind, model_type in {"qwen2": "qwen2", "llama-bpe": "llama", "llama": "llama"}.items():
        found = sentencepiece() if kind == "llama" else metadata_of(byte_level(kind), kind)
        tokenizer = tokenizer_from_gguf(found)
        tokenizer.save_pretrained(tmp_path / kind)
        (tmp_path / kind / "config.json").write_text(json.dumps({"model_type": model_type}))
        again = load_tokenizer(tmp_path / kind)
        for text in TEXTS:
            assert again.encode(text) == tokenizer.encode(text), (kind, text)


def test_a_folder(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_gguf(metadata())
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "the heat 12<|im_end|>"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.chat_template == TEMPLATE
    (tmp_path / "model.gguf").write_bytes(b"")  # the folder's own tokenizer comes first
    assert find_tokenizer(tmp_path) == tmp_path
    assert load_tokenizer(tmp_path).encode(text) == tokenizer.encode(text)
