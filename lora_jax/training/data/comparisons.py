"""Pairs of completions as texts for an encoder, which learns to give the better one more."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.core.types import Tokenizer
from lora_jax.training.data.chats import Mapped, one_by_one
from lora_jax.training.data.labelled import Labelled, padded_texts
from lora_jax.training.data.pairs import _answered as answered
from lora_jax.training.data.rows import Message, Row, check_text, name_of

Encoded = dict[str, list[list[int]]]  # "input_ids" and "token_type_ids" of texts


def comparisons(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    seq_len: int = 128,
    truncate: bool = False,
    source: str = "the rows",
    mapped: Mapped = one_by_one,
) -> Labelled:
    """Returns pairs of completions as examples, from which a model of one logit learns to score.

    A row is the chosen and the rejected completion, each the second text after its prompt.

    Args:
      rows: see `lora_jax.training.pairs`.
      tokenizer: the encoder's.
      seq_len: the most tokens of a prompt and its completion.
      truncate: shortens longer ones, which are an error otherwise; see `shortened`.
      source, mapped: see `lora_jax.training.texts`.

    Raises:
      TrainingError: a row cannot be used, or is too long.

    >>> from lora_jax import models, training
    >>> rows = [{"prompt": "One plus one?", "chosen": "Two.", "rejected": "Three."}]
    >>> name = "sentence-transformers/all-MiniLM-L6-v2"
    >>> tokenizer = models.load_tokenizer(name)  # doctest: +SKIP
    >>> examples = training.comparisons(rows, tokenizer)  # doctest: +SKIP
    """
    prompts: list[str] = []
    completions: list[str] = []
    for number, row in enumerate(rows, start=1):
        name = name_of(row, source, number)
        prompt, *both = texts_of(row, name)
        check_text("\n".join([prompt, *both]), name)
        prompts += [prompt, prompt]
        completions += both

    def encoded(block: slice) -> Encoded:
        found = encode(prompts[block], completions[block], tokenizer)
        return shortened(found, seq_len) if truncate else dict(found)

    flat = padded_texts(encoded, len(prompts), tokenizer, seq_len, source, mapped)
    arrays = {name: array.reshape(len(rows), 2, -1) for name, array in flat.items()}
    labels, weights = np.zeros(len(rows), np.int32), np.ones(len(rows), np.int32)
    return Labelled(**arrays, labels=labels, weights=weights)


def texts_of(row: Row, name: str) -> tuple[str, str, str]:
    """Returns the prompt, the chosen and the rejected completion of a row, as texts.

    Raises:
      TrainingError: it is no pair; calls it `name`.
    """
    prompt, (chosen, rejected) = answered(row, name, False)
    return as_text(prompt.messages), as_text(chosen), as_text(rejected)


def as_text(turns: Sequence[Message]) -> str:
    """Returns what a turn says; of several, lines that begin with who says it."""

    def said(turn: Mapping[str, Any]) -> str:
        parts = [turn.get("content"), turn.get("tool_calls")]
        return "\n".join(
            one if isinstance(one, str) else json.dumps(one, ensure_ascii=False, default=str)
            for one in parts
            if one
        )

    if len(turns) == 1:
        return said(turns[0])
    return "\n".join(f"{turn['role']}: {said(turn)}" for turn in turns)


def encode(prompts: Sequence[str], completions: Sequence[str], tokenizer: Tokenizer) -> Any:
    """Returns what a tokenizer makes of prompts and completions, as pairs of texts."""
    return tokenizer(prompts, completions, return_token_type_ids=True, verbose=False)


def shortened(encoded: Any, most: int) -> Encoded:
    """Returns encoded pairs of texts with at most `most` tokens.

    Longer ones lose the beginning of the prompt and, where that is not enough, the completion's
    end.
    """
    kept = []
    for number, ids in enumerate(encoded["input_ids"]):
        side = np.array([-1 if of is None else of for of in encoded.sequence_ids(number)])
        order = np.concatenate([np.flatnonzero(side == 0), np.flatnonzero(side == 1)[::-1]])
        kept.append(np.delete(np.arange(len(ids)), order[: max(len(ids) - most, 0)]))
    return {
        name: [np.array(ids)[at].tolist() for ids, at in zip(encoded[name], kept, strict=True)]
        for name in ("input_ids", "token_type_ids")
    }
