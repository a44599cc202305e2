"""The contract of a reward, which judges the completions of a step."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class EarnedReward(NamedTuple):
    """The reward that an environment gives a completion.

    Attributes:
      value: None for none; infinite where it failed.
      problem: the reason that it failed; else None.
      is_lost: whether the completion ended as its environment was lost: no reward judges it.
    """

    value: float | None
    problem: str | None = None
    is_lost: bool = False


class RewardBatch(NamedTuple):
    """The completions of a step, grouped by prompt.

    Attributes:
      prompts: the prompt of each completion, as its row has it: a text or a chat.
      completions: the texts.
      completion_ids: their tokens.
      columns: the values of the rows' other columns, one for each completion.
      group: the number of completions of a prompt.
      state: where training stands, by TRL's names: global_step, max_steps, epoch.
      chats: the turns of each completion, those of tools included; () for completions of one turn.
      earned: the reward that the environment of each completion gives; () without environments.
    """

    prompts: Sequence[Any]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    group: int
    state: Mapping[str, Any] = {}
    chats: Sequence[Sequence[Mapping[str, Any]]] = ()
    earned: Sequence[EarnedReward] = ()


class RewardValues(NamedTuple):
    """The values that a reward gives to a batch.

    Attributes:
      values: [n], fp32; NaN: no opinion; infinite: it failed.
      failures: the number of completions that have no value because it failed, by kind.
      said: the first message of each kind of failure.
      kinds: the number of completions by what became of them, for rewards that tell.
      metrics: further numbers that it logs, by name, such as one of each prompt.
      extra: further facts about completions, by name: [n] each.
    """

    values: np.ndarray
    failures: Mapping[str, int] = {}
    said: Mapping[str, str] = {}
    kinds: Mapping[str, int] = {}
    metrics: Mapping[str, Sequence[float]] = {}
    extra: Mapping[str, Sequence[Any]] = {}


class Reward(NamedTuple):
    """A reward, which may be computed in this process or in others.

    Attributes:
      judge: judges a batch.
      needs: the columns that it cannot do without.
      close: ends what it started.
    """

    judge: Callable[[RewardBatch], RewardValues]
    needs: Collection[str] = ()
    close: Callable[[], None] = lambda: None


def function_reward(function: Callable[..., float], *needs: str) -> Reward:
    """Returns a reward that calls a function with a completion, its tokens, and some columns."""

    def judge(batch: RewardBatch) -> RewardValues:
        columns = [batch.columns[name] for name in needs]
        rows = zip(batch.completions, batch.completion_ids, *columns, strict=True)
        return RewardValues(np.array([function(*row) for row in rows], np.float32))

    return Reward(judge, needs)


def earned_reward() -> Reward:
    """Returns the reward that environments give; completions without one get no opinion."""

    def judge(batch: RewardBatch) -> RewardValues:
        """Returns the rewards that the completions earned in their environments."""
        earned = batch.earned or [EarnedReward(None)] * len(batch.completions)
        values = [np.nan if reward.value is None else reward.value for reward in earned]
        problems = [reward.problem for reward in earned if reward.problem]
        if not problems:
            return RewardValues(np.array(values, np.float32))
        kind = "environment"
        return RewardValues(
            np.array(values, np.float32),
            failures={kind: len(problems)},
            said={kind: problems[0]},
        )

    return Reward(judge)
