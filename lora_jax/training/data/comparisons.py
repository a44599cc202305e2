"""Pairs of completions as texts for an encoder, which learns to give the better one more."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax.core.types import Tokenizer
from lora_jax.training.data.labelled import Labelled, padded_texts
from lora_jax.training.data.pairs import read_pair
from lora_jax.training.data.rows import Row, check_text, name_of
from lora_jax.training.data.sequences import MapFunction, map_serially
from lora_jax.training.data.turns import Message


def comparisons(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    seq_len: int = 128,
    truncate: bool = False,
    source: str = "the rows",
    mapped: MapFunction = map_serially,
) -> Labelled:
    """Returns pairs of completions as examples, from which a model of one logit learns to score.

    A row is the chosen and the rejected completion, each the second text after its prompt.

    Args:
      rows: see `lora_jax.training.pairs`.
      tokenizer: the encoder's.
      seq_len: the most tokens of a prompt and its completion.
      truncate: shortens longer ones, which are an error otherwise; see `encode`.
      source, mapped: see `lora_jax.training.texts`.

    Raises:
      TrainingError: a row cannot be used, or is too long.
    """
    texts: list[tuple[str, str]] = []
    for number, row in enumerate(rows, start=1):
        name = name_of(row, source, number)
        prompt, *both = texts_of(row, name)
        check_text("\n".join([prompt, *both]), name)
        texts += [(prompt, completion) for completion in both]
    most = seq_len if truncate else sys.maxsize
    flat = padded_texts(
        lambda block: encode(texts[block], tokenizer, most)[0],
        len(texts), tokenizer, seq_len, source, mapped,
    )  # fmt: skip
    arrays = {name: array.reshape(len(rows), 2, -1) for name, array in flat.items()}
    labels, weights = np.zeros(len(rows), np.int32), np.ones(len(rows), np.int32)
    return Labelled(**arrays, labels=labels, weights=weights)


def texts_of(row: Row, name: str) -> tuple[str, str, str]:
    """Returns the prompt, the chosen and the rejected completion of a row that is called `name`."""
    prompt, (chosen, rejected) = read_pair(row, name, False)
    return as_text(prompt.messages), as_text(chosen), as_text(rejected)


def as_text(turns: Sequence[Message]) -> str:
    """Returns turns as a text: the content of one, or a line for each, after its role."""

    def said(turn: Message) -> str:
        if isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
            return str(turn["content"])
        parts = {name: value for name, value in turn.items() if name != "role"}
        return json.dumps(parts, ensure_ascii=False, default=str)

    if len(turns) == 1:
        return said(turns[0])
    return "\n".join(f"{turn['role']}: {said(turn)}" for turn in turns)


def encode(
    texts: Sequence[tuple[str, str]], tokenizer: Tokenizer, most: int
) -> tuple[dict[str, list[list[int]]], int]:
    """Returns the tokens of prompts and completions, and how many were shortened to `most` tokens.

    They lose the beginning of the prompt and, where that is not enough, the completion's end.
    """
    firsts, seconds = map(list, zip(*texts, strict=True))
    made: Any = tokenizer(firsts, seconds, return_token_type_ids=True, verbose=False)
    encoded = {name: made[name] for name in ("input_ids", "token_type_ids")}
    longer = [i for i, ids in enumerate(made["input_ids"]) if len(ids) > most]
    for i in longer:
        side = np.array([-1 if of is None else of for of in made.sequence_ids(i)])
        order = np.concatenate([np.flatnonzero(side == 0), np.flatnonzero(side == 1)[::-1]])
        for lists in encoded.values():
            lists[i] = np.delete(lists[i], order[: len(side) - most]).tolist()
    return encoded, len(longer)
