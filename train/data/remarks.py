"""Remarks on turns of chats: roles that are unknown, and fields that are probably misspelled."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_jax.training.data.order import list_rows
from lora_jax.training.data.rows import Row, name_of
from lora_jax.training.data.turns import parse_json
from train.data.blocks import DatasetBlocks
from train.data.dataset import Dataset

_FIELDS = """
    role content weight name tool_calls tool_call_id function_call reasoning_content reasoning
    thinking
"""
KNOWN = {"role": "assistant user system tool developer".split(), "field": _FIELDS.split()}
_LETTERS = 2  # by which a field that is named differs from a known one, at most


def turn_remarks(rows: Sequence[Any], source: str, template: str) -> list[str]:
    """Returns a line on each role of turns that is unknown, and on each misspelled field.

    A word that the chat template has as a string or as an attribute is known.

    Args:
      rows: the rows, the data sets that have them, or blocks of rows, of which the first is read.
      source: the name of rows that are in no data set.
      template: the text of the chat template.
    """
    names: dict[tuple[str, str], list[str]] = {}
    for name, row in _named_rows(rows, source):
        for kind, word in dict.fromkeys(_words_of_turns(row)):
            if word not in KNOWN[kind]:
                names.setdefault((kind, word), []).append(name)
    lines = []
    for (kind, word), rows_of_word in names.items():
        letters, nearest = min((_distance(word, known), known) for known in KNOWN[kind])
        is_named = re.search(rf"""['".]{re.escape(word)}\b""", template)
        if is_named or kind == "field" and letters > _LETTERS:
            continue
        lines.append(
            f"remark: the {kind} {word!r} of turns is unknown ({list_rows(rows_of_word, str)}). "
            f"The nearest {kind} is {nearest!r}. Nothing is learned from an unknown {kind}"
        )
    return lines


def _named_rows(rows: Sequence[Any], source: str) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Dataset):
            yield from _named_rows(row.peek(), row.name)
        elif isinstance(row, DatasetBlocks):
            yield from _named_rows([row for _, row in row.read(0)[1]], source)
        elif isinstance(row, Mapping):
            yield name_of(row, source, number), row


def _words_of_turns(row: Row) -> Iterator[tuple[str, str]]:
    """Yields the kind and the word of each role and each field of the turns of a row."""
    for value in row.values():
        turns = parse_json(value)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, Mapping) and isinstance(turn.get("role"), str):
                yield "role", turn["role"]
                yield from (("field", name) for name in turn if turn[name] is not None)


def _distance(word: str, other: str) -> int:
    """Returns the number of letters that are inserted, deleted or replaced between two words."""
    row = [*range(len(other) + 1)]
    for number, letter in enumerate(word, start=1):
        above, row = row, [number]
        for column, wanted in enumerate(other):
            replaced = above[column] + (letter != wanted)
            row.append(min(above[column + 1] + 1, row[column] + 1, replaced))
    return row[-1]
