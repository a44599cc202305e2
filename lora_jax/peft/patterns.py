"""Matches the regular expressions of adapter_config.json against names of modules, in bounded time.

PEFT matches with Python's `re`, which may take years for a pattern that backtracks. `regex` reads
the same patterns and stops when its time is up.
"""

import functools
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import regex

from lora_jax.peft.errors import PeftError

# Seconds for all matches of a configuration, or for one match outside `limit_matches`.
MAX_SECONDS = 5.0
_MAX_CHARACTERS = 200  # of a pattern in a message
# Without a quantifier, no pattern can backtrack for long.
_QUANTIFIER = re.compile(r"[*+?{]")
# `re` reads these braces as characters, but `regex` as a number of errors that a match may have.
_LITERAL_BRACE = re.compile(r"(?<!\\N)(?<!\\)\{(?!\d*,?\d*\})")
_DEADLINE: ContextVar[float | None] = ContextVar("deadline", default=None)


@contextmanager
def limit_matches() -> Iterator[None]:
    """Gives `MAX_SECONDS` to all matches inside the block together."""
    token = _DEADLINE.set(time.monotonic() + MAX_SECONDS)
    try:
        yield
    finally:
        _DEADLINE.reset(token)


def match(field: str, pattern: str, name: str, form: str = "{}") -> re.Match[str] | None:
    """Returns the match at the beginning of a name, as `re.match` does, or None.

    Args:
      field: the field of the configuration that has the pattern, for messages.
      pattern: the pattern.
      name: the name of a module.
      form: the expression that PEFT makes of the pattern, with "{}" in its place.

    Raises:
      PeftError: the pattern is broken, or matching takes too long.
    """
    return _match(field, pattern, form.replace("{}", pattern), name, "match")


def fullmatch(field: str, pattern: str, name: str) -> bool:
    """Returns True if a pattern matches a whole name, as `re.fullmatch` does; see `match`."""
    return _match(field, pattern, pattern, name, "fullmatch") is not None


def _match(
    field: str, pattern: str, expression: str, name: str, method: str
) -> re.Match[str] | None:
    """Returns the match of an expression that a pattern is part of, by a method of patterns."""
    result: re.Match[str] | None
    if not _QUANTIFIER.search(pattern):
        result = getattr(_compile(field, pattern, expression), method)(name)
        return result
    compiled = _compile_with_timeout(field, pattern, expression)
    deadline = _DEADLINE.get()
    seconds = MAX_SECONDS if deadline is None else deadline - time.monotonic()
    try:
        # `regex` takes a timeout of zero or less for none.
        result = getattr(compiled, method)(name, timeout=max(seconds, 1e-3))
        return result
    except TimeoutError:
        raise PeftError(
            f"{field} has the pattern {shorten(pattern)}, which takes more than {MAX_SECONDS:.0f} "
            f"s to match, as at {name}: it backtracks. Write a pattern without nested repetitions."
        ) from None


@functools.lru_cache(8192)
def _compile(field: str, pattern: str, expression: str) -> re.Pattern[str]:
    """Compiles an expression with `re`, as PEFT does."""
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        raise PeftError(
            f"{field} has the pattern {shorten(pattern)}, which is no regular expression: "
            f"{reason}. Correct the pattern."
        ) from None


@functools.lru_cache(8192)
def _compile_with_timeout(field: str, pattern: str, expression: str) -> "regex.Pattern[str]":
    """Compiles an expression with `regex`, after `re` has accepted it."""
    _compile(field, pattern, expression)
    try:
        return regex.compile(_LITERAL_BRACE.sub(r"\\{", expression), regex.VERSION0)
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise PeftError(
            f"{field} has the pattern {shorten(pattern)}, which the package regex does not read: "
            f"{error}. Write the pattern in another way."
        ) from None


def shorten(pattern: str) -> str:
    """Returns a pattern in quotes for a message of one line, cut if it is long."""
    text = repr(pattern)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}…"
