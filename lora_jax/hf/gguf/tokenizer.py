"""Builds a tokenizer from the metadata of a GGUF file.

The files name the regular expressions that split a text (`tokenizer.ggml.pre`), and do not hold
them: known here are those of the models that are read.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

from lora_jax.core.types import Fields
from lora_jax.hf.fields import ConfigError

CoreTokenizer: TypeAlias = Any  # a `tokenizers.Tokenizer`

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # llama.cpp's llama_token_type
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # values of tokenizer.ggml.model
SPACE_SIGN = "\u2581"  # SentencePiece's sign for a space
# The roles of tokens that end a text, a turn or a message. llama.cpp stops at each of them.
END_ROLES = ("eos", "eot", "eom")
FIELD_OF_ROLE = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST_PATTERN = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER_CLASSES, _LOWER_CLASSES = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER_CLASSES}]*[{_LOWER_CLASSES}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER_CLASSES}]+[{_LOWER_CLASSES}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER_CLASSES}]*[{_LOWER_CLASSES}]+{_CONTRACTIONS}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER_CLASSES}]+[{_LOWER_CLASSES}]*{_CONTRACTIONS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitRule:
    """The splits of a text that a byte-level tokenizer makes before it merges bytes.

    Attributes:
      patterns: regular expressions, each applied to the parts that the one before leaves.
      normalizes_nfc: whether the text is composed first (Unicode's NFC).
      keeps_tokens_whole: whether a part that is a token stays whole, whatever the merges say.
      adds_bos: whether bos comes first, if the file does not say.
    """

    patterns: tuple[str, ...]
    normalizes_nfc: bool = False
    keeps_tokens_whole: bool = False
    adds_bos: bool = False


_LLAMA3 = SplitRule(
    patterns=(rf"{_WORD_PATTERN}|\p{{N}}{{1,3}}|{_REST_PATTERN}",),
    keeps_tokens_whole=True,
    adds_bos=True,
)
_QWEN2 = SplitRule(patterns=(rf"{_WORD_PATTERN}|\p{{N}}|{_REST_PATTERN}",), normalizes_nfc=True)
# By tokenizer.ggml.pre.
SPLIT_RULES = {
    "smollm": SplitRule(patterns=(r"\p{N}", GPT2_PATTERN)),
    "gpt-2": SplitRule(patterns=(GPT2_PATTERN,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": dataclasses.replace(_QWEN2, normalizes_nfc=False),
    "tekken": SplitRule(patterns=(_TEKKEN_PATTERN,), keeps_tokens_whole=True, adds_bos=True),
    "gpt-4o": SplitRule(patterns=(_O200K_PATTERN,)),
    "dbrx": dataclasses.replace(_LLAMA3, keeps_tokens_whole=False, adds_bos=False),
}


def build_tokenizer(metadata: Fields) -> tuple[CoreTokenizer, dict[str, str]]:
    """Returns a ``tokenizers.Tokenizer``, and its special tokens by role ("eos_token").

    Args:
      metadata: the file's pairs whose names begin with ``tokenizer.``.

    Raises:
      ConfigError: it is of an unknown kind, or its lists do not fit each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    pre_tokenizer = metadata.get("tokenizer.ggml.pre")
    splits = SPLIT_RULES.get(str(pre_tokenizer)) if kind == BYTE_LEVEL else None
    if splits is None and kind != SENTENCEPIECE:
        raise ConfigError(
            f"the tokenizer {kind!r} with the pre-tokenizer {pre_tokenizer!r} is not supported. "
            f"{SENTENCEPIECE!r} is supported, and {BYTE_LEVEL!r} with these pre-tokenizers: "
            f"{', '.join(SPLIT_RULES)}. Load the tokenizer from a folder with tokenizer.json "
            "(in scripts: --tokenizer FOLDER)."
        )
    try:
        return _build_by_split_rule(metadata, splits)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the tokenizer's lists are incomplete ({error!r}). Download the file again."
        ) from None
    except Exception as error:  # what the package `tokenizers` raises has no type of its own
        raise ConfigError(
            f"the tokenizer cannot be built ({error}). Download the file again."
        ) from None


def _build_by_split_rule(
    metadata: Fields, splits: SplitRule | None
) -> tuple[CoreTokenizer, dict[str, str]]:
    """Builds the tokenizer by a split rule; `splits` is None for SentencePiece."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    vocab: dict[str, int] = {}
    for token_id, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        # The rows that only make a table of a round size stand for no text.
        if token_type != UNUSED:
            vocab[token] = token_id
    special: dict[str, str] = {}  # token by role
    for role, name in FIELD_OF_ROLE.items():
        special_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if special_id is not None:
            special[role] = tokens[special_id]
    if splits is None:
        core = _build_sentencepiece_bpe(metadata, vocab, special.setdefault("unk", "<unk>"))
        adds_bos = True
    else:
        core = _build_byte_level_bpe(metadata, vocab, splits)
        adds_bos = splits.adds_bos
    bos = special.get("bos") if metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else None
    eos = special.get("eos") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if bos is not None or eos is not None:
        core.post_processor = _make_framing_processor(vocab, bos, eos)
    special_texts = set(special.values()) if splits is None else set()
    _add_tokens(core, tokens, types, special_texts)
    return core, {f"{role}_token": token for role, token in special.items()}


def _add_tokens(
    core: CoreTokenizer, tokens: Sequence[str], types: Sequence[int], special_texts: set[str]
) -> None:
    """Adds tokens that are split off first: control tokens, special texts, and the user's."""
    from tokenizers import AddedToken

    for token, token_type in zip(tokens, types, strict=True):
        if token_type == CONTROL or token in special_texts:
            core.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == USER_DEFINED:
            core.add_tokens([AddedToken(token, normalized=False)])


def _build_byte_level_bpe(
    metadata: Fields, vocab: dict[str, int], splits: SplitRule
) -> CoreTokenizer:
    """Returns a byte-level BPE tokenizer with these splits."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    core = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=splits.keeps_tokens_whole)
    )
    if splits.normalizes_nfc:
        core.normalizer = normalizers.NFC()
    steps: list[object] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits.patterns
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    return core


def _build_sentencepiece_bpe(
    metadata: Fields, vocab: dict[str, int], unknown_token: str
) -> CoreTokenizer:
    """Returns SentencePiece's BPE like transformers' `LlamaTokenizer`.

    A text that begins with a space gets no second one, as it would from SentencePiece.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merge_texts = metadata.get("tokenizer.ggml.merges")
    if merge_texts is None:
        tokens = metadata["tokenizer.ggml.tokens"]
        scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
        merges = _merges_by_score(vocab, scores)
    else:
        merges = [tuple(text.split(" ")) for text in merge_texts]
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token=unknown_token, fuse_unk=True, byte_fallback=True
    )
    core = Tokenizer(model)
    adds_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    scheme = "first" if adds_space else "never"
    core.pre_tokenizer = pre_tokenizers.Metaspace(SPACE_SIGN, prepend_scheme=scheme, split=False)
    steps: list[object] = [
        decoders.Replace(SPACE_SIGN, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if adds_space:
        steps.append(decoders.Strip(" ", 1, 0))
    core.decoder = decoders.Sequence(steps)
    return core


def _merges_by_score(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Returns merge pairs by descending score, because SentencePiece stores no merges."""
    pairs: list[tuple[str, str]] = []
    for token in vocab:
        for left_length in range(1, len(token)):
            left = token[:left_length]
            right = token[left_length:]
            if left in vocab and right in vocab:
                pairs.append((left, right))

    def order(pair: tuple[str, str]) -> tuple[float, int, int, str, str]:
        left, right = pair
        return -scores[left + right], -len(left), vocab[left], left, right

    return sorted(pairs, key=order)


def _make_framing_processor(vocab: dict[str, int], bos: str | None, eos: str | None) -> object:
    """Returns the processor that adds first and last tokens to a text or a pair."""
    from tokenizers import processors

    def template(text: str, segment: int) -> list[str]:
        return [f"{token}:{segment}" for token in (bos, text, eos) if token is not None]

    token_ids = [(token, vocab[token]) for token in (bos, eos) if token is not None]
    return processors.TemplateProcessing(
        single=template("$A", 0),
        pair=template("$A", 0) + template("$B", 1),
        special_tokens=token_ids,
    )
