"""Computes rewards in the first process, and shares them with all processes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from lora_jax.training.run.stop import Stop
from train.console.output import tell
from train.processes import hosts
from train.rewards.find import Rewards, RewardTotals
from train.rewards.reward import RewardBatch


class RewardAnswer(NamedTuple):
    """The rewards of completions, which are equal in all processes.

    Attributes:
      total: [n], fp32: the reward of each; NaN for none.
      lost: the first failure, if failures left no completion with a reward; else None.
      metrics: by name; None for one that is not known.
      extra: further facts about the completions, by name: [n] each.
      by_name: the value of each reward without its weight, by name: [n], fp32; NaN for none.
    """

    total: np.ndarray
    lost: str | None
    metrics: dict[str, float | None]
    extra: dict[str, Sequence[Any]]
    by_name: Mapping[str, np.ndarray] = {}


def ask(rewards: Rewards, batch: RewardBatch, console: Console, stop: Stop) -> RewardAnswer:
    """Computes the rewards in the first process. All processes must call this function.

    Args:
      rewards: the rewards.
      batch: the completions.
      console: console to print warnings to.
      stop: tells of a signal.

    Raises:
      Dropped: a signal came to the first process, before or meanwhile; raised in all processes.
    """

    def as_json(totals: RewardTotals) -> dict[str, Any]:
        """Prints warnings, and returns the rewards and their metrics as values for JSON."""
        for line in totals.said:
            tell(console, f"warning: {line}")
        has_reward = ~np.isnan(totals.total)
        return {
            "total": _without_nans(totals.total),
            "lost": None if has_reward.any() else totals.why,
            "metrics": _summarize_rewards(totals),
            "extra": totals.extra,
            "by_name": {name: _without_nans(values) for name, values in totals.by_name.items()},
        }

    answer = hosts.ask_first_process(lambda: rewards(batch), as_json, stop)
    return RewardAnswer(
        total=_with_nans(answer["total"]),
        lost=answer["lost"],
        metrics=answer["metrics"],
        extra=answer["extra"],
        by_name={name: _with_nans(values) for name, values in answer["by_name"].items()},
    )


def _without_nans(values: np.ndarray) -> list[float | None]:
    """Returns values for JSON, with None for NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def _with_nans(values: Sequence[float | None]) -> np.ndarray:
    """Returns values as fp32, with NaN for None; the inverse of `_without_nans`."""
    return np.array([np.nan if value is None else value for value in values], np.float32)


def _summarize_rewards(totals: RewardTotals) -> dict[str, float | None]:
    """Returns the metrics of a batch: mean rewards, failures and kinds of completions."""
    metrics: dict[str, float | None] = {}
    if len(totals.by_name) > 1:
        for name, values in totals.by_name.items():
            metrics[f"reward_{name}"] = mean_without_nans(values)
    metrics["reward_failed"] = float(totals.failed.mean())
    for kinds in totals.kinds.values():
        metrics |= {f"share_{kind}": n / len(totals.total) for kind, n in kinds.items()}
    return metrics | totals.metrics


def collect_columns(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, list[Any]]:
    """Collects the values of each column; None for rows without the column."""
    columns: dict[str, list[Any]] = {}
    for name in names:
        columns[name] = [row.get(name) for row in rows]
    return columns


def mean_without_nans(values: np.ndarray) -> float | None:
    """Returns the mean of the values that are not NaN; None if all are NaN."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None
