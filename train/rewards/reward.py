"""The contract of a reward: an object that judges the completions of a step."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Batch(NamedTuple):
    """The completions of a step; those of one prompt follow each other.

    Attributes:
      prompts: the prompt of each completion, as its row has it: a text or a chat.
      completions: the texts.
      completion_ids: their tokens.
      columns: the values of the rows' other columns, one for each completion.
      group: the number of completions of a prompt.
    """

    prompts: Sequence[Any]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    group: int


class Judged(NamedTuple):
    """The values that a reward gives to a batch.

    Attributes:
      values: [n], fp32; NaN: no opinion, or none because it failed.
      failures: the number of completions that have no value because it failed, by kind.
      said: the first message of each kind of failure.
      kinds: the number of completions by what became of them, for rewards that tell.
    """

    values: np.ndarray
    failures: Mapping[str, int] = {}
    said: Mapping[str, str] = {}
    kinds: Mapping[str, int] = {}


class Reward(Protocol):
    """Judges completions. A reward model is one too: it has no need of another process."""

    @property
    def needs(self) -> Collection[str]:
        """The columns that it cannot do without."""

    def __call__(self, batch: Batch) -> Judged:
        """Returns what it says of a batch."""

    def close(self) -> None:
        """Ends what it started."""


class Simple:
    """A reward that is a function of each completion, its tokens, and the columns that it needs."""

    def __init__(self, function: Callable[..., float], needs: Sequence[str] = ()) -> None:
        self.needs, self._function = needs, function

    def __call__(self, batch: Batch) -> Judged:
        """Returns the function's values."""
        columns = (batch.columns[name] for name in self.needs)
        rows = zip(batch.completions, batch.completion_ids, *columns, strict=True)
        return Judged(np.array([self._function(*row) for row in rows], np.float32))

    def close(self) -> None:
        """Does nothing."""
