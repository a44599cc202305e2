"""Remarks on turns of chats: roles that are unknown, and fields that are probably misspelled."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.training.data.order import list_rows
from lora_jax.training.data.rows import Row, name_of
from lora_jax.training.data.turns import Message, parse_json
from train.data.blocks import DatasetBlocks
from train.data.dataset import Dataset

ROLES = ("assistant", "user", "system", "tool", "developer")
FIELDS = (
    *("role", "content", "weight", "name", "tool_calls", "tool_call_id", "function_call"),
    *("reasoning_content", "reasoning", "thinking"),
)
_LETTERS = 2  # by which a misspelled field differs from a known one, at most


class NamedRow(NamedTuple):
    """A row, and a function that returns its name in messages."""

    row: Row
    name: Callable[[], str]


def turn_remarks(rows: Sequence[Any], source: str, template: str) -> list[str]:
    """Returns a line on each role of turns that is unknown, and on each misspelled field.

    A role or a field that the chat template names is known.

    Args:
      rows: the rows, the data sets that have them, or blocks of rows, of which the first is read.
      source: the name of rows that are in no data set.
      template: the text of the chat template.
    """
    rows_of_role: dict[str, list[NamedRow]] = {}
    rows_of_field: dict[str, list[NamedRow]] = {}
    for named in _named_rows(rows, source):
        turns = [*_turns(named.row)]
        for role in dict.fromkeys(turn["role"] for turn in turns):
            if role not in ROLES and not _is_named(template, role):
                rows_of_role.setdefault(role, []).append(named)
        for field in dict.fromkeys(field for turn in turns for field in turn):
            if _is_misspelled(field) and not _is_named(template, field):
                rows_of_field.setdefault(field, []).append(named)
    lines = [
        f"remark: the role {role!r} is unknown ({_names(named_rows)}). The nearest role is "
        f"{_nearest(role, ROLES)!r}. Only a turn of the role 'assistant' is the assistant's"
        for role, named_rows in rows_of_role.items()
    ]
    lines += [
        f"remark: the field {field!r} of turns is unknown ({_names(named_rows)}). The nearest "
        f"field is {_nearest(field, FIELDS)!r}"
        for field, named_rows in rows_of_field.items()
    ]
    return lines


def _named_rows(rows: Sequence[Any], source: str) -> Iterator[NamedRow]:
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Dataset):
            yield from _named_rows(row.peek(), row.name)
        elif isinstance(row, DatasetBlocks):
            part, numbered = row.read(0)
            yield from _named_rows([row for _, row in numbered], row.parts[part].name)
        elif isinstance(row, Mapping):
            yield NamedRow(row, functools.partial(name_of, row, source, number))


def _turns(row: Row) -> Iterator[Message]:
    """Yields the turns in all fields of a row, without their fields that are None."""
    for value in row.values():
        turns = parse_json(value)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, Mapping) and isinstance(turn.get("role"), str):
                yield {name: content for name, content in turn.items() if content is not None}


def _is_named(template: str, word: str) -> bool:
    """Returns True if a template has a word as a string or as an attribute."""
    return re.search(rf"""['".]{re.escape(word)}\b""", template) is not None


@functools.lru_cache(maxsize=1024)
def _is_misspelled(field: str) -> bool:
    return field not in FIELDS and _distance(field, _nearest(field, FIELDS)) <= _LETTERS


def _names(named_rows: Sequence[NamedRow]) -> str:
    return list_rows(named_rows, lambda named: named.name())


def _nearest(word: str, known: Sequence[str]) -> str:
    return min(known, key=functools.partial(_distance, word))


def _distance(word: str, other: str) -> int:
    """Returns how many letters to insert, delete or replace, to make one word of the other."""
    row = [*range(len(other) + 1)]
    for number, letter in enumerate(word, start=1):
        above, row = row, [number]
        for column, wanted in enumerate(other):
            replaced = above[column] + (letter != wanted)
            row.append(min(above[column + 1] + 1, row[column] + 1, replaced))
    return row[-1]
