"""The few shapes in which a server computes, so that nothing compiles once it serves."""

import bisect
import dataclasses
from collections.abc import Sequence

_LEAST, _LEAST_CACHE = 64, 128  # the shortest rows, and caches
TARGETS = (1, 32)  # targets of a place
_TOGETHER = 4  # prompts, at most, of which pieces run together


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Holds shapes.

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
    def lengths(self) -> tuple[int, ...]:
        """The lengths of rows: halves of the longest."""
        halvings = [self.max_length]
        while halvings[-1] % 2 == 0 and halvings[-1] // 2 >= _LEAST:
            halvings.append(halvings[-1] // 2)
        return tuple(reversed(halvings))

    @property
    def caches(self) -> tuple[int, ...]:
        """The lengths of completions' caches."""
        return tuple(n for n in self.lengths if n >= _LEAST_CACHE) or self.lengths[-1:]

    @property
    def widths(self) -> tuple[int, ...]:
        """The numbers of completions side by side."""
        few = max(1, self.sequences // 8)
        return (few, self.sequences) if few < self.sequences else (self.sequences,)

    @property
    def pieces(self) -> tuple[int, int]:
        """The number of prompts that run together, and tokens of each: a chunk in all."""
        n = min(_TOGETHER, self.chunk) if self.fast_prompts else 1
        while self.chunk % n:
            n -= 1
        return n, self.chunk // n

    def rows(self, length: int) -> int:
        """Returns the number of rows of a batch of this length."""
        return self.parts * max(1, self.tokens // (length * self.parts))

    def cache(self, n: int) -> int:
        """Returns the length of a cache that holds n tokens."""
        return self.caches[bisect.bisect_left(self.caches, n)]

    def caches_to(self, length: int, other: int) -> Sequence[int]:
        """Returns the lengths of caches from one, left out, to another one, a step at a time."""
        i, j = self.caches.index(length), self.caches.index(other)
        return self.caches[i + 1 : j + 1] or self.caches[j:i][::-1]

    def length(self, n: int) -> int:
        """Returns the length of a row that holds n tokens."""
        return self.lengths[bisect.bisect_left(self.lengths, n)]

    def width(self, n: int) -> int:
        """Returns the width that holds n completions."""
        return self.widths[bisect.bisect_left(self.widths, n)]
