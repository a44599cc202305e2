"""Describes a tokenizer in the metadata of a GGUF file; `lora_jax.hf.gguf.tokenizer` reads them.

llama.cpp splits a text by rules that it knows by name. Here they are found by what tokenizer.json
says, so that a tokenizer with further tokens is known as well.

The files have no field for spaces that a tokenizer drops. llama.cpp drops those behind special
tokens if the model's name is one of Phi-3's, and keeps all spaces otherwise: see `general_name`.
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
    ENDS,
    GPT2,
    ROLES,
    SENTENCEPIECE,
    SPACE,
    SPLITS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

_NORMAL = 1
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<pad>|<mask>|<unused.*>", re.DOTALL)
_LAST = -1e9  # the score of a token that no merge makes
_WAY_OUT = "name another tokenizer (--tokenizer), or write safetensors (--output)"
_PHI3 = "Phi-3"
_LIKE_PHI3 = re.compile("phi-?3", re.IGNORECASE)
# In a model of that name, spaces stay behind the first three and go behind the last one. A file
# whose vocabulary lacks one of the four does not load.
_KEEPING, _DROPPING = frozenset(("<unk>", "<s>", "<|endoftext|>")), frozenset(("</s>",))
_CHAT = ({"role": "user", "content": "A b"}, {"role": "assistant", "content": "C d"})


def vocabulary(tokenizer: Tokenizer, size: int, ends: Sequence[int] = ()) -> dict[str, Any]:
    """Returns the metadata ``tokenizer.*`` of a tokenizer.

    Args:
      tokenizer: a transformers fast tokenizer.
      size: the rows of the embedding; those without a token get one that stands for no text.
      ends: the tokens that end a text, by the model's configuration.

    Raises:
      ConfigError: llama.cpp has no rule for it, or it has more tokens than the model.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise ConfigError(f"a {type(tokenizer).__name__} is no fast tokenizer: {_WAY_OUT}")
    whole = json.loads(core.to_str())
    model = whole["model"]
    if model["type"] != "BPE":
        raise ConfigError(f"llama.cpp has no decoder's tokenizer of {model['type']}: {_WAY_OUT}")
    added = {token["id"]: token for token in whole["added_tokens"]}
    words = {i: word for word, i in model["vocab"].items()}
    words |= {i: token["content"] for i, token in added.items()}
    if max(words) >= size:
        raise ConfigError(
            f"the tokenizer has a token {max(words)}, and the model {size} rows: {_WAY_OUT}"
        )
    tokens = [words.get(i, f"[PAD{i}]") for i in range(size)]
    types = [_type_of(i, words, added) for i in range(size)]
    fields = _byte_level(whole) if not model.get("byte_fallback") else _pieces(whole, tokens, types)
    return {
        **fields,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **_special(tokenizer, ends),
        **_templates(tokenizer.chat_template),
    }


def _type_of(i: int, words: dict[int, str], added: dict[int, Fields]) -> int:
    if i not in words:
        return UNUSED
    if i not in added:
        return _NORMAL
    is_control = added[i]["special"] or _LOOKS_SPECIAL.fullmatch(words[i])
    return CONTROL if is_control else USER_DEFINED


def _byte_level(whole: Fields) -> dict[str, Any]:
    merges = [" ".join(m) if isinstance(m, list) else m for m in whole["model"]["merges"]]
    if not merges:
        raise ConfigError(f"this tokenizer has no merges, which llama.cpp needs: {_WAY_OUT}")
    return {
        "tokenizer.ggml.model": BYTE_LEVEL,
        "tokenizer.ggml.pre": _rule_of(whole),
        "tokenizer.ggml.merges": merges,
    }


def _rule_of(whole: Fields) -> str:
    """Returns llama.cpp's name of the rule by which a byte-level tokenizer splits a text."""
    patterns = tuple(_patterns(whole["pre_tokenizer"]))
    composes = any(step["type"] == "NFC" for step in _steps(whole["normalizer"], "normalizers"))
    keeps_whole = bool(whole["model"].get("ignore_merges"))
    fitting = [
        (rules.nfc != composes, name)
        for name, rules in SPLITS.items()
        if rules.patterns == patterns and rules.whole == keeps_whole
    ]
    if not fitting:
        shown = " then ".join(map(repr, patterns)) or "nothing"
        raise ConfigError(
            f"llama.cpp has no known rule that splits texts as this tokenizer does, by {shown}: "
            f"{', '.join(SPLITS)} are known; {_WAY_OUT}"
        )
    return min(fitting, key=lambda pair: pair[0])[1]


def _patterns(step: Fields | None) -> Iterator[str]:
    """Yields the regular expressions by which a text is split, one after another."""
    for each in _steps(step, "pretokenizers"):
        if each["type"] == "Split" and "Regex" in each["pattern"] and not each["invert"]:
            yield each["pattern"]["Regex"]
        elif each["type"] == "Digits" and each["individual_digits"]:
            yield r"\p{N}"
        elif each["type"] == "ByteLevel" and not each["add_prefix_space"]:
            if each["use_regex"]:
                yield GPT2
        else:
            yield each["type"]


def _steps(step: Fields | None, inside: str) -> list[Fields]:
    if step is None:
        return []
    return step[inside] if step["type"] == "Sequence" else [step]


def _pieces(whole: Fields, tokens: Sequence[str], types: list[int]) -> dict[str, Any]:
    """Returns the metadata of SentencePiece's BPE, and corrects the types of its tokens.

    Where SentencePiece has scores, tokenizer.json has merges, best first: a token's score is the
    place of the first merge that makes it.
    """
    model = whole["model"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault(
            "".join(merge) if isinstance(merge, list) else merge.replace(" ", ""), rank
        )
    for i, token in enumerate(tokens):
        if types[i] == _NORMAL and _BYTE.fullmatch(token):
            types[i] = BYTE
        elif token == model["unk_token"]:
            types[i] = UNKNOWN
    scores = [float(-ranks[t]) if t in ranks else _LAST if len(t) > 1 else 0.0 for t in tokens]
    scores = [
        0.0 if t in (BYTE, CONTROL, UNKNOWN) else s for s, t in zip(scores, types, strict=True)
    ]
    steps = [
        *_steps(whole["normalizer"], "normalizers"),
        *_steps(whole["pre_tokenizer"], "pretokenizers"),
    ]
    begins = any(
        step["type"] == "Prepend" or step.get("prepend_scheme", "never") != "never"
        for step in steps
    )
    if not any(step.get("content") == SPACE or step["type"] == "Metaspace" for step in steps):
        raise ConfigError(f"this tokenizer's spaces are not SentencePiece's ({SPACE}): {_WAY_OUT}")
    return {
        "tokenizer.ggml.model": SENTENCEPIECE,
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": begins,
    }


def _special(tokenizer: Tokenizer, ends: Sequence[int]) -> dict[str, Any]:
    """Returns the ids of special tokens, and whether the first and the last one frame a text."""
    prefix = "tokenizer.ggml"
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in ROLES}
    fields = {f"{prefix}.{ROLES[r]}_token_id": i for r, i in ids.items() if i is not None}
    if ids["eos"] is None and ends:
        fields[f"{prefix}.eos_token_id"], ends = ends[0], ends[1:]
    others = [i for i in ends if i != ids["eos"]]
    for name, i in zip(ENDS[1:], others, strict=False):
        fields[f"{prefix}.{name}_token_id"] = i
    framed = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    for role, at in (("bos", 0), ("eos", -1)):
        is_added = len(framed) > len(bare) and framed[at] == ids[role]
        fields[f"{prefix}.add_{role}_token"] = bool(is_added)
    return fields


def _templates(given: str | dict[str, str] | None) -> dict[str, Any]:
    if given is None:
        return {}
    if isinstance(given, str):
        return {"tokenizer.chat_template": given}
    named = {name: text for name, text in given.items() if name != "default"}
    main = given.get("default") or next(iter(given.values()))
    return {
        "tokenizer.chat_template": main,
        **({"tokenizer.chat_templates": list(named)} if named else {}),
        **{f"tokenizer.chat_template.{name}": text for name, text in named.items()},
    }


def general_name(name: str, tokenizer: Tokenizer | None, words: Fields) -> tuple[str, list[str]]:
    """Returns a model's name under which llama.cpp drops the spaces that its tokenizer drops.

    Args:
      name: the name of the model.
      tokenizer: a transformers fast tokenizer; None for one that drops no spaces.
      words: the tokenizer's metadata; see `vocabulary`.

    Returns:
      The name, and a note on spaces that llama.cpp keeps in texts other than chats; mostly none.

    Raises:
      ConfigError: under no name does llama.cpp make the same tokens of chats.
    """
    plain_name = _LIKE_PHI3.sub("phi", name)
    if tokenizer is None:
        return plain_name, []
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    spaces = {x.content: (x.lstrip, x.rstrip) for x in added if x.lstrip or x.rstrip}
    if not spaces:
        return plain_name, []
    tokens = words["tokenizer.ggml.tokens"]
    kinds = zip(tokens, words["tokenizer.ggml.token_type"], strict=True)
    special = {token for token, kind in kinds if kind in (CONTROL, USER_DEFINED, UNKNOWN)}
    of_phi3 = dict.fromkeys((special | _DROPPING) - _KEEPING, (False, True))
    if spaces == of_phi3 and (_KEEPING | _DROPPING).issubset(tokens):
        return _PHI3, []
    shown = ", ".join(sorted(spaces))
    beside = "|".join(map(re.escape, spaces))
    if re.search(rf"\s({beside})|({beside})\s", _rendered(tokenizer, words)):
        raise ConfigError(
            f"llama.cpp keeps the spaces beside {shown}, which this tokenizer drops, and so makes "
            "other tokens of chats: write safetensors (--output)"
        )
    return plain_name, [
        f"llama.cpp keeps the spaces beside {shown}, which the tokenizer drops: a message that "
        "begins or ends with spaces there has other tokens"
    ]


def _rendered(tokenizer: Tokenizer, words: Fields) -> str:
    """Returns a chat as the template renders it; "" if there is no template that does."""
    template = words.get("tokenizer.chat_template")
    try:
        text: str = tokenizer.apply_chat_template(_CHAT, chat_template=template, tokenize=False)
    except Exception:  # of a template, anything
        return ""
    return text
