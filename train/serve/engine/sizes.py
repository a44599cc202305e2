"""The few array shapes of a server, all of which are compiled before it serves."""

import bisect
import dataclasses
from collections.abc import Sequence

_SHORTEST_ROW = 64
_SHORTEST_CACHE = 128
N_TARGETS = (1, 32)  # the numbers of targets of a token that programs are compiled for
_MAX_PIECE_PROMPTS = 4


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The limits from which a server's array shapes follow.

    Attributes:
      max_length: tokens of a sequence at most.
      tokens: number of tokens of a batch that is trained on.
      sequences: completions side by side at most.
      chunk: tokens of a prompt that run at once.
      parts: number of parts of a batch, on a mesh.
      prefixes: bytes of the prompts' keys and values that are kept, at most.
      fast_prompts: whether pieces of several prompts run together, and drawn tokens are found
        again: last bits of an answer then depend on what else was asked for.
    """

    max_length: int
    tokens: int
    sequences: int
    chunk: int
    parts: int = 1
    prefixes: int = 10**9
    fast_prompts: bool = False

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """The lengths of training rows, each half of the next."""
        lengths = [self.max_length]
        while lengths[-1] % 2 == 0 and lengths[-1] // 2 >= _SHORTEST_ROW:
            lengths.append(lengths[-1] // 2)
        return tuple(reversed(lengths))

    @property
    def cache_lengths(self) -> tuple[int, ...]:
        """The lengths of completions' caches."""
        lengths = tuple(length for length in self.row_lengths if length >= _SHORTEST_CACHE)
        return lengths or self.row_lengths[-1:]

    @property
    def widths(self) -> tuple[int, ...]:
        """The possible numbers of rows that decode together."""
        narrow = max(1, self.sequences // 8)
        return (narrow, self.sequences) if narrow < self.sequences else (self.sequences,)

    @property
    def piece_prompts(self) -> int:
        """The number of prompts whose pieces run in one call, a divisor of a chunk's tokens."""
        n_prompts = min(_MAX_PIECE_PROMPTS, self.chunk) if self.fast_prompts else 1
        while self.chunk % n_prompts:
            n_prompts -= 1
        return n_prompts

    @property
    def piece_tokens(self) -> int:
        """The number of tokens of a piece, so that all pieces of a call fill one chunk."""
        return self.chunk // self.piece_prompts

    def n_rows(self, row_length: int) -> int:
        """Returns the number of rows of a batch of this length."""
        return self.parts * max(1, self.tokens // (row_length * self.parts))

    def cache_length(self, n_tokens: int) -> int:
        """Returns the length of a cache that holds n tokens."""
        return self.cache_lengths[bisect.bisect_left(self.cache_lengths, n_tokens)]

    def caches_to(self, length: int, other_length: int) -> Sequence[int]:
        """Returns the cache lengths after `length`, up or down to and including `other_length`."""
        start = self.cache_lengths.index(length)
        end = self.cache_lengths.index(other_length)
        if end >= start:
            return self.cache_lengths[start + 1 : end + 1]
        return self.cache_lengths[end:start][::-1]

    def row_length(self, n_tokens: int) -> int:
        """Returns the length of a row that holds n tokens."""
        return self.row_lengths[bisect.bisect_left(self.row_lengths, n_tokens)]

    def width(self, n_completions: int) -> int:
        """Returns the width that holds n completions."""
        return self.widths[bisect.bisect_left(self.widths, n_completions)]
