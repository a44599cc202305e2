"""Decodes tokens to text as they arrive: finds stop texts, and holds back incomplete characters."""

import bisect
import functools
from collections.abc import Callable, Iterable, Sequence

from lora_jax.core.types import Tokenizer

CUT = "\ufffd"  # stands for a character whose bytes are not all there
_MAX_HELD_TOKENS = 32  # tokens that may wait for the end of a character


class StopTexts:
    """Finds the texts that end an answer. The answer's text omits special tokens.

    A stop text may hold special tokens (`<|im_start|>`), which are then looked at, and still not
    shown.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        """Takes a fast tokenizer of transformers, and the stop texts, which must not be empty."""
        self.stops = tuple(stops)
        self._tokenizer = tokenizer
        self._looked_at, self._skipped = _split_special_tokens(tokenizer, self.stops)

    def decoded(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Returns the text of tokens, including special tokens that stop texts contain."""
        if special or not self._looked_at:
            plain: str = self._tokenizer.decode(ids, skip_special_tokens=not special)
            return plain
        ids = [token for token in ids if token not in self._skipped]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def find_stop(self, text: str) -> int | None:
        """Returns the position of the first stop text in a decoded text, or None."""
        places = [text.find(stop) for stop in self.stops]
        return min((place for place in places if place >= 0), default=None)

    def shown(self, text: str) -> str:
        """Returns a decoded text without special tokens, cut before the first stop text."""
        return self.plain(text[: self.find_stop(text)])

    def plain(self, text: str) -> str:
        """Returns a decoded text without special tokens."""
        for special in self._looked_at:
            text = text.replace(special, "")
        return text

    def end(self, text: str, place: int) -> int:
        """Returns the end of the stop text at a position of a decoded text."""
        return place + next(len(stop) for stop in self.stops if text.startswith(stop, place))

    def length(self, ids: Sequence[int], known: int = 0) -> int | None:
        """Returns the number of tokens up to the end of the first stop text, or None.

        Args:
          ids: the tokens.
          known: a number of first tokens that complete none.
        """
        if not self.stops or self.find_stop(self.decoded(ids)) is None:
            return None
        lengths = range(known + 1, len(ids) + 1)

        def has_stop(length: int) -> bool:
            return self.find_stop(self.decoded(ids[:length])) is not None

        return lengths[bisect.bisect_left(lengths, True, key=has_stop)]

    def cut(self, ids: Sequence[int]) -> tuple[str, int | None]:
        """Returns the text of an answer, and its number of tokens if a stop text ends it."""
        return self.shown(self.decoded(ids)), self.length(ids)


class TextStream:
    """The text of arriving tokens; released text is never changed.

    It ends before a stop text, or with it. What may become part of one is held back, and so are the
    bytes of an incomplete character.

    Attributes:
      searches: whether stop texts are looked for.
      length: number of characters that were given out.
      stopped: True once a stop text was found.
      is_cut: True while bytes of a character are missing.
    """

    def __init__(
        self, stops: StopTexts, *, special: bool = False, keeps_stop: bool = False
    ) -> None:
        """Starts a text; `special` shows special tokens, `keeps_stop` the stop text."""
        self.length = 0
        self.stopped = False
        self.is_cut = False
        self.searches = True
        self._stops = stops
        self._show_special = special
        self._keeps_stop = keeps_stop
        self._ids: list[int] = []  # those given out last, as the context of the next, and the rest
        self._known = 0  # those given out, of these
        self._held = ""  # decoded, and not given out

    @property
    def start(self) -> int:
        """The position in the text where the next token starts."""
        return self.length + len(self._held)

    def add(self, token: int) -> str:
        """Adds a token; returns the text that can be released now."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._decoded()
        # A character whose bytes are not all there is held back, but not before a stop text.
        may_wait = len(self._ids) - self._known < _MAX_HELD_TOKENS
        has_stop = self._find_stop(self._held + text) is not None
        self.is_cut = text.endswith(CUT) and may_wait and not has_stop
        return "" if self.is_cut else self._release(text)

    def end(self) -> str:
        """Returns the text that was held back, after the last token."""
        return "" if self.stopped else self._release(self._decoded(), last=True)

    def _find_stop(self, text: str) -> int | None:
        return self._stops.find_stop(text) if self.searches else None

    def _decoded(self) -> str:
        """Returns the text since the last released tokens."""
        released = self._text(self._ids[: self._known])
        return self._text(self._ids)[len(released) :]

    def _text(self, ids: Sequence[int]) -> str:
        return self._stops.decoded(ids, special=self._show_special)

    def _release(self, decoded: str, *, last: bool = False) -> str:
        """Returns the text that can be released, without a possible start of a stop text.

        Args:
          decoded: the text of the tokens since the last release.
          last: whether no tokens follow, so that nothing is held back.
        """
        if decoded:
            self._ids = self._ids[self._known :]
            self._known = len(self._ids)
        text = self._held + decoded
        stop_place = self._find_stop(text)
        self.stopped = stop_place is not None
        if stop_place is None:
            end = len(text)
            if self.searches and not last:
                end -= unfinished_mark_length(text, self._stops.stops)
        elif self._keeps_stop:
            end = self._stops.end(text, stop_place)
        else:
            end = stop_place
        self._held = text[end:]
        released = text[:end] if self._show_special else self._stops.plain(text[:end])
        self.length += len(released)
        return released


def unfinished_mark_length(text: str, marks: Iterable[str]) -> int:
    """Returns the length of the longest suffix of a text that starts one of the marks."""
    longest = 0
    for mark in marks:
        for length in range(1, len(mark)):
            if text.endswith(mark[:length]):
                longest = max(longest, length)
    return longest


def ends_with_stop(
    ids: Sequence[int], stops: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> bool:
    """Returns True if the newest token of an answer completes a stop text.

    Args:
      ids: all tokens of the answer.
      stops: the stop texts.
      decode: returns the text of tokens; it is given only tokens that a stop text can be made of.
    """
    if not stops:
        return False
    longest = max(len(stop.encode()) for stop in stops)  # a token may be a byte
    text = decode(ids[-(longest + 8) :])
    return any(stop in text for stop in stops)


@functools.lru_cache(maxsize=8)  # a tokenizer may have thousands, and each answer asks
def _split_special_tokens(
    tokenizer: Tokenizer, stops: tuple[str, ...]
) -> tuple[tuple[str, ...], frozenset[int]]:
    """Returns the special tokens in stop texts, and the ids of the others."""
    if not stops:
        return (), frozenset()
    added = tokenizer.added_tokens_decoder.items()
    special = {i: str(token) for i, token in added if token.special}
    held = {text for text in special.values() if any(text in stop for stop in stops)}
    skipped = frozenset(i for i, text in special.items() if text not in held)
    return tuple(sorted(held, key=len, reverse=True)), skipped
