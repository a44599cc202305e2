"""An answer as it grows: where it ends, and the text that can be shown already."""

import os
from collections.abc import Collection, Sequence
from typing import Any, Literal

Ended = Literal["eos", "stop", "length"]
_CUT = "\ufffd"  # what stands for a character whose bytes are not all there


class Answer:
    """The tokens of an answer.

    Attributes:
      tokens: the tokens, the one that ends the answer included.
      most: the most tokens.
      said: the text that `fresh` has returned.
      ended: why no more follow: a token that ends answers, a text of --stop, or the length; None
        while more may follow.
    """

    def __init__(
        self, tokenizer: Any, *, ends: Collection[int], stops: Sequence[str], most: int
    ) -> None:
        """Begins an answer.

        Args:
          tokenizer: the model's.
          ends: the tokens that end an answer.
          stops: the texts that end an answer.
          most: the most tokens.
        """
        self.tokens: list[int] = []
        self.ended: Ended | None = None
        self._tokenizer, self._ends, self._stops, self.most = tokenizer, ends, stops, most
        self.said = ""

    def add(self, tokens: Sequence[int]) -> None:
        """Takes the next tokens; leaves out those after the end."""
        before = len(self.tokens)
        for token in tokens:
            if self.ended is None:
                self.tokens.append(token)
                if token in self._ends:
                    self.ended = "eos"
                elif len(self.tokens) == self.most:
                    self.ended = "length"
        if not self._has_stop(len(self.tokens)):
            return
        while not self._has_stop(before):
            before += 1
        del self.tokens[before:]
        self.ended = "stop"

    @property
    def text(self) -> str:
        """The answer so far, up to a text of --stop."""
        return self._before_stop(self._decoded(len(self.tokens))).strip()

    def fresh(self) -> str:
        """Returns the text to show since the last call.

        It ends before what a further token could change: a character whose bytes are not all there,
        white space (an answer ends without it), or the beginning of a text of --stop. All that is
        returned together is `text` at the end.
        """
        shown = self.text
        if self.ended is None:
            # All tokens are decoded each time: this takes less time than to make one of them.
            held = self._decoded(len(self.tokens)).rstrip(_CUT)
            shown = held[: len(held) - self._n_of_stop(held)].strip()
            if not shown.startswith(self.said):
                return ""  # some tokenizers change what stands before a token
        new = shown[len(os.path.commonprefix([shown, self.said])) :]
        self.said = shown
        return new

    def _decoded(self, n: int) -> str:
        return self._tokenizer.decode(self.tokens[:n], skip_special_tokens=True)

    def _has_stop(self, n: int) -> bool:
        if not self._stops:
            return False
        text = self._decoded(n)
        return any(stop in text for stop in self._stops)

    def _before_stop(self, text: str) -> str:
        return text[: min((text.index(stop) for stop in self._stops if stop in text), default=None)]

    def _n_of_stop(self, text: str) -> int:
        """Returns the length of the longest beginning of a stop text that ends `text`."""
        return max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
