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
KNOWN_WORDS = {"role": "assistant user system tool developer".split(), "field": _FIELDS.split()}
_MAX_MISSPELLED_LETTERS = 2  # by which a field that is named differs from a known one, at most


def turn_remarks(rows: Sequence[Any], source: str, template: str) -> list[str]:
    """Returns a line on each unknown role and on each misspelled field of turns.

    A word that the chat template has as a string or as an attribute is known.

    Args:
      rows: the rows, the data sets that have them, or blocks of rows, of which the first is read.
      source: the name of rows that are in no data set.
      template: the text of the chat template.
    """
    names: dict[tuple[str, str], list[str]] = {}
    for name, row in _named_rows(rows, source):
        for kind, word in dict.fromkeys(_roles_and_fields_of_turns(row)):
            if word not in KNOWN_WORDS[kind]:
                names.setdefault((kind, word), []).append(name)
    lines = []
    for (kind, word), rows_of_word in names.items():
        letters, nearest = min((_edit_distance(word, known), known) for known in KNOWN_WORDS[kind])
        # A chat template may use words of its own. Other fields are ignored on purpose.
        is_named = re.search(rf"""['".]{re.escape(word)}\b""", template)
        is_other_field = kind == "field" and letters > _MAX_MISSPELLED_LETTERS
        if is_named or is_other_field:
            continue
        lines.append(
            f"remark: The {kind} {word!r} of turns is unknown ({list_rows(rows_of_word, str)}). "
            f"Nothing is learned from an unknown {kind}. If it is a typing error, use {nearest!r}."
        )
    return lines


def _named_rows(rows: Sequence[Any], source: str) -> Iterator[tuple[str, Row]]:
    """Yields rows that are mappings, each with its name for messages."""
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Dataset):
            yield from _named_rows(row.peek(), row.name)
        elif isinstance(row, DatasetBlocks):
            yield from _named_rows([row for _, row in row.read(0)[1]], source)
        elif isinstance(row, Mapping):
            yield name_of(row, source, number), row


def _roles_and_fields_of_turns(row: Row) -> Iterator[tuple[str, str]]:
    """Yields ("role", its name) and ("field", its name) for the turns of a row."""
    for value in row.values():
        turns = parse_json(value)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, Mapping) and isinstance(turn.get("role"), str):
                yield "role", turn["role"]
                yield from (("field", name) for name in turn if turn[name] is not None)


def _edit_distance(word: str, other: str) -> int:
    """Returns the edit distance of two words (Levenshtein)."""
    # row[j]: the distance of the letters so far to the first j letters of the other word.
    row = [*range(len(other) + 1)]
    for number, letter in enumerate(word, start=1):
        above, row = row, [number]
        for column, wanted in enumerate(other):
            replaced = above[column] + (letter != wanted)
            row.append(min(above[column + 1] + 1, row[column] + 1, replaced))
    return row[-1]
