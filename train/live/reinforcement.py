"""Rollouts that rewards judge: the batches of `train.grpo`."""

import dataclasses
import math

import jax
import numpy as np

import lora_jax as lj
from lora_jax.core.types import Tree
from lora_jax.training.data.batches import HostBatch
from lora_jax.training.losses import advantages_of, leave_one_out
from lora_jax.training.ready import TrainingStart
from train.live.external.check import SamplerCheck
from train.live.external.sampler import ExternalSampler
from train.live.prompts import GroupedCompletions
from train.live.reference import reference_params
from train.live.rollouts import Rollouts
from train.live.turn_groups import GroupedTurns, ask_of_turns, shown_texts
from train.live.turns.rows import tool_metrics
from train.live.turns.use import TurnDrawer
from train.options.scripts.grpo import RLOO, Config
from train.options.scripts.sampler import importance_of
from train.reporters.contract import Sample
from train.rewards.ask import RewardAnswer, ask, columns_of, mean_known
from train.rewards.reward import RewardBatch
from train.run.task import Data, ModelContext


def arrays_per_token(config: Config) -> tuple[str, ...]:
    """Returns the arrays of a number for each token that the loss takes; see `PromptFeed`."""
    compares = config.optim.beta and config.optim.loss != RLOO
    weighs = importance_of(config) is not None
    return ("old", *(["reference"] if compares else []), *(["importance"] if weighs else []))


def prepare(of: ModelContext) -> tuple[TrainingStart, Data]:
    """Returns the start of training, with rewards that judge its rollouts, and its data."""
    return dataclasses.replace(of.ready, live=RewardedRollouts(of)), of.data


class RewardedRollouts(Rollouts):
    """Judges completions by rewards, and compares those of one prompt with one another."""

    def __init__(self, of: ModelContext) -> None:
        """Finds the reference, too.

        Raises:
          UserError: the reference does not fit the base.
        """
        super().__init__(of)
        feed = self.feed
        self._turns = None
        if feed.tools is not None:
            drawer = TurnDrawer(
                *(of.config, of.outline, feed.tools, of.stop),
                of.config.data.sampling_temperature,
                with_routing=feed.routing is not None,
            )
            self._turns = GroupedTurns(drawer, (self.model, self.apply, of.layout), feed)
        self._reference = reference_params(of.config, of.outline, of.plain, of.takes_from_base)
        self._external = None
        if feed.server is not None:
            self._external = ExternalSampler(self.of, feed, self.key)
            feed.closing = self._external.close
            self._check = SamplerCheck(
                self.of, feed, self._external, lambda *args: self.log_probabilities(*args)[0]
            )
            self._check.rehearse(lj.join(of.ready.state.adapter, of.ready.base))

    def draw(
        self, params: Tree, rows: np.ndarray, number: int, attempt: int = 0
    ) -> GroupedCompletions:
        """Draws completions: by a server, of several turns where they may call tools, or itself."""
        if self._external is not None:
            return self._external.draw(params, rows, number, attempt)
        if self._turns is None:
            return super().draw(params, rows, number, attempt)
        return self._turns.draw(params, rows, self.key(number, attempt))

    def score(
        self, params: Tree, rows: np.ndarray, drawn: GroupedCompletions, number: int
    ) -> tuple[GroupedCompletions, HostBatch, dict[str, float | None]]:
        """Returns advantages, by rewards of completions, and log-probabilities.

        Where rewards have failed, and no completion has one, the advantages are NaN: the step is
        skipped.
        """
        optim, group = self.config.optim, self.config.data.group
        rewards, extra, lost, metrics = self._reward(params, rows, drawn, number)
        flat_rewards, asked = rewards.ravel(), map(self.feed.prompts.shown, np.repeat(rows, group))
        self.feed.newest = [
            Sample(prompt, text, None if math.isnan(reward) else reward, facts)
            for prompt, text, reward, facts in zip(
                asked,
                shown_texts(drawn, self.of.outline.tokenizer),
                flat_rewards.tolist(),
                extra.ravel().tolist(),
                strict=True,
            )
        ]
        batch = self.feed.batch_from_completions(rows, drawn)
        old, entropy = self.log_probabilities(params, batch)
        batch["old"] = old
        counted = batch["weights"] > 0
        if self._reference is not None:
            reference, _ = self.log_probabilities(self._reference, batch, replays=False)
            if optim.loss == RLOO:
                divergence = np.where(counted, old - reference, 0).sum(-1)
                flat_rewards = flat_rewards - optim.beta * divergence.ravel()
                total = float(divergence.sum())
                metrics["kl"] = total / int(counted.sum()) if counted.any() else None
            else:
                batch["reference"] = reference
        if optim.loss == RLOO:
            advantages = leave_one_out(jax.device_put(flat_rewards), group)
        else:
            advantages = advantages_of(jax.device_put(flat_rewards), group, optim.scale)
        batch["advantages"] = np.asarray(advantages).reshape(counted.shape[:-1])
        lost = lost and f"no completion has a reward ({lost})"
        if self._external is not None:
            known, apart = self._check.weigh(batch, drawn, self.of.ready.base, number)
            metrics, lost = metrics | known, lost or apart
        if lost:
            batch["advantages"] = np.full_like(batch["advantages"], np.nan)
        self.feed.lost = lost
        metrics |= {
            "reward": mean_known(rewards),
            "zero_spread": float(_have_no_spread(rewards).mean()),
            "entropy": float(entropy[counted].mean()) if counted.any() else None,
        }
        if drawn.turns is not None:
            metrics |= tool_metrics(drawn.turns.ravel())
        return drawn, batch, metrics

    def _reward(
        self, params: Tree, rows: np.ndarray, drawn: GroupedCompletions, number: int
    ) -> tuple[np.ndarray, np.ndarray, str | None, dict[str, float | None]]:
        """Asks the rewards, and draws groups again in which all completions have the same one.

        Args:
          drawn: the completions, which those that are drawn again replace.

        Returns:
          The rewards and further facts, [prompts, group]; what failed if no completion has a
          reward, else None; and the metrics of the first draw.
        """
        group = self.config.data.group
        first = self._ask(rows, drawn, number)
        rewards, lost = first.total.reshape(-1, group), first.lost
        extra = _facts_per_completion(first, group)
        for attempt in range(self.config.data.redraw):
            (flat,) = np.nonzero(_have_no_spread(rewards))
            if not len(flat):
                break
            again = self.draw(params, rows[flat], number, attempt + 1)
            answer = self._ask(rows[flat], again, number)
            rewards[flat] = answer.total.reshape(-1, group)
            extra[flat] = _facts_per_completion(answer, group)
            lost = lost and answer.lost
            for before, new in zip(drawn, again, strict=True):
                if before is not None:
                    before[flat] = new
        return rewards, extra, lost, first.metrics

    def _ask(self, rows: np.ndarray, drawn: GroupedCompletions, number: int) -> RewardAnswer:
        """Returns the rewards of completions, [prompts * group], and metrics."""
        group, prompts = self.config.data.group, self.feed.prompts
        each = np.repeat(rows, group).tolist()
        tokens, lengths = drawn.tokens.reshape(len(each), -1), drawn.lengths.ravel()
        assert self.feed.rewards is not None
        batch = RewardBatch(
            [prompts.asked(row) for row in each],
            drawn.texts.ravel().tolist(),
            [ids[:n].tolist() for ids, n in zip(tokens, lengths, strict=True)],
            columns_of([prompts.rows[row] for row in each], prompts.columns),
            group,
            self.feed.progress(number),
        )
        if drawn.turns is None:
            return ask(self.feed.rewards, batch, self.of.console, self.of.stop)
        turns = drawn.turns.ravel().tolist()
        return ask_of_turns(self.feed.rewards, batch, turns, self.of.console, self.of.stop)


def _facts_per_completion(answer: RewardAnswer, group: int) -> np.ndarray:
    """Returns further facts about each completion, [prompts, group]; None for none."""
    facts = np.full(len(answer.total), None, object)
    for at in range(len(facts)) if answer.extra else ():
        facts[at] = {name: values[at] for name, values in answer.extra.items()}
    return facts.reshape(-1, group)


def _have_no_spread(rewards: np.ndarray) -> np.ndarray:
    """Returns True for groups, [n, group], whose rewards are all equal or unknown: [n] bool."""
    most = np.nanmax(rewards, 1, initial=-np.inf)
    return ~(most > np.nanmin(rewards, 1, initial=np.inf))
