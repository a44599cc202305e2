"""Receives the answers of environments in the first process, and passes them to all processes."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NamedTuple

from lora_jax.training.data.rows import question
from lora_jax.training.processes import is_first
from lora_jax.training.run.stop import Stop
from train.live.turns.joints import TurnJoints
from train.live.turns.rows import TurnRequest, opened_row
from train.processes import hosts
from train.rewards.reward import EarnedReward
from train.tools.contract import Episode, EpisodeHost, EpisodeTurn, ToolAnswer, ToolCall

# Returns the tokens of a row whose prompt an environment has extended.
TokenizeOpened = Callable[[TurnRequest, dict[str, Any]], list[int]]


class EpisodeMessage(NamedTuple):
    """A message from a completion's environment.

    Attributes:
      number: the number of the completion.
      kind: "opened", "answered" or "earned".
      ids: for "opened", the prompt if the environment added a text to it, else []; for "answered",
        the tokens between the calling turn and the next turn.
      answers: the answers of the tools.
      lost: the reason why the completion is lost; None if it is not.
      earned: the reward of the environment.
      opening: for "opened", the text that the environment added to the prompt.
    """

    number: int
    kind: str
    ids: list[int]
    answers: Sequence[ToolAnswer] = ()
    lost: str | None = None
    earned: EarnedReward = EarnedReward(None)
    opening: str = ""


class Listener:
    """A context manager for the episodes of one draw, which closes open episodes at the end.

    All processes must call the same methods. Only the first process has episodes.
    """

    def __init__(
        self,
        host: EpisodeHost | None,
        joints: TurnJoints,
        tokenize_opened: TokenizeOpened,
        stop: Stop,
    ) -> None:
        """Creates a listener without episodes.

        Args:
          host: opens episodes; None in all processes except the first.
          joints: renders answers.
          tokenize_opened: returns the tokens of a prompt that an environment has extended.
          stop: reports a signal.
        """
        self._host = host if is_first() else None
        self._joints = joints
        self._tokenize_opened = tokenize_opened
        self._stop = stop
        # The keys are the numbers of completions.
        self._requests: dict[int, TurnRequest] = {}
        self._episodes: dict[int, Episode] = {}
        self._turn_ends: dict[int, int] = {}  # the token that ended the calling turn
        self._futures: dict[int, tuple[str, Future[Any]]] = {}  # with the kind of their message
        self.waiting: set[int] = set()  # completions that wait for an answer, in all processes

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_: object) -> None:
        """Cancels pending calls, and closes all episodes."""
        for kind, future in self._futures.values():
            if kind == "opened":
                future.add_done_callback(_close)
            future.cancel()
        for episode in self._episodes.values():
            episode.close()
        self._episodes.clear()

    def open(self, requests: Sequence[TurnRequest]) -> None:
        """Opens an episode for each of these completions."""
        self.waiting.update(request.number for request in requests)
        if self._host is None or not requests:
            return
        rows = [request.row for request in requests]
        names = [request.name for request in requests]
        seeds = [request.seed for request in requests if request.seed is not None]
        all_have_seeds = len(seeds) == len(requests)
        futures = self._host.open(rows, seeds if all_have_seeds else None, names)
        for request, future in zip(requests, futures, strict=True):
            self._requests[request.number] = request
            self._futures[request.number] = ("opened", future)

    def call(self, number: int, calls: Sequence[ToolCall], turn_end: int) -> None:
        """Starts the calls of a turn, which ended with the token `turn_end`."""
        self.waiting.add(number)
        if self._host is not None:
            self._turn_ends[number] = turn_end
            self._futures[number] = ("answered", self._episodes[number].call(calls))

    def end(self, number: int, *, is_lost: bool) -> None:
        """Requests the environment's reward of a finished completion, and closes its episode.

        A lost completion has no reward.
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
        self._futures[number] = ("earned", future)

    def drop(self, number: int) -> None:
        """Closes the episode of a completion that was lost."""
        episode = self._episodes.pop(number, None)
        if episode is not None:
            episode.close()

    def hear(self, *, until_one: bool) -> list[EpisodeMessage]:
        """Returns the new messages in all processes, which must all call this method.

        Args:
          until_one: whether to wait until there is a message.

        Raises:
          Dropped: a signal came to the first process; raised in all processes.
        """

        def wait_for_message() -> None:
            futures = [future for _, future in self._futures.values()]
            if until_one:
                wait(futures, return_when=FIRST_COMPLETED)

        def collect_messages(_: None) -> list[dict[str, Any]]:
            numbers = [number for number, (_, future) in self._futures.items() if future.done()]
            return [self._message_as_json(number) for number in sorted(numbers)]

        bodies = hosts.ask_first_process(wait_for_message, collect_messages, self._stop)
        messages = [_message_from_json(body) for body in bodies]
        self.waiting.difference_update(message.number for message in messages)
        return messages

    def _message_as_json(self, number: int) -> dict[str, Any]:
        """Returns the result of a completion's future as a message in JSON."""
        kind, future = self._futures.pop(number)
        message: dict[str, Any] = {"number": number, "kind": kind, "ids": [], "answers": []}
        if kind == "opened":
            return message | self._opened_fields(number, future.result())
        if kind == "answered":
            return message | self._answered_fields(number, future.result())
        # The reward of the environment, after which the episode ends.
        reward = future.result()
        episode = self._episodes.get(number)
        problem = None if episode is None else episode.problem
        self.drop(number)
        return message | {"earned": [reward, problem]}

    def _opened_fields(self, number: int, episode: Episode) -> dict[str, Any]:
        """Keeps an opened episode, and returns the fields of its message."""
        self._episodes[number] = episode
        if episode.lost is not None or not episode.opening:
            return {"lost": episode.lost}
        request = self._requests[number]
        row = opened_row(request.row, episode.opening)
        return {"ids": self._tokenize_opened(request, row), "opening": episode.opening}

    def _answered_fields(self, number: int, turn: EpisodeTurn) -> dict[str, Any]:
        """Returns the fields of a message with the answers to a turn's calls."""
        answers = [self._joints.cut(answer) for answer in turn.answers]
        if turn.lost is not None or not answers:
            return {"lost": turn.lost or "its environment returned no answer"}
        request = self._requests[number]
        template_options = question(request.row, request.name).options
        return {
            "ids": self._joints.render(answers, template_options, self._turn_ends[number]),
            "answers": [list(answer) for answer in answers],
        }


def _close(opening: "Future[Episode]") -> None:
    """Closes an episode that opened after its draw had ended."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _message_from_json(body: dict[str, Any]) -> EpisodeMessage:
    """Returns a message from its JSON; see `Listener._message_as_json`."""
    return EpisodeMessage(
        number=body["number"],
        kind=body["kind"],
        ids=body["ids"],
        answers=[ToolAnswer(*answer) for answer in body["answers"]],
        lost=body.get("lost"),
        earned=EarnedReward(*body.get("earned", (None,))),
        opening=body.get("opening", ""),
    )
