"""Random draws that are the same in every process and every Python version."""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Draws from a stream named by its seeds.

    Python promises to keep the sequence of `random()`, but not that of `sample` or `shuffle`, so
    everything here is made of `random()` alone.
    """

    def __init__(self, *seeds: str | int) -> None:
        self._random = random.Random("/".join(str(seed) for seed in seeds)).random

    def integer(self, low: int, high: int) -> int:
        """An integer between `low` and `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """One of `items`."""
        return items[self.integer(0, len(items) - 1)]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different positions of `items`, in random order."""
        pool = list(items)
        if count > len(pool):
            raise ValueError(f"cannot sample {count} of {len(pool)} items")
        for i in range(count):
            j = self.integer(i, len(pool) - 1)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """`items` in random order."""
        return self.sample(items, len(items))
