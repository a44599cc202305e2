"""Small tokenizers with the splits of published ones, and their metadata in GGUF files."""

import functools
import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

SPECIAL = ("<|begin|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As tokenizer.json of Qwen2 and of Llama 3 has it; there is the number of digits between.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (
    "Hello world, don't we'LL 'S",
    "  two  spaces\n\n\n tail  ",
    "\ttabs\r\n\r\nx",
    "1234567 3.14 \u00bd \u0663\u0664",
    "caf\u00e9 cafe\u0301 A\u030a",
    "\u4e16\u754c\u4f60\u597d\u3002",
    "\U0001f642\U0001f468\u200d\U0001f467",
    "\u0645\u0631\u062d\u0628\u0627 \u0939\u093f\u0928\u094d\u0926\u0940",
    "def f(x):\n    return x**2  # ok\n",
    "!!!???...---",
    "<|im_start|>user\nhi<|im_end|> [PAD400] <think>",
    "x\u00a0y\u3000z\u200b\x00",
    "",
    " ",
)
_CORPUS = [text.replace("<|im_start|>", " ").replace("<|im_end|>", " ") for text in TEXTS] * 3


@functools.cache
def byte_level(pre: str) -> Tokenizer:
    """Returns an original: "qwen2" or "llama-bpe"."""
    core = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    digits = "" if pre == "qwen2" else "{1,3}"
    split = pre_tokenizers.Split(Regex(_SPLIT.format(digits)), "isolated")
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, spelled])
    core.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        core.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(_CORPUS, trainer)
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    core.add_tokens([AddedToken("<think>", normalized=False)])
    return core


def metadata_of(core: Tokenizer, pre: str, unused: int = 5) -> dict[str, Any]:
    """Returns what llama.cpp writes of a tokenizer: its lists, and rows up to a round size."""
    added = {token.content: token for token in core.get_added_tokens_decoder().values()}
    vocab = sorted(core.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocab]
    kinds = [(3 if added[t].special else 4) if t in added else 1 for t in tokens]
    merges = json.loads(core.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + [f"[PAD{len(tokens) + i}]" for i in range(unused)],
        "tokenizer.ggml.token_type": kinds + [5] * unused,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": tokens.index("<|begin|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.chat_template": TEMPLATE,
    }


@functools.cache
def sentencepiece() -> dict[str, Any]:
    """Returns the metadata of a SentencePiece vocabulary: scores, and no merges."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    core.train_from_iterator(_CORPUS, BpeTrainer(vocab_size=150, show_progress=False))
    pieces = [t for t, _ in sorted(core.get_vocab().items(), key=lambda item: item[1])]
    characters = [piece for piece in pieces if len(piece) == 1]
    longer = [piece for piece in pieces if len(piece) > 1]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    ranks = {piece: -float(rank) for rank, piece in enumerate([*longer, *characters])}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*first, *ranks],
        "tokenizer.ggml.scores": [0.0] * len(first) + [*ranks.values()],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(ranks),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
