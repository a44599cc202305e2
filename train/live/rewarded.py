"""Rollouts that rewards judge: the batches of `train.grpo`."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core.types import Tree
from lora_jax.training.batches import HostBatch
from lora_jax.training.losses import advantages_of, leave_one_out
from lora_jax.training.ready import Ready
from train.console.output import tell
from train.live.prompts import Drawn, PromptFeed
from train.live.reference import reference_params
from train.live.rollouts import Rollouts
from train.options.scripts.grpo import RLOO
from train.processes import hosts
from train.reporters.contract import Sample
from train.tasks.task import Data, Preparing


def scored(config: Any) -> tuple[str, ...]:
    """Returns the arrays of a number for each token that the loss takes; see `PromptFeed`."""
    compares = config.optim.beta and config.optim.loss != RLOO
    return ("old", *(["reference"] if compares else []))


def prepared(of: Preparing) -> tuple[Ready, Data]:
    """Returns what training begins with, and its data: batches are rollouts that rewards judge."""
    assert isinstance(of.ready.feed, PromptFeed)
    return dataclasses.replace(of.ready, live=Rewarded(of, of.ready.feed)), of.data


class Rewarded(Rollouts):
    """Judges completions by rewards, and compares those of one prompt with one another."""

    def __init__(self, of: Preparing, feed: PromptFeed) -> None:
        """Finds the reference, too.

        Raises:
          UserError: the reference does not fit the base.
        """
        super().__init__(of, feed)
        self._reference = reference_params(of.config, of.outline, of.plain, of.takes_from_base)

    def judged(
        self, params: Tree, rows: np.ndarray, drawn: Drawn, number: int
    ) -> tuple[Drawn, HostBatch, dict[str, float]]:
        """Returns advantages, by rewards of completions, and log-probabilities."""
        optim, group = self.config.optim, self.config.data.group
        rewards, noted = self._rewarded(rows, drawn)  # what is noted is of the first draw
        for attempt in range(self.config.data.redraw):
            (flat,) = np.nonzero(_without_spread(rewards))
            if not len(flat):
                break
            again = self.drawn(params, rows[flat], number, attempt + 1)
            rewards[flat], _ = self._rewarded(rows[flat], again)
            for before, new in zip(drawn, again, strict=True):
                before[flat] = new
        flat_rewards, asked = rewards.ravel(), map(self.feed.prompts.shown, np.repeat(rows, group))
        self.feed.newest = [
            Sample(prompt, text, None if math.isnan(reward) else reward)
            for prompt, text, reward in zip(
                asked, drawn.texts.ravel().tolist(), flat_rewards.tolist(), strict=True
            )
        ]
        batch = self.feed.of_completions(rows, drawn)
        old, entropy = self.scores(params, batch)
        batch["old"] = old
        counted = batch["weights"] > 0
        if self._reference is not None:
            reference, _ = self.scores(self._reference, batch)
            if optim.loss == RLOO:
                apart = np.where(counted, old - reference, 0).sum(-1)
                flat_rewards = flat_rewards - optim.beta * apart.ravel()
            else:
                batch["reference"] = reference
        if optim.loss == RLOO:
            advantages = leave_one_out(jnp.asarray(flat_rewards), group)
        else:
            advantages = advantages_of(jnp.asarray(flat_rewards), group, optim.scale)
        batch["advantages"] = np.asarray(advantages).reshape(counted.shape[:2])
        noted |= {
            "reward": mean_known(rewards),
            "zero_spread": float(_without_spread(rewards).mean()),
            "entropy": float(entropy[counted].mean()) if counted.any() else 0.0,
        }
        return drawn, batch, noted

    def _rewarded(self, rows: np.ndarray, drawn: Drawn) -> tuple[np.ndarray, dict[str, float]]:
        """Returns the rewards of completions, [prompts, group], and metrics."""

        def asked(_: int) -> dict[str, Any]:
            total, noted = self._asked(rows, drawn)
            return {"total": [None if math.isnan(x) else x for x in total], "noted": noted}

        (found,) = hosts.map_over_processes(asked, range(1))  # the first process asks
        total = np.array([np.nan if x is None else x for x in found["total"]], np.float32)
        return total.reshape(-1, drawn.lengths.shape[1]), found["noted"]

    def _asked(self, rows: np.ndarray, drawn: Drawn) -> tuple[list[float], dict[str, float]]:
        """Returns the reward of each completion, NaN for none, and metrics."""
        group, prompts = self.config.data.group, self.feed.prompts
        each, texts = np.repeat(rows, group).tolist(), drawn.texts.ravel().tolist()
        tokens = drawn.tokens.reshape(len(each), -1)
        assert self.feed.rewards is not None
        found = self.feed.rewards(
            [prompts.asked(row) for row in each],
            texts,
            [ids[:n].tolist() for ids, n in zip(tokens, drawn.lengths.ravel(), strict=True)],
            {name: [prompts.rows[row].get(name) for row in each] for name in prompts.columns},
            group=group,
        )
        for line in found.said:
            tell(self.of.console, f"warning: {line}")
        noted: dict[str, float] = {}
        if len(found.by_name) > 1:
            noted = {f"reward_{k}": mean_known(v) for k, v in found.by_name.items()}
        failed = sum(sum(kinds.values()) for kinds in found.failures.values())
        noted["reward_failed"] = failed / len(each)
        for kinds in found.kinds.values():
            noted |= {f"share_{kind}": n / len(each) for kind, n in kinds.items()}
        return found.total.tolist(), noted


def mean_known(values: np.ndarray) -> float:
    """Returns the mean of what is no NaN; 0 where all is."""
    return float(np.nansum(values) / max((~np.isnan(values)).sum(), 1))


def _without_spread(rewards: np.ndarray) -> np.ndarray:
    """Returns which groups, [n, group], have rewards that are all equal, or none: [n] bool."""
    most = np.nanmax(rewards, 1, initial=-np.inf)
    return ~(most > np.nanmin(rewards, 1, initial=np.inf))
