"""Rollouts with rewards: the batches of `train.grpo`."""

import dataclasses
from typing import NamedTuple

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
from train.live.records import add_rewards, make_samples
from train.live.reference import reference_params
from train.live.rollouts import Rollouts
from train.live.turn_groups import GroupedTurns, ask_of_turns
from train.live.turns.rows import tool_metrics
from train.live.turns.use import TurnDrawer
from train.options.scripts.grpo import RLOO, Config
from train.options.scripts.sampler import importance_of
from train.rewards.ask import RewardAnswer, ask, collect_columns, mean_without_nans
from train.rewards.reward import RewardBatch
from train.run.task import Data, ModelContext


def arrays_per_token(config: Config) -> tuple[str, ...]:
    """Returns the names of the loss's arrays with a number per token; see `PromptFeed`."""
    names = ["old"]
    if config.optim.beta and config.optim.loss != RLOO:
        names.append("reference")
    if importance_of(config) is not None:
        names.append("importance")
    return tuple(names)


def prepare(context: ModelContext) -> tuple[TrainingStart, Data]:
    """Returns the start of training with rewarded rollouts, and its data."""
    return dataclasses.replace(context.ready, live=RewardedRollouts(context)), context.data


class RewardedRollouts(Rollouts):
    """Rewards completions, and compares the completions of each prompt with each other."""

    def __init__(self, context: ModelContext) -> None:
        """Prepares the sampler and the reference.

        Raises:
          UserError: the reference does not fit the base, or the server has another adapter.
        """
        super().__init__(context)
        feed = self.feed
        self._turns = None
        if feed.tools is not None:
            drawer = TurnDrawer(
                context.config,
                context.outline,
                feed.tools,
                context.stop,
                context.config.data.sampling_temperature,
                with_routing=feed.routing is not None,
            )
            self._turns = GroupedTurns(drawer, (self.model, self.apply, context.layout), feed)
        self._reference = reference_params(
            context.config, context.outline, context.plain, context.takes_from_base
        )
        # A server draws the completions, after a check that it uses this adapter.
        self._external = None
        if feed.server is not None:
            self._external = ExternalSampler(self.context, feed, self.key)
            feed.closing = self._external.close
            self._check = SamplerCheck(self.context, feed, self._external, self._token_logps)
            self._check.rehearse(lj.join(context.ready.state.adapter, context.ready.base))

    def _token_logps(self, params: Tree, batch: HostBatch) -> np.ndarray:
        """Returns the log-probabilities of completions by an adapted tree."""
        logps, _ = self.log_probabilities(params, batch)
        return logps

    def draw(
        self, params: Tree, rows: np.ndarray, number: int, attempt: int = 0
    ) -> GroupedCompletions:
        """Draws completions with a server, in several turns if there are tools, or by itself."""
        if self._external is not None:
            return self._external.draw(params, rows, number, attempt)
        if self._turns is None:
            return super().draw(params, rows, number, attempt)
        return self._turns.draw(params, rows, self.key(number, attempt))

    def score(
        self, params: Tree, rows: np.ndarray, drawn: GroupedCompletions, number: int
    ) -> tuple[GroupedCompletions, HostBatch, dict[str, float | None]]:
        """Returns the batch with advantages from rewards, and with log-probabilities.

        If no completion has a reward, the advantages are NaN, so that the step is skipped.
        """
        rewarded = self._reward_groups(params, rows, drawn, number)
        rewards = rewarded.rewards
        lost = rewarded.lost
        metrics = rewarded.metrics
        batch = self.feed.batch_from_completions(rows, drawn)
        # Log-probabilities of the policy and of the reference.
        old_logps, entropy = self.log_probabilities(params, batch)
        batch["old"] = old_logps
        has_loss = batch["weights"] > 0
        divergence = None
        if self._reference is not None:
            reference_logps, _ = self.log_probabilities(self._reference, batch, replays=False)
            # rloo subtracts the divergence from the reward.
            if self.config.optim.loss == RLOO:
                divergence = np.where(has_loss, old_logps - reference_logps, 0).sum(-1)
                metrics["kl"] = None
                if has_loss.any():
                    metrics["kl"] = float(divergence.sum()) / int(has_loss.sum())
            else:
                batch["reference"] = reference_logps
        advantages = self._advantages(rewards, divergence)
        batch["advantages"] = advantages.reshape(has_loss.shape[:-1])
        self.feed.new_samples = add_rewards(
            make_samples(self.feed, rows, drawn, batch["weights"]),
            rewards=rewards.ravel(),
            rewards_by_name={
                name: values.ravel() for name, values in rewarded.rewards_by_name.items()
            },
            advantages=advantages,
            redrawn=np.repeat(rewarded.redrawn, self.config.data.group),
            facts=rewarded.facts.ravel(),
        )

        # The reason why nothing can be learned from the batch, if there is one.
        if lost is not None:
            lost = f"no completion has a reward ({lost})"
        if self._external is not None:
            sampler_metrics, sampler_problem = self._check.weigh(
                batch, drawn, self.context.ready.base, number
            )
            metrics |= sampler_metrics
            lost = lost or sampler_problem
        if lost is not None:
            batch["advantages"] = np.full_like(batch["advantages"], np.nan)
        self.feed.lost = lost
        metrics |= {
            "reward": mean_without_nans(rewards),
            "zero_spread": float(_have_no_spread(rewards).mean()),
            "entropy": float(entropy[has_loss].mean()) if has_loss.any() else None,
        }
        if drawn.turns is not None:
            metrics |= tool_metrics(drawn.turns.ravel())
        return drawn, batch, metrics

    def _advantages(self, rewards: np.ndarray, divergence: np.ndarray | None) -> np.ndarray:
        """Returns the advantage of each completion over the other completions of its prompt.

        Args:
          rewards: [prompts, group].
          divergence: the sum of log p minus the reference's log p over each completion, which is
            subtracted from the rewards; None for rewards without it.
        """
        optim = self.config.optim
        group = self.config.data.group
        completion_rewards = rewards.ravel()
        if divergence is not None:
            completion_rewards = completion_rewards - optim.beta * divergence.ravel()
        if optim.loss == RLOO:
            return np.asarray(leave_one_out(jax.device_put(completion_rewards), group))
        return np.asarray(advantages_of(jax.device_put(completion_rewards), group, optim.scale))

    def _reward_groups(
        self, params: Tree, rows: np.ndarray, drawn: GroupedCompletions, number: int
    ) -> "RewardedGroups":
        """Computes the rewards, and draws groups with equal rewards again (--redraw).

        Args:
          params: the adapted tree.
          rows: [n], the prompts.
          drawn: the completions, in which redrawn groups are replaced.
          number: the number of the step.
        """
        group = self.config.data.group
        rewarded = _rewarded_groups(self._ask_rewards(rows, drawn, number), group)
        for attempt in range(self.config.data.redraw):
            (group_indices,) = np.nonzero(_have_no_spread(rewarded.rewards))
            if not len(group_indices):
                break
            redrawn = self.draw(params, rows[group_indices], number, attempt + 1)
            answer = self._ask_rewards(rows[group_indices], redrawn, number)
            rewarded = rewarded.replace(group_indices, _rewarded_groups(answer, group))
            for array, redrawn_array in zip(drawn, redrawn, strict=True):
                if array is not None:
                    array[group_indices] = redrawn_array
        return rewarded

    def _ask_rewards(
        self, rows: np.ndarray, drawn: GroupedCompletions, number: int
    ) -> RewardAnswer:
        """Returns the rewards of completions, [prompts * group], and metrics."""
        group = self.config.data.group
        prompts = self.feed.prompts
        completion_rows = np.repeat(rows, group).tolist()
        tokens = drawn.tokens.reshape(len(completion_rows), -1)
        rewards = self.feed.rewards
        assert rewards is not None
        batch = RewardBatch(
            prompts=[prompts.prompt_of(row) for row in completion_rows],
            completions=drawn.texts.ravel().tolist(),
            completion_ids=[
                ids[:length].tolist()
                for ids, length in zip(tokens, drawn.lengths.ravel(), strict=True)
            ],
            columns=collect_columns(
                [prompts.rows[row] for row in completion_rows], prompts.columns
            ),
            group=group,
            state=self.feed.progress(number),
        )
        if drawn.turns is None:
            return ask(rewards, batch, self.context.console, self.context.stop)
        turns = drawn.turns.ravel().tolist()
        return ask_of_turns(rewards, batch, turns, self.context.console, self.context.stop)


class RewardedGroups(NamedTuple):
    """The rewards of completions in groups, one group per prompt.

    Attributes:
      rewards: [prompts, group], the sums of rewards; NaN for none.
      rewards_by_name: [prompts, group], the values of each reward, by its name; NaN for none.
      facts: [prompts, group], further facts about each completion.
      redrawn: [prompts] bool, whether the completions of each prompt were drawn again.
      lost: the reason if no completion has a reward; else None.
      metrics: the metrics of the first draw.
    """

    rewards: np.ndarray
    rewards_by_name: dict[str, np.ndarray]
    facts: np.ndarray
    redrawn: np.ndarray
    lost: str | None
    metrics: dict[str, float | None]

    def replace(self, indices: np.ndarray, other: "RewardedGroups") -> "RewardedGroups":
        """Writes the groups of another draw over those at the indices, and returns the result."""
        self.rewards[indices] = other.rewards
        self.facts[indices] = other.facts
        self.redrawn[indices] = True
        for name, values in self.rewards_by_name.items():
            values[indices] = other.rewards_by_name[name]
        if self.lost is None:
            return self
        return self._replace(lost=other.lost)  # the redrawn groups may have rewards


def _rewarded_groups(answer: RewardAnswer, group: int) -> RewardedGroups:
    """Returns the rewards of a draw in groups of `group` completions."""
    rewards = answer.total.reshape(-1, group)
    return RewardedGroups(
        rewards=rewards,
        rewards_by_name={
            name: values.reshape(-1, group) for name, values in answer.by_name.items()
        },
        facts=_facts_per_completion(answer, group),
        redrawn=np.zeros(len(rewards), bool),
        lost=answer.lost,
        metrics=answer.metrics,
    )


def _facts_per_completion(answer: RewardAnswer, group: int) -> np.ndarray:
    """Returns further facts about each completion, [prompts, group]; None for none."""
    facts = np.full(len(answer.total), None, object)
    if answer.extra:
        for index in range(len(facts)):
            facts[index] = {name: values[index] for name, values in answer.extra.items()}
    return facts.reshape(-1, group)


def _have_no_spread(rewards: np.ndarray) -> np.ndarray:
    """Returns True for each group of rewards [n, group] that are all equal or unknown, [n] bool."""
    highest = np.nanmax(rewards, 1, initial=-np.inf)
    lowest = np.nanmin(rewards, 1, initial=np.inf)
    return ~(highest > lowest)
