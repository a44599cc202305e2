"""Completions of several turns in groups, one a prompt, and their rewards."""

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
from train.live.turns.rows import AskedRow, TurnCompletion
from train.live.turns.use import TurnDrawer
from train.rewards.ask import RewardAnswer, ask
from train.rewards.find import Rewards
from train.rewards.reward import RewardBatch

_SEEDS = 2**32 - 1  # no completion's number
_TOLD = 3  # rows that were lost, and are told of one by one


class GroupedTurns:
    """Draws completions of several turns of a run's prompts."""

    def __init__(self, drawer: TurnDrawer, model: Any, feed: PromptFeed) -> None:
        """Takes the drawer, its `model` (see `TurnDrawer.draw`), and the prompts."""
        self._drawer, self._model, self._feed = drawer, model, feed

    def draw(self, params: Tree, rows: np.ndarray, key: jax.Array) -> GroupedCompletions:
        """Draws the completions of prompts, [n], each with a number that tells its key."""
        config, prompts = self._feed.config, self._feed.prompts
        group = config.data.group
        # Environments of one prompt have the same random numbers: their completions are compared.
        seeds = jax.random.bits(jax.random.fold_in(key, _SEEDS), (len(rows),)).tolist()
        asked = [
            AskedRow(
                number,
                prompts.rows[row],
                name_of(prompts.rows[row], config.data.dataset, row + 1),
                prompts.tokens[row],
                seeds[number // group] % 2**31,
            )
            for number, row in enumerate(np.repeat(rows, group).tolist())
        ]
        places = config.optim.batch_size
        longest = self._feed.widths.prompt(prompts.longest_of(rows))
        made = self._drawer.draw(self._model, params, asked, key, places, longest)
        drawn = grouped(made, group, config.data.max_new_tokens)
        if self._feed.routing is None:
            return drawn
        # As wide in all draws of a run, so that those that are drawn again take others' places.
        routing = routing_of(
            made, self._feed.widths.prompts[-1], config.data.max_new_tokens - 1, self._feed.routing
        )
        return drawn._replace(routing=routing.reshape(-1, group, *routing.shape[1:]))


def routing_of(
    completions: Sequence[TurnCompletion], before: int, new: int, chosen: tuple[int, int]
) -> np.ndarray:
    """Returns the experts of completions' tokens, [n, before + new, layers, k] int16.

    Args:
      completions: the completions; one that did not begin has -1 alone.
      before: the slots of a prompt, which ends in the last of them.
      new: the slots of a completion, whose last token did not run.
      chosen: layers with experts, and experts of a token.
    """
    routing = np.full((len(completions), before + new, *chosen), -1, np.int16)
    for row, made in zip(routing, completions, strict=True):
        if made.routing is not None:
            first, n = before - len(made.prompt), len(made.prompt) + min(len(made.ids), new)
            row[first : first + n] = made.routing[:n]
    return routing


def grouped(completions: Sequence[TurnCompletion], group: int, width: int) -> GroupedCompletions:
    """Returns completions as arrays that hold `width` tokens of each."""
    tokens = np.zeros((len(completions), width), np.int32)
    logps = np.zeros((len(completions), width), np.float32)
    turns = np.empty(len(completions), object)
    for at, made in enumerate(completions):
        n = len(made.ids)
        tokens[at, :n], logps[at, :n], turns[at] = made.ids, made.logps, made
    lengths = np.array([len(made.ids) for made in completions])
    ended = np.array([made.ended for made in completions])
    texts = np.array([made.text for made in completions], object)
    arrays = (tokens, logps, lengths, ended, texts, turns)
    return GroupedCompletions(*(x.reshape(-1, group, *x.shape[1:]) for x in arrays))


def shown_texts(drawn: GroupedCompletions, tokenizer: Any) -> list[str]:
    """Returns completions in words: of several turns, all that was said, tools included."""
    if drawn.turns is None:
        return drawn.texts.ravel().tolist()
    return [tokenizer.decode(turns.ids, skip_special_tokens=True) for turns in drawn.turns.ravel()]


def ask_of_turns(
    rewards: Rewards,
    batch: RewardBatch,
    turns: Sequence[TurnCompletion],
    console: Console,
    stop: Stop,
) -> RewardAnswer:
    """Returns the rewards of completions of several turns; those that were lost have none.

    Where all were lost that would have one, nothing can be learned, and the answer says so.

    Args:
      rewards: the rewards.
      batch: the completions, without their turns.
      turns: the completions with their turns.
      console: console to name the rows on that were lost.
      stop: tells of a signal.
    """
    batch = batch._replace(
        chats=[made.messages for made in turns],
        earned=[made.earned._replace(is_lost=made.lost is not None) for made in turns],
    )
    answer = ask(rewards, batch, console, stop)
    lost = [made.lost for made in turns if made.lost is not None]
    for reason in lost[:_TOLD]:
        tell(console, f"warning: a completion was lost: {reason}")
    if len(lost) > _TOLD:
        tell(console, f"warning: {len(lost) - _TOLD} more completions were lost")
    if lost and np.isnan(answer.total).all():
        return answer._replace(lost=answer.lost or lost[0])
    return answer
