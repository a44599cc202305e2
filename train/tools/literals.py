"""Reads calls that are written as in Python: ``f(a=1, b='x')``, with names of constants as in JSON.

Templates of LFM2 and Gemma 4 write so, and Llama's for its own tools. Not all of them escape the
quotes within a text: one that no separator follows is taken as part of the text.
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
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "\\": "\\", "'": "'", '"': '"'}
_WORD = re.compile(r"[^\s,()\[\]{}:='\"<]+")
_NAME = re.compile(r"\w[\w.-]*")
_CONSTANTS = {"True": True, "False": False, "None": None}
_SPACE = re.compile(r"\s*")


def read_calls(text: str, at: int) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """Reads a list of calls in brackets; returns names and arguments, and the place of its end.

    Args:
      text: the text.
      at: the place where the list begins.

    Raises:
      ValueError: there is no such list.

    >>> from train.tools.literals import read_calls
    >>> read_calls("[look_up(city='Bern', n=[1, null]), stop()]!", 0)
    ([('look_up', {'city': 'Bern', 'n': [1, None]}), ('stop', {})], 43)
    """
    return _series(text, _expect(text, at, "["), "]", read_call)


def read_call(text: str, at: int) -> tuple[tuple[str, dict[str, Any]], int]:
    """Reads a call; returns its name and arguments, and the place of its end."""
    name, at = _match(_NAME, text, at, "the name of a tool")
    pairs, at = _series(text, _expect(text, at, "("), ")", lambda text, at: _pair(text, at, "="))
    return (name, dict(pairs)), at


def read_value(text: str, at: int) -> tuple[Any, int]:
    """Reads a text, a number, a constant, a list or a mapping, whose keys may have no quotes."""
    at = _after_space(text, at)
    if text.startswith("[", at):
        return _series(text, at + 1, "]", read_value)
    if text.startswith("{", at):
        pairs, at = _series(text, at + 1, "}", lambda text, at: _pair(text, at, ":"))
        return dict(pairs), at
    if (quoted := _TEXT.match(text, at)) is not None:
        raw = quoted[3]
        if raw is None:
            raw = _ESCAPE.sub(_unescaped, quoted[2] if quoted[1] is None else quoted[1])
        return raw, quoted.end()
    word, end = _match(_WORD, text, at, "a value")
    try:
        return (_CONSTANTS[word] if word in _CONSTANTS else json.loads(word)), end
    except ValueError:
        raise ValueError(f"{word[:40]!r} is no value: a text needs quotes") from None


def _pair(text: str, at: int, sign: str) -> tuple[tuple[str, Any], int]:
    at = _after_space(text, at)
    if _TEXT.match(text, at):
        key, at = read_value(text, at)
    else:
        key, at = _match(_NAME, text, at, "the name of an argument")
    value, at = read_value(text, _expect(text, at, sign))
    return (key, value), at


def _series(
    text: str, at: int, close: str, item: Callable[[str, int], tuple[Any, int]]
) -> tuple[list[Any], int]:
    """Reads items up to a closing bracket, with commas between them."""
    items: list[Any] = []
    while not text.startswith(close, at := _after_space(text, at)):
        if items:
            at = _expect(text, at, ",")
        value, at = item(text, at)
        items.append(value)
    return items, at + len(close)


def _expect(text: str, at: int, sign: str) -> int:
    at = _after_space(text, at)
    if not text.startswith(sign, at):
        raise ValueError(f"{sign!r} is missing before {text[at : at + 20]!r}")
    return at + len(sign)


def _match(pattern: re.Pattern[str], text: str, at: int, wanted: str) -> tuple[str, int]:
    match = pattern.match(text, at := _after_space(text, at))
    if match is None:
        raise ValueError(f"{wanted} is missing before {text[at : at + 20]!r}")
    return match[0], match.end()


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _unescaped(match: re.Match[str]) -> str:
    letter = match[1]
    if len(letter) == 5:
        return chr(int(letter[1:], 16))
    return _ESCAPED.get(letter, match[0])
