"""The records of drawn completions, which a run writes to samples.jsonl."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.live.prompts import GroupedCompletions, PromptFeed
from train.live.turn_groups import shown_texts
from train.live.turns.rows import TurnCompletion
from train.reporters.contract import Sample


def make_samples(
    feed: PromptFeed, rows: np.ndarray, drawn: GroupedCompletions, weights: np.ndarray
) -> list[Sample]:
    """Returns the texts of completions with all facts except those about rewards.

    Args:
      feed: the prompts of the run.
      rows: [n], the prompts.
      drawn: the completions of the prompts.
      weights: [..., tokens], the weights of the completions' tokens in the loss.
    """
    tokenizer = feed.outline.tokenizer
    group = feed.config.data.group
    texts = shown_texts(drawn, tokenizer)
    ended = drawn.ended.ravel().tolist()
    weights_of_completions = weights.reshape(len(texts), -1)
    completions: list[TurnCompletion | None] = [None] * len(texts)
    if drawn.turns is not None:
        completions = drawn.turns.ravel().tolist()
    samples = []
    for index, row in enumerate(np.repeat(rows, group).tolist()):
        completion = completions[index]
        place = index % group
        lost: str | None = None
        turns: Sequence[Mapping[str, str]] = [{"role": "assistant", "text": texts[index]}]
        if completion is not None:
            lost = completion.lost
            turns = turns_of(completion, tokenizer)
        sample = Sample(
            prompt=feed.prompts.prompt_text(row),
            answer=texts[index],
            row=feed.row_name(row),
            group=index // group,
            place=place,
            context=feed.prompts.context_of(row) if place == 0 else None,
            turns=turns,
            cut=lost is None and not ended[index],
            lost=lost,
            masked=not weights_of_completions[index].any(),
        )
        samples.append(sample)
    return samples


def add_rewards(
    samples: Sequence[Sample],
    *,
    rewards: np.ndarray,
    rewards_by_name: Mapping[str, np.ndarray],
    advantages: np.ndarray,
    redrawn: np.ndarray,
    facts: np.ndarray,
) -> list[Sample]:
    """Returns samples with the facts about rewards, each of which is [n].

    Args:
      samples: the samples.
      rewards: the sums of rewards; NaN for none.
      rewards_by_name: the values of each reward, by its name; NaN for none.
      advantages: the advantages. They are only known for completions with a reward.
      redrawn: whether each completion was drawn again.
      facts: further facts about each completion, by name; None for none.
    """
    samples_with_rewards = []
    for index, sample in enumerate(samples):
        values = {name: _known(array[index]) for name, array in rewards_by_name.items()}
        reward = _known(rewards[index])
        sample_with_rewards = sample._replace(
            reward=reward,
            rewards={name: value for name, value in values.items() if value is not None},
            advantage=None if reward is None else _known(advantages[index]),
            redrawn=bool(redrawn[index]),
            extra=facts[index],
        )
        samples_with_rewards.append(sample_with_rewards)
    return samples_with_rewards


def turns_of(completion: TurnCompletion, tokenizer: Any) -> list[dict[str, str]]:
    """Returns the turns of a completion; see `Sample`.

    The text of the model's turns is all that the model drew, with its calls of tools.
    """
    turns = []
    if completion.opening:
        turns.append({"role": "environment", "text": completion.opening})
    starts = iter(completion.turn_starts)
    for message in completion.messages:
        if message["role"] != "assistant":
            turns.append({"role": "tool", "name": message["name"], "text": message["content"]})
            continue
        start = next(starts, None)
        if start is None:  # the completion was lost before its first turn
            continue
        is_environments = [not is_own for is_own in completion.is_own[start:]]
        n_tokens = is_environments.index(True) if any(is_environments) else len(is_environments)
        ids = completion.ids[start : start + n_tokens]
        turns.append({"role": "assistant", "text": tokenizer.decode(ids, skip_special_tokens=True)})
    return turns


def _known(value: np.ndarray) -> float | None:
    """Returns a number; None for NaN."""
    return None if np.isnan(value) else float(value)
