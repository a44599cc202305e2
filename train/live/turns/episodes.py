"""The answers of environments: heard by the first process, and told to all."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NamedTuple

from lora_jax.training.data.rows import question
from lora_jax.training.processes import is_first
from lora_jax.training.run.stop import Stop
from train.live.turns.joints import TurnJoints
from train.live.turns.rows import AskedRow, opened_row
from train.processes import hosts
from train.rewards.reward import EarnedReward
from train.tools.contract import Episode, EpisodeHost, EpisodeTurn, ToolAnswer, ToolCall

Prompted = Callable[[AskedRow, dict[str, Any]], list[int]]  # the tokens of an opened row


class Heard(NamedTuple):
    """Holds a message of a completion's environment.

    Attributes:
      number: the completion's.
      kind: "opened", "answered" or "earned".
      ids: the prompt, where its environment opened it with a text, else []; or the tokens between
        the turn that called and the next.
      answers: what the tools answered.
      lost: the reason that the completion ends here; else None.
      earned: the reward of its environment.
    """

    number: int
    kind: str
    ids: list[int]
    answers: Sequence[ToolAnswer] = ()
    lost: str | None = None
    earned: EarnedReward = EarnedReward(None)


class Listener:
    """The episodes of one draw. All processes call all methods alike; the first alone has episodes.

    A context that closes the episodes which are still open.
    """

    def __init__(
        self, host: EpisodeHost | None, joints: TurnJoints, prompted: Prompted, stop: Stop
    ) -> None:
        """Begins without any episode.

        Args:
          host: opens episodes; None in other processes than the first.
          joints: renders answers.
          prompted: returns the tokens of a prompt that an environment has opened.
          stop: tells of a signal.
        """
        self._host = host if is_first() else None
        self._joints, self._prompted, self._stop = joints, prompted, stop
        self._episodes: dict[int, Episode] = {}
        self._asked: dict[int, AskedRow] = {}
        self._last: dict[int, int] = {}
        self._futures: dict[int, tuple[str, Future[Any]]] = {}
        self.waiting: set[int] = set()  # the completions that wait for an answer, in all processes

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_: object) -> None:
        for kind, future in self._futures.values():
            if kind == "opened":
                future.add_done_callback(_close)
            future.cancel()
        for episode in self._episodes.values():
            episode.close()
        self._episodes.clear()

    def open(self, asked: Sequence[AskedRow]) -> None:
        """Opens an episode for each of these completions."""
        self.waiting.update(each.number for each in asked)
        if self._host is None or not asked:
            return
        seeds = [each.seed for each in asked if each.seed is not None]
        rows, names = [each.row for each in asked], [each.name for each in asked]
        opened = self._host.open(rows, seeds if len(seeds) == len(rows) else None, names)
        for each, future in zip(asked, opened, strict=True):
            self._asked[each.number] = each
            self._futures[each.number] = "opened", future

    def call(self, number: int, calls: Sequence[ToolCall], last: int) -> None:
        """Has the calls of a turn run; `last` is the token that ended the turn."""
        self.waiting.add(number)
        if self._host is not None:
            self._last[number] = last
            self._futures[number] = "answered", self._episodes[number].call(calls)

    def end(self, number: int, *, is_lost: bool) -> None:
        """Asks for the environment's reward of a completion that is over, and closes its episode.

        One that was lost has none.
        """
        self.waiting.add(number)
        if self._host is None:
            return
        episode = self._episodes.get(number)
        if episode is None or is_lost or not self._host.rewards:
            future: Future[Any] = Future()
            future.set_result(None)
        else:
            future = episode.reward()
        self._futures[number] = "earned", future

    def drop(self, number: int) -> None:
        """Closes the episode of a completion that was lost."""
        if (episode := self._episodes.pop(number, None)) is not None:
            episode.close()

    def hear(self, *, until_one: bool) -> list[Heard]:
        """Returns new messages; all processes have to call this, and get the same.

        Args:
          until_one: wait until something is.

        Raises:
          Dropped: a signal came to the first process, before or meanwhile; raised in all processes.
        """

        def listen() -> None:
            futures = [future for _, future in self._futures.values()]
            if until_one:
                wait(futures, return_when=FIRST_COMPLETED)

        def messages(_: None) -> list[dict[str, Any]]:
            done = [number for number, (_, future) in self._futures.items() if future.done()]
            return [self._message(number) for number in sorted(done)]

        heard = [*map(_read, hosts.ask_first_process(listen, messages, self._stop))]
        self.waiting.difference_update(each.number for each in heard)
        return heard

    def _message(self, number: int) -> dict[str, Any]:
        """Returns the result of a future as JSON."""
        kind, future = self._futures.pop(number)
        message: dict[str, Any] = {"number": number, "kind": kind, "ids": [], "answers": []}
        if kind == "opened":
            return message | self._opened(number, future.result())
        if kind == "answered":
            return message | self._answered(number, future.result())
        value, episode = future.result(), self._episodes.get(number)
        problem = None if episode is None else episode.problem
        self.drop(number)
        return message | {"earned": [value, problem]}

    def _opened(self, number: int, episode: Episode) -> dict[str, Any]:
        self._episodes[number] = episode
        asked = self._asked[number]
        if episode.lost is not None or not episode.opening:
            return {"lost": episode.lost}
        return {"ids": self._prompted(asked, opened_row(asked.row, episode.opening))}

    def _answered(self, number: int, turn: EpisodeTurn) -> dict[str, Any]:
        answers = [self._joints.cut(answer) for answer in turn.answers]
        if turn.lost is not None or not answers:
            return {"lost": turn.lost or "its environment answered nothing"}
        asked, last = self._asked[number], self._last[number]
        options = question(asked.row, asked.name).options
        return {
            "ids": self._joints.render(answers, options, last),
            "answers": [list(answer) for answer in answers],
        }


def _close(opening: "Future[Episode]") -> None:
    """Closes an episode that nobody waits for any more."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _read(message: dict[str, Any]) -> Heard:
    answers = [ToolAnswer(*answer) for answer in message["answers"]]
    earned = EarnedReward(*message.get("earned", (None,)))
    number, kind, ids = (message[name] for name in ("number", "kind", "ids"))
    return Heard(number, kind, ids, answers, message.get("lost"), earned)
