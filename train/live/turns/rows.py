"""A completion of several turns, as it comes to be."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.training.data.rows import Row
from train.rewards.reward import EarnedReward
from train.tools.contract import ToolAnswer, ToolCall

# Reads a turn's tokens, after a prompt's: returns what is said, and the calls.
ReadTurn = Callable[[Sequence[int], Sequence[int]], tuple[str, Sequence[ToolCall]]]


class TurnLimits(NamedTuple):
    """Bounds a completion.

    Attributes:
      new_tokens: the most tokens of all its turns together, those of the environment included.
      total: the most tokens of a prompt and its completion.
      turns: the most turns of the model; None for no limit but that of tokens.
    """

    new_tokens: int
    total: int
    turns: int | None = None


class TurnRequest(NamedTuple):
    """Holds the prompt of a completion.

    Attributes:
      number: its number in the draw, which tells its key.
      row: the fields of its row.
      name: the row's name in messages.
      prompt: the tokens of the prompt, without what an environment opens it with.
      seed: what the environment's random numbers come from; None for the row's fields.
    """

    number: int
    row: Row
    name: str
    prompt: Sequence[int]
    seed: int | None = None


@dataclasses.dataclass(eq=False)
class TurnCompletion:
    """A completion of one row.

    Attributes:
      request: what it completes.
      prompt: the tokens before it, with what the environment opened it with.
      ids: all tokens: those of the model, and those of the environment between its turns.
      logps: the log-probability of each when it was drawn; 0 for those of the environment.
      is_own: whether the model drew it.
      messages: its turns, as TRL's reward functions get them.
      turn_starts: the place in `ids` where each turn of the model begins.
      calls, failures: the number of calls that were answered, and of those that failed.
      ended: whether the last turn came to an end by itself.
      lost: the reason that the row ended before its time, as its environment was lost; else None.
      earned: the reward of its environment; a value of None where that has none.
      routing: [slots, layers, k], the experts of its tokens, from the prompt's first one on; -1 for
        those that did not run. None where nobody asks, or it did not begin.
    """

    request: TurnRequest
    prompt: Sequence[int] = ()
    ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    is_own: list[bool] = dataclasses.field(default_factory=list)
    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    turn_starts: list[int] = dataclasses.field(default_factory=list)
    calls: int = 0
    failures: int = 0
    ended: bool = False
    lost: str | None = None
    earned: EarnedReward = EarnedReward(None)
    routing: np.ndarray | None = None

    @property
    def text(self) -> str:
        """Returns the text of the model's last turn, which rewards of ours judge."""
        for turn in reversed(self.messages):
            if turn["role"] == "assistant":
                return str(turn["content"])
        return ""

    @property
    def turn(self) -> list[int]:
        """Returns the tokens of the newest turn."""
        return self.ids[self.turn_starts[-1] :]

    def draw(self, ids: Sequence[int], logps: Sequence[float]) -> None:
        """Takes tokens that the model drew."""
        self.ids += ids
        self.logps += logps
        self.is_own += [True] * len(ids)

    def answer(self, ids: Sequence[int]) -> None:
        """Takes tokens of the environment."""
        self.ids += ids
        self.logps += [0.0] * len(ids)
        self.is_own += [False] * len(ids)

    def cut(self, n_tokens: int) -> None:
        """Keeps the first tokens of the newest turn, which is then over."""
        end = self.turn_starts[-1] + n_tokens
        del self.ids[end:], self.logps[end:], self.is_own[end:]

    def say(self, content: str, calls: Sequence[ToolCall] = ()) -> None:
        """Notes a turn of the model."""
        turn: dict[str, Any] = {"role": "assistant", "content": content}
        tool_calls = []
        for call in calls:
            function = {"name": call.name, "arguments": call.arguments or {}}
            tool_calls.append({"type": "function", "function": function})
        if tool_calls:
            turn["tool_calls"] = tool_calls
        self.messages.append(turn)

    def hear(self, answers: Sequence[ToolAnswer]) -> None:
        """Notes turns of tools."""
        for answer in answers:
            self.messages.append({"role": "tool", "name": answer.name, "content": answer.content})

    def count(self, answers: Sequence[ToolAnswer]) -> None:
        """Counts calls that were answered."""
        self.calls += len(answers)
        self.failures += sum(answer.failed for answer in answers)


def opened_row(row: Row, opening: str) -> dict[str, Any]:
    """Returns a row whose last turn of the user ends with what its environment says first.

    As TRL, which adds the text as it is, behind the content.
    """
    field = "messages" if row.get("messages") else "prompt"
    prompt: Any = row.get(field) or ""
    if isinstance(prompt, str):
        return {**row, field: prompt + opening}
    last_turn = prompt[-1]
    content = last_turn["content"]
    if isinstance(content, list):
        content = [*content, {"type": "text", "text": opening}]
    else:
        content = content + opening
    return {**row, field: [*prompt[:-1], {**last_turn, "content": content}]}


def tool_metrics(completions: Sequence[TurnCompletion]) -> Mapping[str, float | None]:
    """Returns metrics of calls; the first two have TRL's names and meanings."""
    n_completions = len(completions)
    n_calls = sum(completion.calls for completion in completions)
    n_failures = sum(completion.failures for completion in completions)
    n_turns = sum(len(completion.turn_starts) for completion in completions)
    n_lost = sum(completion.lost is not None for completion in completions)
    return {
        "tools/call_frequency": n_calls / n_completions,
        "tools/failure_frequency": n_failures / n_calls if n_calls else 0.0,
        "tools/turns": n_turns / n_completions,
        "tools/lost": n_lost / n_completions,
    }
