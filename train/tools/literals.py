"""Parses calls in Python's syntax, ``f(a=1, b='x')``, which may contain JSON's constants.

Templates of LFM2 and Gemma 4 write so, and Llama's for its own tools. Not all of them escape the
quotes within a text: one that no separator follows is taken as part of the text.

Each function reads from a position, the index of a character in the text, and returns the position
behind what it has read. All skip white space.
"""

import json
import re
from collections.abc import Callable
from typing import Any

_TEXT = re.compile(
    r"""'((?:\\.|[^\\])*?)'(?=\s*[,)\]}:])|"((?:\\.|[^\\])*?)"(?=\s*[,)\]}:])|<\|"\|>(.*?)<\|"\|>""",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_LETTERS_OF_ESCAPES = {
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "b": "\b",
    "f": "\f",
    "\\": "\\",
    "'": "'",
    '"': '"',
}
_WORD = re.compile(r"[^\s,()\[\]{}:='\"<]+")
_NAME = re.compile(r"\w[\w.-]*")
_CONSTANTS = {"True": True, "False": False, "None": None}
_WHITE_SPACE = re.compile(r"\s*")


def read_calls(text: str, position: int) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """Reads a bracketed list of calls; returns names and arguments, and the position after it.

    Args:
      text: the text.
      position: the position where the list begins.

    Raises:
      ValueError: there is no such list.

    >>> from train.tools.literals import read_calls
    >>> read_calls("[look_up(city='Bern', n=[1, null]), stop()]!", 0)
    ([('look_up', {'city': 'Bern', 'n': [1, None]}), ('stop', {})], 43)
    """
    position = _skip_sign(text, position, "[")
    return _read_series(text, position, "]", read_call)


def read_call(text: str, position: int) -> tuple[tuple[str, dict[str, Any]], int]:
    """Reads a call; returns its name and arguments, and the position after it."""
    name, position = _read_match(_NAME, text, position, "the name of a tool")
    position = _skip_sign(text, position, "(")
    arguments, position = _read_series(text, position, ")", _read_keyword_argument)
    return (name, dict(arguments)), position


def read_value(text: str, position: int) -> tuple[Any, int]:
    """Reads a text, number, constant, list or mapping. Keys of a mapping may have no quotes."""
    position = _skip_space(text, position)
    if text.startswith("[", position):
        return _read_series(text, position + 1, "]", read_value)
    if text.startswith("{", position):
        entries, position = _read_series(text, position + 1, "}", _read_entry)
        return dict(entries), position
    quoted = _TEXT.match(text, position)
    if quoted is not None:
        single_quoted, double_quoted, raw_text = quoted.groups()
        if raw_text is not None:  # between quotes of Gemma 4, which has no escapes
            return raw_text, quoted.end()
        content = double_quoted if single_quoted is None else single_quoted
        return _ESCAPE.sub(_decode_escape, content), quoted.end()
    word, end = _read_match(_WORD, text, position, "a value")
    if word in _CONSTANTS:
        return _CONSTANTS[word], end
    try:
        return json.loads(word), end
    except ValueError:
        raise ValueError(f"{word[:40]!r} is not a value. Put a text in quotes") from None


def _read_keyword_argument(text: str, position: int) -> tuple[tuple[str, Any], int]:
    """Reads ``name=value``."""
    return _read_pair(text, position, "=")


def _read_entry(text: str, position: int) -> tuple[tuple[str, Any], int]:
    """Reads ``key: value``."""
    return _read_pair(text, position, ":")


def _read_pair(text: str, position: int, sign: str) -> tuple[tuple[str, Any], int]:
    """Reads a key with or without quotes, a separator, and a value."""
    position = _skip_space(text, position)
    if _TEXT.match(text, position):
        key, position = read_value(text, position)
    else:
        key, position = _read_match(_NAME, text, position, "the name of an argument")
    value, position = read_value(text, _skip_sign(text, position, sign))
    return (key, value), position


def _read_series(
    text: str, position: int, close: str, read_item: Callable[[str, int], tuple[Any, int]]
) -> tuple[list[Any], int]:
    """Reads comma-separated items up to a closing bracket."""
    items: list[Any] = []
    position = _skip_space(text, position)
    while not text.startswith(close, position):
        if items:
            position = _skip_sign(text, position, ",")
        item, position = read_item(text, position)
        items.append(item)
        position = _skip_space(text, position)
    return items, position + len(close)


def _skip_sign(text: str, position: int, sign: str) -> int:
    """Reads a required sign, and returns the position after it."""
    position = _skip_space(text, position)
    if not text.startswith(sign, position):
        raise ValueError(f"{sign!r} is missing before {text[position : position + 20]!r}")
    return position + len(sign)


def _read_match(
    pattern: re.Pattern[str], text: str, position: int, description: str
) -> tuple[str, int]:
    """Reads a match of a pattern. The error for a missing match names `description`."""
    position = _skip_space(text, position)
    match = pattern.match(text, position)
    if match is None:
        raise ValueError(f"{description} is missing before {text[position : position + 20]!r}")
    return match[0], match.end()


def _skip_space(text: str, position: int) -> int:
    """Returns the position of the next character that is not white space."""
    match = _WHITE_SPACE.match(text, position)
    assert match is not None
    return match.end()


def _decode_escape(match: re.Match[str]) -> str:
    """Returns the character of an escape sequence; unchanged text for an unknown one."""
    escape = match[1]
    is_code_point = len(escape) == 5  # u and four digits
    if is_code_point:
        return chr(int(escape[1:], 16))
    return _LETTERS_OF_ESCAPES.get(escape, match[0])
