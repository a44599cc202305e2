"""Draws completions of several turns in groups, one group per prompt, and rewards them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from lora_jax.core.types import Tree
from lora_jax.training.data.rows import name_of
from lora_jax.training.run.stop import Stop
from train.console.output import tell
from train.live.prompts import GroupedCompletions, PromptFeed
from train.live.turns.rows import TurnCompletion, TurnRequest
from train.live.turns.use import TurnDrawer
from train.rewards.ask import RewardAnswer, ask
from train.rewards.find import Rewards
from train.rewards.reward import RewardBatch

_SEED_STREAM = 2**32 - 1  # a random stream that differs from the number of any completion
_MAX_WARNINGS = 3  # lost completions with a warning of their own


class GroupedTurns:
    """Draws completions of several turns for a run's prompts."""

    def __init__(self, drawer: TurnDrawer, model: Any, feed: PromptFeed) -> None:
        """Keeps the drawer, its `model` (see `TurnDrawer.draw`), and the prompts."""
        self._drawer = drawer
        self._model = model
        self._feed = feed

    def draw(self, params: Tree, rows: np.ndarray, key: jax.Array) -> GroupedCompletions:
        """Draws the completions of prompts [n]. The number of a completion determines its key."""
        data = self._feed.config.data
        prompts = self._feed.prompts
        # Environments of one prompt get the same seed, because their completions are compared.
        seeds = jax.random.bits(jax.random.fold_in(key, _SEED_STREAM), (len(rows),)).tolist()
        requests = [
            TurnRequest(
                number=number,
                row=prompts.rows[row],
                name=name_of(prompts.rows[row], data.dataset, row + 1),
                prompt=prompts.tokens[row],
                seed=seeds[number // data.group] % 2**31,
            )
            for number, row in enumerate(np.repeat(rows, data.group).tolist())
        ]
        completions = self._drawer.draw(
            self._model,
            params,
            requests,
            key,
            n_rows=self._feed.config.optim.batch_size,
            max_prompt_tokens=self._feed.widths.prompt(prompts.longest_of(rows)),
        )
        drawn = group_turns(completions, data.group, data.max_new_tokens)
        if self._feed.routing is None:
            return drawn
        # All draws of a run have the same number of slots, so that a redrawn group fits.
        routing = routing_of(
            completions,
            prompt_slots=self._feed.widths.prompts[-1],
            completion_slots=data.max_new_tokens - 1,
            layers_and_experts=self._feed.routing,
        )
        return drawn._replace(routing=routing.reshape(-1, data.group, *routing.shape[1:]))


def routing_of(
    completions: Sequence[TurnCompletion],
    prompt_slots: int,
    completion_slots: int,
    layers_and_experts: tuple[int, int],
) -> np.ndarray:
    """Returns the experts of tokens, [n, prompt_slots + completion_slots, layers, k] int16.

    Args:
      completions: the completions. A completion without a turn gets -1 everywhere.
      prompt_slots: the number of slots of a prompt, which ends in the last of them.
      completion_slots: the number of slots of a completion, whose last token does not run.
      layers_and_experts: the number of layers with experts, and of experts per token.
    """
    n_slots = prompt_slots + completion_slots
    routing = np.full((len(completions), n_slots, *layers_and_experts), -1, np.int16)
    for row, completion in zip(routing, completions, strict=True):
        if completion.routing is None:
            continue
        prompt_tokens = len(completion.prompt)
        n_run = prompt_tokens + min(len(completion.ids), completion_slots)
        start = prompt_slots - prompt_tokens
        row[start : start + n_run] = completion.routing[:n_run]
    return routing


def group_turns(
    completions: Sequence[TurnCompletion], group: int, max_new_tokens: int
) -> GroupedCompletions:
    """Returns completions as arrays with `max_new_tokens` tokens for each completion."""
    tokens = np.zeros((len(completions), max_new_tokens), np.int32)
    logps = np.zeros((len(completions), max_new_tokens), np.float32)
    turns = np.empty(len(completions), object)
    for index, completion in enumerate(completions):
        n_tokens = len(completion.ids)
        tokens[index, :n_tokens] = completion.ids
        logps[index, :n_tokens] = completion.logps
        turns[index] = completion
    lengths = np.array([len(completion.ids) for completion in completions])
    ended = np.array([completion.ended for completion in completions])
    texts = np.array([completion.text for completion in completions], object)
    return GroupedCompletions(
        tokens=tokens.reshape(-1, group, max_new_tokens),
        logps=logps.reshape(-1, group, max_new_tokens),
        lengths=lengths.reshape(-1, group),
        ended=ended.reshape(-1, group),
        texts=texts.reshape(-1, group),
        turns=turns.reshape(-1, group),
    )


def shown_texts(drawn: GroupedCompletions, tokenizer: Any) -> list[str]:
    """Returns the texts of completions. Those of several turns include the answers of tools."""
    if drawn.turns is None:
        return drawn.texts.ravel().tolist()
    completions = drawn.turns.ravel()
    return [tokenizer.decode(turns.ids, skip_special_tokens=True) for turns in completions]


def ask_of_turns(
    rewards: Rewards,
    batch: RewardBatch,
    turns: Sequence[TurnCompletion],
    console: Console,
    stop: Stop,
) -> RewardAnswer:
    """Returns the rewards of completions of several turns, without rewards of lost completions.

    If no completion has a reward because some were lost, the answer contains the reason.

    Args:
      rewards: the rewards.
      batch: the completions, without their turns.
      turns: the completions with their turns.
      console: console to print warnings about lost completions.
      stop: reports a signal.
    """
    chats = []
    earned = []
    loss_reasons = []
    for completion in turns:
        is_lost = completion.lost is not None
        chats.append(completion.messages)
        earned.append(completion.earned._replace(is_lost=is_lost))
        if completion.lost is not None:
            loss_reasons.append(completion.lost)
    answer = ask(rewards, batch._replace(chats=chats, earned=earned), console, stop)
    for reason in loss_reasons[:_MAX_WARNINGS]:
        tell(console, f"warning: a completion was lost: {reason}")
    n_untold = len(loss_reasons) - _MAX_WARNINGS
    if n_untold > 0:
        tell(console, f"warning: {n_untold} more completions were lost")
    has_rewards = not np.isnan(answer.total).all()
    if has_rewards or not loss_reasons:
        return answer
    return answer._replace(lost=answer.lost or loss_reasons[0])
