"""Converts preference pairs to texts for an encoder, which learns to score the better one."""

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
    """Returns preference pairs as examples for a model with one logit, which learns to score.

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
        prompt, chosen, rejected = texts_of(row, name)
        check_text("\n".join([prompt, chosen, rejected]), name)
        texts += [(prompt, chosen), (prompt, rejected)]
    max_tokens = seq_len if truncate else sys.maxsize

    def encode_block(block: slice) -> dict[str, list[list[int]]]:
        encoded, _ = encode(texts[block], tokenizer, max_tokens)
        return encoded

    text_arrays = padded_texts(encode_block, len(texts), tokenizer, seq_len, source, mapped)
    arrays = {name: array.reshape(len(rows), 2, -1) for name, array in text_arrays.items()}
    return Labelled(
        **arrays, labels=np.zeros(len(rows), np.int32), weights=np.ones(len(rows), np.int32)
    )


def texts_of(row: Row, name: str) -> tuple[str, str, str]:
    """Returns a row's prompt, chosen completion and rejected completion as texts."""
    prompt, (chosen, rejected) = read_pair(row, name, False)
    return as_text(prompt.messages), as_text(chosen), as_text(rejected)


def as_text(turns: Sequence[Message]) -> str:
    """Returns turns as a text: a single turn's content, or a line "role: content" for each."""

    def content_of(turn: Message) -> str:
        if isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
            return str(turn["content"])
        fields = {name: value for name, value in turn.items() if name != "role"}
        return json.dumps(fields, ensure_ascii=False, default=str)

    if len(turns) == 1:
        return content_of(turns[0])
    return "\n".join(f"{turn['role']}: {content_of(turn)}" for turn in turns)


def encode(
    texts: Sequence[tuple[str, str]], tokenizer: Tokenizer, max_tokens: int
) -> tuple[dict[str, list[list[int]]], int]:
    """Encodes prompts with completions; also returns the number of shortened texts.

    Those of more than `max_tokens` tokens lose the beginning of the prompt and, if that is not
    enough, the completion's end.
    """
    prompts = [prompt for prompt, _ in texts]
    completions = [completion for _, completion in texts]
    encoding: Any = tokenizer(prompts, completions, return_token_type_ids=True, verbose=False)
    encoded = {name: encoding[name] for name in ("input_ids", "token_type_ids")}
    lengths = [len(ids) for ids in encoding["input_ids"]]
    longer_indices = [index for index, length in enumerate(lengths) if length > max_tokens]
    for index in longer_indices:
        text_of_token = np.array(encoding.sequence_ids(index))  # 0, 1, or None: a special token
        prompt_tokens = np.flatnonzero(text_of_token == 0)
        completion_tokens = np.flatnonzero(text_of_token == 1)
        deletion_order = np.concatenate([prompt_tokens, completion_tokens[::-1]])
        deleted_tokens = deletion_order[: lengths[index] - max_tokens]
        for lists in encoded.values():
            lists[index] = np.delete(lists[index], deleted_tokens).tolist()
    return encoded, len(longer_indices)
