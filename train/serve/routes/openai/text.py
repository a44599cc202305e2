"""Tokens as text: of single ones, and of a completion while it grows."""

import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

from tokenizers import pre_tokenizers

from lora_jax.core.types import Tokenizer
from lora_jax.models.sampling.text import StopTexts, TextStream
from lora_jax.training.data.rows import check_text
from lora_jax.training.errors import TrainingError

_LEAST = -9999.0  # what OpenAI's API writes for a log-probability of -inf


class ServedTokenizer:
    """A tokenizer, as the routes use it; by several threads at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Takes transformers' fast tokenizer."""
        self.tokenizer = tokenizer
        self._core = tokenizer.backend_tokenizer
        self._added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        decoder = self._core.decoder
        by_bytes = decoder is not None and b"ByteLevel" in decoder.__getstate__()
        self._bytes_of = _byte_level() if by_bytes else {}
        self.of = lru_cache(1 << 16)(self._spell)
        self._longest = max(map(len, tokenizer.get_vocab()))
        self.ids("", 0)  # the first call may change the tokenizer: here, no other thread has it

    def ids(self, text: str, most: int, *, special: bool = True, cuts: bool = False) -> list[int]:
        """Returns the tokens of a text.

        Args:
          text: the text.
          most: the most tokens that are of use: a text that has more in any case costs no time.
          special: adds those with which texts begin or end.
          cuts: leaves out the beginning of such a text, instead of raising.

        Raises:
          TrainingError: the text is too long, or holds half of a character.
        """
        if cuts:
            text = text[-most * self._longest :]
        if len(text) > most * self._longest:
            raise TrainingError(
                f"the prompt has {len(text):,} characters, more than {most:,} tokens can have: "
                "give a shorter one"
            )
        check_text(text, "the prompt")
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def text(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, special ones too."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def templated(self, template: str | None) -> "ServedTokenizer":
        """Returns the same tokenizer with another chat template, if there is one."""
        if template is None:
            return self
        other = copy.copy(self)
        other.tokenizer = copy.copy(self.tokenizer)
        other.tokenizer.chat_template = template
        return other

    def _spell(self, token: int) -> bytes:
        """Returns the bytes that a token stands for."""
        piece = self._added.get(token)
        if piece is None:
            piece = self._core.id_to_token(token) or ""
            if self._bytes_of:
                return bytes(self._bytes_of.get(char, 63) for char in piece)
            if len(piece) == 6 and piece.startswith("<0x"):  # a byte that is no piece's
                return bytes([int(piece[3:5], 16)])
            piece = piece.replace("▁", " ")
        return piece.encode()


def _byte_level() -> dict[str, int]:
    """Returns the bytes by the characters that stand for them in byte-level vocabularies.

    Printable characters stand for themselves; the other bytes, in their order, have those from 256.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {char: ord(char) for char in alphabet if ord(char) < 256}
    others = sorted({*range(256)} - {*own.values()})
    return own | dict(zip(alphabet[len(own) :], others, strict=True))


@dataclasses.dataclass(frozen=True)
class TokenEntry:
    """A token in a text.

    Attributes:
      token: its id.
      logprob: None for the first of a prompt.
      top: the most likely tokens there with their log-probabilities, or None.
      start: the place in the text where the token begins.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]] | None
    start: int


class CompletionText:
    """The text of a completion with its tokens, as they come; see `TextStream`."""

    def __init__(
        self,
        tokens: ServedTokenizer,
        stop: Sequence[str] = (),
        *,
        special: bool = False,
        keeps_stop: bool = False,
        least: int = 0,
    ) -> None:
        """Begins a text.

        Args:
          tokens: tokenizer of the model.
          stop: texts that end it.
          special: shows special tokens.
          keeps_stop: ends the text with the stop text, not before it.
          least: the number of first tokens in which no stop text is looked for.
        """
        stops = StopTexts(tokens.tokenizer, stop)
        self._stream = TextStream(stops, special=special, keeps_stop=keeps_stop)
        self._least, self._n = least, 0
        self._entries: list[TokenEntry] = []  # of tokens whose text is not given out

    @property
    def length(self) -> int:
        """The number of characters that were given out."""
        return self._stream.length

    @property
    def stopped(self) -> bool:
        """True once a stop text was found."""
        return self._stream.stopped

    def add(
        self,
        token: int,
        logprob: float | None = None,
        top: list[tuple[int, float]] | None = None,
    ) -> tuple[str, list[TokenEntry]]:
        """Takes a token; returns what can be given out now."""
        if self.stopped:
            return "", []
        self._entries.append(TokenEntry(token, logprob, top, self._stream.start))
        self._n += 1
        self._stream.searches = self._n > self._least
        text = self._stream.add(token)
        return text, [] if self._stream.is_cut else self._given()

    def end(self) -> tuple[str, list[TokenEntry]]:
        """Returns the text that was held back, once no more tokens come, and its tokens."""
        if self.stopped:
            return "", []
        return self._stream.end(), self._given(last=True)

    def _given(self, *, last: bool = False) -> list[TokenEntry]:
        """Returns the tokens whose text was given out now."""
        whole = last and not self.stopped
        given = [entry for entry in self._entries if whole or entry.start < self.length]
        self._entries = self._entries[len(given) :]
        return given


def listed(top: tuple[Iterable[int], Iterable[float]] | None) -> list[tuple[int, float]] | None:
    """Returns the most likely tokens at a place, ids and log-probabilities, as pairs."""
    return None if top is None else [(int(i), finite(x)) for i, x in zip(*top, strict=True)]


def finite(logprob: float) -> float:
    """Returns a log-probability that JSON can hold."""
    return float(logprob) if math.isfinite(logprob) else _LEAST
