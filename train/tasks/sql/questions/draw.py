"""Random draws, reproducible in every process and Python version."""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """A random stream, named by its seeds.

    Python guarantees the sequence of `random()` across versions, but not those of `sample` and
    `shuffle`, so all draws here use `random()` alone.
    """

    def __init__(self, *seeds: str | int) -> None:
        self._random = random.Random("/".join(str(seed) for seed in seeds)).random

    def integer(self, low: int, high: int) -> int:
        """Draws an integer between `low` and `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """Draws one of `items`."""
        return items[self.integer(0, len(items) - 1)]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Draws `count` of `items` without replacement, in random order."""
        pool = list(items)
        if count > len(pool):
            raise ValueError(f"cannot sample {count} of {len(pool)} items")
        for i in range(count):
            j = self.integer(i, len(pool) - 1)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Returns `items` in random order."""
        return self.sample(items, len(items))
