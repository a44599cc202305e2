"""A completion of several turns while it is drawn."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.training.data.rows import Row
from train.rewards.reward import EarnedReward
from train.tools.contract import ToolAnswer, ToolCall

# Reads a turn from its tokens and those before it: returns the text and the calls.
ReadTurn = Callable[[Sequence[int], Sequence[int]], tuple[str, Sequence[ToolCall]]]


class TurnLimits(NamedTuple):
    """The limits of a completion.

    Attributes:
      new_tokens: the maximum number of tokens of all its turns, including those of the environment.
      total: the maximum number of tokens of a prompt with its completion.
      turns: the maximum number of the model's turns; None for no such limit.
    """

    new_tokens: int
    total: int
    turns: int | None = None


class TurnRequest(NamedTuple):
    """The request for a completion of a prompt.

    Attributes:
      number: the number of the completion in the draw, which determines its key.
      row: the fields of the row.
      name: the name of the row for messages.
      prompt: the tokens of the prompt, without the text that an environment adds.
      seed: the seed of the environment's random numbers; None to derive it from the row's fields.
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
      request: the request for the completion.
      prompt: the tokens before the completion, with the text that the environment added.
      opening: the text that the environment added to the prompt.
      ids: all tokens: those of the model, and those of the environment between its turns.
      logps: the log-probability of each token when it was drawn; 0 for the environment's tokens.
      is_own: whether the model drew each token.
      messages: the turns in the form that TRL's reward functions receive.
      turn_starts: the index in `ids` at which each turn of the model begins.
      calls, failures: the number of answered calls, and of failed ones among them.
      ended: whether the last turn ended by itself.
      lost: the reason why the completion ended early because of its environment; else None.
      earned: the reward of the environment, whose value is None without one.
      routing: [slots, layers, k], the experts of its tokens, from the prompt's first token on; -1
        for tokens that did not run. None if routing is not kept, or no turn began.
    """

    request: TurnRequest
    prompt: Sequence[int] = ()
    opening: str = ""
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
        """Returns the text of the model's last turn, which built-in rewards rate."""
        for turn in reversed(self.messages):
            if turn["role"] == "assistant":
                return str(turn["content"])
        return ""

    @property
    def turn(self) -> list[int]:
        """Returns the tokens of the newest turn."""
        return self.ids[self.turn_starts[-1] :]

    def draw(self, ids: Sequence[int], logps: Sequence[float]) -> None:
        """Appends tokens that the model drew."""
        self.ids += ids
        self.logps += logps
        self.is_own += [True] * len(ids)

    def answer(self, ids: Sequence[int]) -> None:
        """Appends tokens of the environment."""
        self.ids += ids
        self.logps += [0.0] * len(ids)
        self.is_own += [False] * len(ids)

    def cut(self, n_tokens: int) -> None:
        """Removes all but the first `n_tokens` tokens of the newest turn."""
        end = self.turn_starts[-1] + n_tokens
        del self.ids[end:], self.logps[end:], self.is_own[end:]

    def say(self, content: str, calls: Sequence[ToolCall] = ()) -> None:
        """Appends a turn of the model to the messages."""
        turn: dict[str, Any] = {"role": "assistant", "content": content}
        tool_calls = []
        for call in calls:
            function = {"name": call.name, "arguments": call.arguments or {}}
            tool_calls.append({"type": "function", "function": function})
        if tool_calls:
            turn["tool_calls"] = tool_calls
        self.messages.append(turn)

    def hear(self, answers: Sequence[ToolAnswer]) -> None:
        """Appends turns of tools to the messages."""
        for answer in answers:
            self.messages.append({"role": "tool", "name": answer.name, "content": answer.content})

    def count(self, answers: Sequence[ToolAnswer]) -> None:
        """Counts answered and failed calls."""
        self.calls += len(answers)
        self.failures += sum(answer.failed for answer in answers)


def opened_row(row: Row, opening: str) -> dict[str, Any]:
    """Returns a row with the environment's first text at the end of the user's last turn.

    As in TRL, the text is appended to the content without changes.
    """
    field = "messages" if row.get("messages") else "prompt"
    prompt: Any = row.get(field) or ""
    if isinstance(prompt, str):
        return {**row, field: prompt + opening}
    # The content of a turn is a text, or a list of parts.
    last_turn = prompt[-1]
    content = last_turn["content"]
    if isinstance(content, list):
        content = [*content, {"type": "text", "text": opening}]
    else:
        content = content + opening
    return {**row, field: [*prompt[:-1], {**last_turn, "content": content}]}


def tool_metrics(completions: Sequence[TurnCompletion]) -> Mapping[str, float | None]:
    """Returns metrics of calls. The first two have TRL's names and meanings."""
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
