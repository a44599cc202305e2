"""Texts that end an answer: where they stand among its tokens, and what is said before them."""

import bisect
import functools
from collections.abc import Sequence
from typing import Any


class StopTexts:
    """Finds the texts of --stop in an answer, whose text leaves out special tokens.

    A stop text may hold special tokens (`<|im_start|>`), which are then looked at, and still not
    shown.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        """Takes transformers' fast tokenizer, and the texts; none of them is empty."""
        self.stops, self._tokenizer = tuple(stops), tokenizer
        self._looked_at, self._skipped = _special(tokenizer, self.stops)

    def decoded(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, with those special ones that stop texts hold."""
        if not self._looked_at:
            plain: str = self._tokenizer.decode(ids, skip_special_tokens=True)
            return plain
        ids = [one for one in ids if one not in self._skipped]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def place(self, text: str) -> int | None:
        """Returns where the first stop text begins in a decoded text; None if there is none."""
        return min((at for at in map(text.find, self.stops) if at >= 0), default=None)

    def shown(self, text: str) -> str:
        """Returns a decoded text without special tokens, up to the first stop text."""
        text = text[: self.place(text)]
        for special in self._looked_at:
            text = text.replace(special, "")
        return text

    def length(self, ids: Sequence[int], known: int = 0) -> int | None:
        """Returns the number of tokens up to the one that completes a stop text, or None.

        Args:
          ids: the tokens.
          known: a number of first tokens that complete none.
        """
        if not self.stops or self.place(self.decoded(ids)) is None:
            return None
        numbers = range(known + 1, len(ids) + 1)

        def is_complete(n: int) -> bool:
            return self.place(self.decoded(ids[:n])) is not None

        return numbers[bisect.bisect_left(numbers, True, key=is_complete)]

    def cut(self, ids: Sequence[int]) -> tuple[str, int | None]:
        """Returns the text of an answer, and the number of its tokens if a stop text ends it."""
        return self.shown(self.decoded(ids)), self.length(ids)


@functools.lru_cache(maxsize=8)  # a tokenizer may have thousands, and each answer asks
def _special(tokenizer: Any, stops: tuple[str, ...]) -> tuple[tuple[str, ...], frozenset[int]]:
    """Returns the special tokens that stop texts hold, and the ids of the others."""
    if not stops:
        return (), frozenset()
    special = {i: str(one) for i, one in tokenizer.added_tokens_decoder.items() if one.special}
    held = {text for text in special.values() if any(text in stop for stop in stops)}
    skipped = frozenset(i for i, text in special.items() if text not in held)
    return tuple(sorted(held, key=len, reverse=True)), skipped
