"""Describes a tokenizer as GGUF metadata, which `lora_jax.hf.gguf.tokenizer` reads.

llama.cpp splits a text by rules that it knows by name. Here they are found by what tokenizer.json
says, so that a tokenizer with further tokens is known as well.

The *definition* of a tokenizer is its parsed tokenizer.json: a model (the merges), and the steps of
a normalizer and of a pre-tokenizer.

The files have no field for spaces that a tokenizer drops. llama.cpp drops those behind special
tokens if the model's name is one of Phi-3's, and keeps all spaces otherwise: see
`model_name_for_llama_cpp`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from lora_jax.core.types import Fields, Tokenizer
from lora_jax.hf.fields import ConfigError
from lora_jax.hf.gguf.tokenizer import (
    BYTE,
    BYTE_LEVEL,
    CONTROL,
    END_ROLES,
    FIELD_OF_ROLE,
    GPT2_PATTERN,
    SENTENCEPIECE,
    SPACE_SIGN,
    SPLIT_RULES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

_NORMAL = 1
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<pad>|<mask>|<unused.*>", re.DOTALL)
_LOWEST_SCORE = -1e9  # of a token that no merge makes
_REMEDY = "Pass another tokenizer (--tokenizer), or write safetensors (--output)."
_PHI3 = "Phi-3"
_LIKE_PHI3 = re.compile("phi-?3", re.IGNORECASE)
# In a model of that name, spaces stay behind the first three and go behind the last one. A file
# whose vocabulary lacks one of the four does not load.
_PHI3_KEEPING = frozenset(("<unk>", "<s>", "<|endoftext|>"))
_PHI3_DROPPING = frozenset(("</s>",))
_SAMPLE_CHAT = ({"role": "user", "content": "A b"}, {"role": "assistant", "content": "C d"})


def tokenizer_metadata(tokenizer: Tokenizer, size: int, ends: Sequence[int] = ()) -> dict[str, Any]:
    """Returns the ``tokenizer.*`` metadata of a tokenizer.

    Args:
      tokenizer: a transformers fast tokenizer.
      size: the rows of the embedding; those without a token get one that stands for no text.
      ends: the tokens that end a text, by the model's configuration.

    Raises:
      ConfigError: llama.cpp has no rule for it, or it has more tokens than the model.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise ConfigError(f"a {type(tokenizer).__name__} is not a fast tokenizer. {_REMEDY}")
    definition = json.loads(core.to_str())
    model = definition["model"]
    if model["type"] != "BPE":
        raise ConfigError(
            f"llama.cpp does not support tokenizers of the type {model['type']} for decoders. "
            f"{_REMEDY}"
        )
    added_tokens = {token["id"]: token for token in definition["added_tokens"]}
    text_of_id = {token_id: text for text, token_id in model["vocab"].items()}
    text_of_id |= {token_id: token["content"] for token_id, token in added_tokens.items()}
    if max(text_of_id) >= size:
        raise ConfigError(
            f"the tokenizer has the token id {max(text_of_id)}, but the model's embedding has "
            f"only {size} rows. {_REMEDY}"
        )
    tokens = [text_of_id.get(token_id, f"[PAD{token_id}]") for token_id in range(size)]
    types = [_token_type(token_id, text_of_id, added_tokens) for token_id in range(size)]
    if model.get("byte_fallback"):
        fields = _sentencepiece_metadata(definition, tokens, types)
    else:
        fields = _byte_level_metadata(definition)
    return {
        **fields,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **_special_token_metadata(tokenizer, ends),
        **_chat_template_metadata(tokenizer.chat_template),
    }


def _token_type(token_id: int, text_of_id: dict[int, str], added_tokens: dict[int, Fields]) -> int:
    """Returns llama.cpp's type of a token."""
    if token_id not in text_of_id:
        return UNUSED
    if token_id not in added_tokens:
        return _NORMAL
    is_special = added_tokens[token_id]["special"]
    is_control = is_special or _LOOKS_SPECIAL.fullmatch(text_of_id[token_id])
    return CONTROL if is_control else USER_DEFINED


def _byte_level_metadata(definition: Fields) -> dict[str, Any]:
    """Returns the metadata of a byte-level BPE."""
    merges = [
        " ".join(merge) if isinstance(merge, list) else merge
        for merge in definition["model"]["merges"]
    ]
    if not merges:
        raise ConfigError(f"llama.cpp needs merges, but this tokenizer has none. {_REMEDY}")
    return {
        "tokenizer.ggml.model": BYTE_LEVEL,
        "tokenizer.ggml.pre": _find_split_rule(definition),
        "tokenizer.ggml.merges": merges,
    }


def _find_split_rule(definition: Fields) -> str:
    """Returns llama.cpp's name for the split rule of a byte-level tokenizer."""
    patterns = tuple(_split_patterns(definition["pre_tokenizer"]))
    normalizers = _processing_steps(definition["normalizer"], "normalizers")
    composes = any(step["type"] == "NFC" for step in normalizers)
    keeps_whole = bool(definition["model"].get("ignore_merges"))
    rules = {
        name: splits
        for name, splits in SPLIT_RULES.items()
        if splits.patterns == patterns and splits.keeps_tokens_whole == keeps_whole
    }
    if not rules:
        listing = " then ".join(map(repr, patterns)) or "nothing"
        raise ConfigError(
            f"none of llama.cpp's known rules splits texts as this tokenizer does, by {listing}. "
            f"The known rules are {', '.join(SPLIT_RULES)}. {_REMEDY}"
        )
    # The first rule that composes texts as the tokenizer does, or else the first of all.
    return min(rules, key=lambda name: rules[name].normalizes_nfc != composes)


def _split_patterns(pre_tokenizer: Fields | None) -> Iterator[str]:
    """Yields the regular expressions by which a text is split, in order."""
    for step in _processing_steps(pre_tokenizer, "pretokenizers"):
        kind = step["type"]
        if kind == "Split" and "Regex" in step["pattern"] and not step["invert"]:
            yield step["pattern"]["Regex"]
        elif kind == "Digits" and step["individual_digits"]:
            yield r"\p{N}"
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            if step["use_regex"]:
                yield GPT2_PATTERN
        else:
            yield kind


def _processing_steps(definition: Fields | None, field: str) -> list[Fields]:
    """Returns the steps of a normalizer or pre-tokenizer; `field` holds a sequence's."""
    if definition is None:
        return []
    return definition[field] if definition["type"] == "Sequence" else [definition]


def _sentencepiece_metadata(
    definition: Fields, tokens: Sequence[str], types: list[int]
) -> dict[str, Any]:
    """Returns the metadata of SentencePiece's BPE, with corrected token types.

    Where SentencePiece has scores, tokenizer.json has merges, best first: a token's score is the
    place of the first merge that makes it.
    """
    model = definition["model"]
    rank_of_token = _rank_of_merged_tokens(model["merges"])
    for token_id, token in enumerate(tokens):
        if types[token_id] == _NORMAL and _BYTE_TOKEN.fullmatch(token):
            types[token_id] = BYTE
        elif token == model["unk_token"]:
            types[token_id] = UNKNOWN

    def score(token: str, token_type: int) -> float:
        """Returns the score of a token: minus the rank of its merge."""
        if token_type in (BYTE, CONTROL, UNKNOWN):
            return 0.0
        if token in rank_of_token:
            return float(-rank_of_token[token])
        return 0.0 if len(token) <= 1 else _LOWEST_SCORE

    steps = _processing_steps(definition["normalizer"], "normalizers")
    steps = steps + _processing_steps(definition["pre_tokenizer"], "pretokenizers")
    adds_space = any(
        step["type"] == "Prepend" or step.get("prepend_scheme", "never") != "never"
        for step in steps
    )
    replaces_spaces = any(
        step.get("content") == SPACE_SIGN or step["type"] == "Metaspace" for step in steps
    )
    if not replaces_spaces:
        raise ConfigError(
            f"this tokenizer does not write spaces as SentencePiece does ({SPACE_SIGN}). {_REMEDY}"
        )
    return {
        "tokenizer.ggml.model": SENTENCEPIECE,
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": list(map(score, tokens, types)),
        "tokenizer.ggml.add_space_prefix": adds_space,
    }


def _rank_of_merged_tokens(merges: Sequence[str | list[str]]) -> dict[str, int]:
    """Returns the index of the first merge that produces each token."""
    rank_of_token: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        token = "".join(merge) if isinstance(merge, list) else merge.replace(" ", "")
        rank_of_token.setdefault(token, rank)
    return rank_of_token


def _special_token_metadata(tokenizer: Tokenizer, ends: Sequence[int]) -> dict[str, Any]:
    """Returns the ids of special tokens, and whether BOS and EOS are added to a text."""
    prefix = "tokenizer.ggml"
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in FIELD_OF_ROLE}
    fields = {}
    for role, token_id in ids.items():
        if token_id is not None:
            fields[f"{prefix}.{FIELD_OF_ROLE[role]}_token_id"] = token_id
    eos = ids["eos"]
    if eos is None and ends:
        fields[f"{prefix}.eos_token_id"] = ends[0]
        ends = ends[1:]
    end_tokens = [token_id for token_id in ends if token_id != eos]
    for name, token_id in zip(END_ROLES[1:], end_tokens, strict=False):
        fields[f"{prefix}.{name}_token_id"] = token_id
    framed_ids = tokenizer("a")["input_ids"]
    bare_ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    has_frame = len(framed_ids) > len(bare_ids)
    fields[f"{prefix}.add_bos_token"] = bool(has_frame and framed_ids[0] == ids["bos"])
    fields[f"{prefix}.add_eos_token"] = bool(has_frame and framed_ids[-1] == eos)
    return fields


def _chat_template_metadata(chat_template: str | dict[str, str] | None) -> dict[str, Any]:
    """Returns the metadata of a chat template, or of several by their names."""
    if chat_template is None:
        return {}
    if isinstance(chat_template, str):
        return {"tokenizer.chat_template": chat_template}
    default = chat_template.get("default") or list(chat_template.values())[0]
    fields: dict[str, Any] = {"tokenizer.chat_template": default}
    names = [name for name in chat_template if name != "default"]
    if names:
        fields["tokenizer.chat_templates"] = names
    for name in names:
        fields[f"tokenizer.chat_template.{name}"] = chat_template[name]
    return fields


def model_name_for_llama_cpp(
    name: str, tokenizer: Tokenizer | None, words: Fields
) -> tuple[str, list[str]]:
    """Returns a model name for which llama.cpp strips spaces as the tokenizer does.

    Args:
      name: the name of the model.
      tokenizer: a transformers fast tokenizer; None for one that drops no spaces.
      words: the tokenizer's metadata; see `tokenizer_metadata`.

    Returns:
      The name, and a note on spaces that llama.cpp keeps in texts other than chats; mostly none.

    Raises:
      ConfigError: under no name does llama.cpp make the same tokens of chats.
    """
    plain_name = _LIKE_PHI3.sub("phi", name)
    if tokenizer is None:
        return plain_name, []
    dropped_sides: dict[str, tuple[bool, bool]] = {}  # left and right of which tokens
    for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip:
            dropped_sides[token.content] = (token.lstrip, token.rstrip)
    if not dropped_sides:
        return plain_name, []
    if dropped_sides == _dropped_sides_of_phi3(words):
        return _PHI3, []
    listing = ", ".join(sorted(dropped_sides))
    tokens_pattern = "|".join(map(re.escape, dropped_sides))
    pattern = rf"\s({tokens_pattern})|({tokens_pattern})\s"
    if re.search(pattern, _render_sample_chat(tokenizer, words)):
        raise ConfigError(
            f"this tokenizer drops the spaces beside {listing}, but llama.cpp keeps them, so it "
            "would make other tokens of chats. Write safetensors (--output)."
        )
    return plain_name, [
        f"the tokenizer drops the spaces beside {listing}, but llama.cpp keeps them. A message "
        "that begins or ends with spaces there has other tokens in llama.cpp"
    ]


def _dropped_sides_of_phi3(words: Fields) -> dict[str, tuple[bool, bool]] | None:
    """Returns the sides of tokens where llama.cpp strips spaces for Phi-3 models.

    Returns:
      token -> (left, right); None for a vocabulary that llama.cpp does not load under this name.
    """
    tokens = words["tokenizer.ggml.tokens"]
    if not (_PHI3_KEEPING | _PHI3_DROPPING).issubset(tokens):
        return None
    special_types = (CONTROL, USER_DEFINED, UNKNOWN)
    tokens_and_types = zip(tokens, words["tokenizer.ggml.token_type"], strict=True)
    special = {token for token, token_type in tokens_and_types if token_type in special_types}
    return dict.fromkeys((special | _PHI3_DROPPING) - _PHI3_KEEPING, (False, True))


def _render_sample_chat(tokenizer: Tokenizer, words: Fields) -> str:
    """Returns a sample chat rendered by the template, or "" if that fails."""
    template = words.get("tokenizer.chat_template")
    try:
        text: str = tokenizer.apply_chat_template(
            _SAMPLE_CHAT, chat_template=template, tokenize=False
        )
    except Exception:  # of a template, anything
        return ""
    return text
