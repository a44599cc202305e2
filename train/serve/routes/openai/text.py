"""Converts tokens to text: single tokens, and the tokens of a growing completion."""

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

_MIN_LOGPROB = -9999.0  # what OpenAI's API writes for a log-probability of -inf
_REPLACEMENT = ord("?")  # of a character that stands for no byte


class ServedTokenizer:
    """A tokenizer for the routes, which several threads may use at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Wraps a fast tokenizer of transformers."""
        self.tokenizer = tokenizer
        self._core = tokenizer.backend_tokenizer
        self._added_tokens = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        decoder = self._core.decoder
        is_byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()
        self._byte_of_char = _byte_level() if is_byte_level else {}
        self.of = lru_cache(1 << 16)(self._spell)
        self._max_token_chars = max(map(len, tokenizer.get_vocab()))
        self.ids("", 0)  # the first call may change the tokenizer: here, no other thread has it

    def ids(
        self, text: str, max_tokens: int, *, special: bool = True, cuts: bool = False
    ) -> list[int]:
        """Returns the tokens of a text.

        Args:
          text: the text.
          max_tokens: tokens that are of use: a text that has more in any case costs no time.
          special: adds those with which texts begin or end.
          cuts: leaves out the beginning of such a text, instead of raising.

        Raises:
          TrainingError: the text is too long, or holds half of a character.
        """
        max_chars = max_tokens * self._max_token_chars
        if cuts:
            text = text[-max_chars:]
        if len(text) > max_chars:
            raise TrainingError(
                f"the prompt has {len(text):,} characters, which is more than {max_tokens:,} "
                "tokens can have. Pass a shorter prompt."
            )
        check_text(text, "the prompt")
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def text(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, including special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def templated(self, template: str | None) -> "ServedTokenizer":
        """Returns the tokenizer with another chat template; unchanged for None."""
        if template is None:
            return self
        served_tokenizer = copy.copy(self)
        served_tokenizer.tokenizer = copy.copy(self.tokenizer)
        served_tokenizer.tokenizer.chat_template = template
        return served_tokenizer

    def _spell(self, token: int) -> bytes:
        """Returns the bytes that a token represents."""
        if token in self._added_tokens:
            return self._added_tokens[token].encode()
        entry = self._core.id_to_token(token) or ""  # of the vocabulary
        if self._byte_of_char:
            return bytes(self._byte_of_char.get(char, _REPLACEMENT) for char in entry)
        is_byte = len(entry) == 6 and entry.startswith("<0x")  # such as <0x0A>
        if is_byte:
            return bytes([int(entry[3:5], 16)])
        return entry.replace("▁", " ").encode()


def _byte_level() -> dict[str, int]:
    """Returns the byte for each character of byte-level vocabularies.

    Printable characters stand for themselves; the other bytes, in their order, have those from 256.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {char: ord(char) for char in alphabet if ord(char) < 256}
    other_bytes = sorted({*range(256)} - {*printable.values()})
    return printable | dict(zip(alphabet[len(printable) :], other_bytes, strict=True))


@dataclasses.dataclass(frozen=True)
class TokenEntry:
    """A token with its log-probability, alternatives and place in the text.

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
    """The text of a completion while its tokens arrive; see `TextStream`."""

    def __init__(
        self,
        tokens: ServedTokenizer,
        stop: Sequence[str] = (),
        *,
        special: bool = False,
        keeps_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """Creates an empty text.

        Args:
          tokens: tokenizer of the model.
          stop: texts that end it.
          special: shows special tokens.
          keeps_stop: ends the text with the stop text, not before it.
          min_tokens: the number of first tokens in which no stop text is looked for.
        """
        stops = StopTexts(tokens.tokenizer, stop)
        self._stream = TextStream(stops, special=special, keeps_stop=keeps_stop)
        self._min_tokens = min_tokens
        self._n_tokens = 0
        self._held_entries: list[TokenEntry] = []  # of tokens whose text is not given out

    @property
    def length(self) -> int:
        """The number of characters that were returned so far."""
        return self._stream.length

    @property
    def stopped(self) -> bool:
        """True if a stop text was found."""
        return self._stream.stopped

    def add(
        self,
        token: int,
        logprob: float | None = None,
        top: list[tuple[int, float]] | None = None,
    ) -> tuple[str, list[TokenEntry]]:
        """Adds a token; returns the text that is now final, and its tokens."""
        if self.stopped:
            return "", []
        self._held_entries.append(
            TokenEntry(token=token, logprob=logprob, top=top, start=self._stream.start)
        )
        self._n_tokens += 1
        self._stream.searches = self._n_tokens > self._min_tokens
        text = self._stream.add(token)
        entries = [] if self._stream.is_cut else self._take_entries()
        return text, entries

    def end(self) -> tuple[str, list[TokenEntry]]:
        """Returns the remaining text and its tokens after the last token."""
        if self.stopped:
            return "", []
        text = self._stream.end()
        return text, self._take_entries(last=True)

    def _take_entries(self, *, last: bool = False) -> list[TokenEntry]:
        """Removes and returns the tokens whose text was returned."""
        takes_all = last and not self.stopped
        entries = [entry for entry in self._held_entries if takes_all or entry.start < self.length]
        self._held_entries = self._held_entries[len(entries) :]
        return entries


def listed(top: tuple[Iterable[int], Iterable[float]] | None) -> list[tuple[int, float]] | None:
    """Returns pairs of ids and log-probabilities of the most likely tokens at a place."""
    if top is None:
        return None
    ids, logprobs = top
    return [(int(token), finite(logprob)) for token, logprob in zip(ids, logprobs, strict=True)]


def finite(logprob: float) -> float:
    """Returns a log-probability as a finite number, which JSON can represent."""
    return float(logprob) if math.isfinite(logprob) else _MIN_LOGPROB
