"""The contract between a completion of several turns and its environment.

Calls are read from a turn's text (`calls.py`); an environment answers them in a process of its own.
Nothing here blocks: answers are futures, so that a row that waits holds no other up.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from lora_jax.training.data.rows import Row


class ToolCall(NamedTuple):
    """A call of a tool, as a model wrote it.

    Attributes:
      name: the tool's name; "" where none could be read.
      arguments: by name; None where they could not be read.
      problem: the reason that a malformed call cannot be run, which is answered as an error; None
        for a call that is well formed.
    """

    name: str
    arguments: dict[str, Any] | None
    problem: str | None = None


class ToolAnswer(NamedTuple):
    """A turn of the role "tool".

    Attributes:
      name: the name of the tool that was called.
      content: what it returned, as a text; for one that failed, the error.
      failed: whether it raised, or could not be called.
    """

    name: str
    content: str
    failed: bool = False


class EpisodeTurn(NamedTuple):
    """The answers to the calls of one turn.

    Attributes:
      answers: one for each call, in order; () for a row that is lost.
      lost: the reason that the row ends here, with the names of row and tool, as its process hung,
        was killed, or ended; else None.
    """

    answers: tuple[ToolAnswer, ...]
    lost: str | None = None


class Episode(Protocol):
    """A completion's conversation with its environment; process 0 alone holds one.

    Attributes:
      opening: the text that `reset` returned, which is appended to the last turn of the user as by
        TRL; None for none.
      lost: the reason that the row is lost from the start, as `reset` raised, hung or was killed;
        else None.
      problem: the reason that `reward` failed; else None.
      changed: the globals that a rehearsed episode changed, but for random generators.
    """

    opening: str | None
    lost: str | None
    problem: str | None
    changed: list[str]

    def call(self, calls: Sequence[ToolCall]) -> "Future[EpisodeTurn]":
        """Runs the calls of a turn, one after the other; does not block."""

    def reward(self) -> "Future[float | None]":
        """Returns the environment's own reward; does not block.

        None: it has none, or no opinion. Infinite: it failed, as for `RewardValues`.
        """

    def close(self) -> None:
        """Ends the conversation, so that its environment's process can serve others."""


class EpisodeHost(Protocol):
    """Opens the episodes of completions.

    Attributes:
      tools: JSON schemas as `transformers.utils.get_json_schema` makes them, for the chat template.
      name: the name of the environment's class; "" for none.
      rewards: whether environments have a reward of their own.
      needs: the fields of a row that `reset` cannot do without.
    """

    tools: list[dict[str, Any]]
    name: str
    rewards: bool
    needs: list[str]

    def open(
        self,
        rows: Sequence[Row],
        seeds: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        *,
        rehearsed: bool = False,
    ) -> "list[Future[Episode]]":
        """Opens an episode for each completion, and resets it with the fields of its row.

        Args:
          rows: the row of each completion: [n], with a row that has n completions n times.
          seeds: seeds of `random` in each episode; None for one by the row's fields. Episodes with
            the same seed and deterministic tools are the same.
          names: the rows' names in messages; None for their places.
          rehearsed: whether each episode ends at once, by its reward, and says what it changed.
        """

    def close(self) -> None:
        """Ends the processes."""
