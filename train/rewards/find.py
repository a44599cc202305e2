"""Finds the rewards that --reward names, which may be a reward model, and sums their values."""

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.training.data.comparisons import as_text, encode
from lora_jax.training.data.rows import question
from train.adapters.source import find_adapter
from train.console.errors import UserError, as_user_errors, flag
from train.environments import arithmetic
from train.environments.sql.judge import MATCHED, MISMATCH, judge
from train.predict.batches import probabilities
from train.predict.classifier import Classifier
from train.predict.texts import TokenizedTexts
from train.rewards.functions import Workers
from train.rewards.reward import (
    Reward,
    RewardBatch,
    RewardValues,
    earned_reward,
    function_reward,
)
from train.run.classifiers import read_classifier_info

_SQL_COLUMNS = ("schema", "gold")
_ENVIRONMENTS = "environments"  # of TRL's reward functions
_SCORER_BATCH_SIZE = 32  # completions in memory at once


def sql_reward(runs: float = 0.0) -> Reward:
    """Returns a reward: 1 for the gold query's rows, `runs` for other rows, 0 for failed SQL."""
    values = {MATCHED: 1.0, MISMATCH: runs}

    def judge_all(batch: RewardBatch) -> RewardValues:
        """Judges each distinct answer once, and returns the rewards of all answers."""
        schemas, gold_queries = (batch.columns[name] for name in _SQL_COLUMNS)
        # Judge each distinct answer once.
        questions = list(zip(schemas, gold_queries, batch.completions, strict=True))
        distinct = list(dict.fromkeys(questions))
        with as_user_errors(ValueError, prefix="--reward sql: "):
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                distinct_kinds = list(threads.map(lambda question: judge(*question), distinct))
        kind_of_question = dict(zip(distinct, distinct_kinds, strict=True))
        kinds = [kind_of_question[question] for question in questions]
        rewards = np.array([values.get(kind, 0.0) for kind in kinds], np.float32)
        return RewardValues(rewards, kinds=dict(Counter(kinds)))

    return Reward(judge_all, _SQL_COLUMNS)


class RewardTotals(NamedTuple):
    """The summed rewards of completions.

    Attributes:
      total: [n], fp32: the weighted sum of the rewards that have an opinion; NaN if none has, or if
        one failed.
      by_name: [n] each, fp32, without weights; NaN: no opinion, or none because it failed.
      failed: [n] bool: whether a reward of the completion failed.
      failures: the number of completions that have no value because a reward failed, by its name
        and by kind.
      said: a sentence on each kind of failure that did not occur before.
      why: the first failure, in words; None for none.
      kinds: the number of completions by what became of them, of rewards that tell, by name.
      metrics: the means of further numbers that rewards log, as "name/number".
      extra: further facts about completions, as "name/fact": [n] each.
    """

    total: np.ndarray
    by_name: dict[str, np.ndarray]
    failed: np.ndarray
    failures: dict[str, dict[str, int]]
    said: list[str]
    why: str | None
    kinds: dict[str, dict[str, int]]
    metrics: dict[str, float]
    extra: dict[str, Sequence[Any]]


class Rewards:
    """Several rewards with their weights; `close` ends their processes.

    Attributes:
      names: the rewards' names.
      needs: the columns that each cannot do without, by its name.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Sequence[float]) -> None:
        """Stores the rewards and their weights."""
        self._rewards = rewards
        self._weights = np.array(weights, np.float32)
        self.names = [*rewards]
        self.needs = {name: reward.needs for name, reward in rewards.items()}
        self._reported: set[tuple[str, str]] = set()  # (reward, kind of failure)
        self._was_silent = False

    def close(self) -> None:
        """Ends the rewards' processes."""
        for reward in self._rewards.values():
            reward.close()

    def __call__(self, batch: RewardBatch) -> RewardTotals:
        """Returns the summed rewards of completions."""
        answers = {name: reward.judge(batch) for name, reward in self._rewards.items()}
        # NaN: the reward has no opinion. Infinite: the reward failed.
        values = np.stack([answer.values for answer in answers.values()])  # [rewards, n]
        if batch.earned:
            values[:, [reward.is_lost for reward in batch.earned]] = np.nan
        has_failed = np.isinf(values)
        values = np.where(has_failed, np.float32(np.nan), values)
        has_opinion = ~np.isnan(values)
        is_rewarded = has_opinion.any(0) & ~has_failed.any(0)
        total = np.where(has_opinion, values, 0).T @ self._weights
        n_completions = len(total)
        remarks = self._warn_if_no_opinion(
            bool(has_opinion.any() or has_failed.any()), n_completions
        )
        first_failure: str | None = None
        metrics: dict[str, float] = {}
        extra: dict[str, Sequence[Any]] = {}
        for name, answer in answers.items():
            remarks += self._describe_new_failures(name, answer, n_completions)
            for text in answer.said.values():
                first_failure = first_failure or f"{name}: {text}"
            metrics |= {f"{name}/{metric}": mean(x) for metric, x in answer.metrics.items()}
            extra |= {f"{name}/{fact}": x for fact, x in answer.extra.items()}
        return RewardTotals(
            total=np.where(is_rewarded, total, np.float32(np.nan)),
            by_name=dict(zip(answers, values, strict=True)),
            failed=has_failed.any(0),
            failures={name: dict(a.failures) for name, a in answers.items() if a.failures},
            said=remarks,
            why=first_failure,
            kinds={name: dict(a.kinds) for name, a in answers.items() if a.kinds},
            metrics=metrics,
            extra=extra,
        )

    def _warn_if_no_opinion(self, has_any: bool, n: int) -> list[str]:
        """Returns a warning when no completion has a reward for the first time."""
        if has_any or self._was_silent:
            return []
        self._was_silent = True
        return [
            f"No reward returned a number for any of {n} completions, so nothing is learned from "
            "them. "
            "Check the reward functions."
        ]

    def _describe_new_failures(self, name: str, answer: RewardValues, n: int) -> list[str]:
        """Returns a warning for each kind of failure that occurs for the first time."""
        new_kinds = [kind for kind in answer.failures if (name, kind) not in self._reported]
        self._reported.update((name, kind) for kind in new_kinds)
        return [
            f"{name}: It returned no reward for {answer.failures[kind]} of {n} completions "
            f"({kind}): "
            f"{answer.said[kind]}"
            for kind in new_kinds
        ]


# The rewards of ours by name, from the most tokens of a completion.
OURS: dict[str, Callable[[int], Reward]] = {
    "arithmetic": lambda most: function_reward(arithmetic.reward, "answer"),
    "sql": lambda most: sql_reward(),
    "sql-dense": lambda most: sql_reward(runs=0.1),
    "length": lambda most: function_reward(lambda text, ids: len(ids) / most),
}


def find_rewards(
    specs: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    columns: Sequence[str],
    max_tokens: int,
    seconds: float = 30.0,
    workers: int | None = None,
    earned: str | None = None,
) -> Rewards:
    """Finds the rewards, and starts a process that imports a user's functions.

    Args:
      specs: ``file.py:function``, folders of reward models, or names of ours.
      weights: a weight for each; None for 1.
      columns: the columns of the rows, beside the prompt.
      max_tokens: the most tokens of a completion.
      seconds: how long a user's function may take for the completions of one prompt.
      workers: the number of processes for a user's functions; None for one a core.
      earned: the name of the environment that has a reward of its own, which weighs 1; None for
        none.

    Raises:
      UserError: a reward cannot be found or imported, needs a column that the rows do not have, or
        has no weight or two.
    """
    weights = [1.0] * len(specs) if weights is None else [*weights]
    if len(weights) != len(specs) or not all(map(math.isfinite, weights)):
        raise UserError(
            f"{flag('reward_weights', *weights)}: {len(specs)} rewards need {len(specs)} finite "
            "weights. "
            "Pass one weight for each reward."
        )
    repeated_specs = [spec for spec, n_times in Counter(specs).items() if n_times > 1]
    if repeated_specs:
        raise UserError(
            f"--reward {repeated_specs[0]} is named twice. Name it once, and set its weight with "
            "--reward-weights."
        )
    reward_of_spec = {name: make(max_tokens) for name, make in OURS.items()}
    # Each spec names one of our rewards, the folder of a reward model, or a function in a file.
    others = [spec for spec in specs if spec not in OURS]
    models = [spec for spec in others if Path(spec).expanduser().is_dir()]
    functions = [spec for spec in others if spec not in models]
    for spec in functions:
        _check_function_spec(spec)
    for spec in models:
        reward_of_spec[spec] = Reward(RewardModel(spec))
    if functions:
        pool = Workers(functions, seconds, workers or os.cpu_count() or 1)
        for i, (spec, needs) in enumerate(zip(functions, pool.needs, strict=True)):
            reward_of_spec[spec] = Reward(partial(pool.judge, i), needs, pool.close)
    # The weights follow the order of the options; an environment's own reward weighs 1.
    by_name = {_short_name(spec, specs): reward_of_spec[spec] for spec in specs}
    if earned is not None:
        name = f"environment {earned}" if earned in by_name else earned
        by_name[name] = earned_reward()
        weights.append(1.0)
    rewards = Rewards(by_name, weights)
    for spec in specs:
        missing = [name for name in reward_of_spec[spec].needs if name not in columns]
        if not missing:
            continue
        rewards.close()
        if _ENVIRONMENTS in missing:
            raise UserError(
                f"--reward {spec} cannot take `{_ENVIRONMENTS}`, because environments run in other "
                "processes. Give the environment a method `get_reward` instead."
            )
        raise UserError(
            f"--reward {spec} needs the column {missing[0]!r}, but the rows have "
            f"{', '.join(columns) or 'only a prompt'}. Add the column to the data set, or rename "
            "one with --fields."
        )
    return rewards


def _check_function_spec(spec: str) -> None:
    """Raises a UserError unless a value of --reward names a function of an existing file."""
    path, _, function = spec.rpartition(":")
    if not path.endswith(".py") or not function:
        raise UserError(
            f"--reward {spec} is neither a folder nor a known reward. Use {', '.join(OURS)}, your "
            "own "
            "function as file.py:function, or the folder of a reward model's run."
        )
    if not Path(path).is_file():
        raise UserError(f"--reward {spec}: The file {path} does not exist. Check the path.")


def _short_name(spec: str, specs: Sequence[str]) -> str:
    """Returns the last part of a reward's path, or the whole path if two rewards share it."""
    names = [Path(other.rpartition(":")[2]).name for other in specs]
    name = Path(spec.rpartition(":")[2]).name
    return name if names.count(name) == 1 else spec


class RewardModel:
    """Rewards a completion by a reward model's score, in this process."""

    def __init__(self, folder: str) -> None:
        """Reads the reward model in a run's folder, over the base that the run names.

        Raises:
          UserError: there is none, or its base cannot be read.
        """
        source = find_adapter(folder, "--reward")
        if source.num_labels != 1:
            raise UserError(
                f"{source.option} holds no reward model. Name the folder of a run of "
                "`train.classify --labels pairs`."
            )
        tokenizer = source.find_tokenizer("copy it there, or train the reward model again")
        with as_user_errors(UserError, prefix=f"{source.option}: Its base cannot be read. "):
            base = source.base_info.get("model", "")
            outline = read_classifier_info(base, 1, tokenizer=tokenizer)
        outline = outline.quantized(source.quantize)
        source.check(outline)
        self._apply, self._params = Classifier(outline, source, ()).load()
        self._folder = source.option
        self._tokenizer = outline.tokenizer
        self._max_tokens: int = source.base_info.get("seq_len", outline.max_tokens)
        self._has_warned = False

    def __call__(self, batch: RewardBatch) -> RewardValues:
        """Returns the scores of the completions; warns once if texts are too long."""
        prompts = [as_text(question({"prompt": text}, "a row").messages) for text in batch.prompts]
        texts = list(zip(prompts, batch.completions, strict=True))
        encoded, n_shortened = encode(texts, self._tokenizer, self._max_tokens)
        if n_shortened and not self._has_warned:
            self._has_warned = True
            print(
                f"{self._folder} reads at most {self._max_tokens} tokens. The beginnings of "
                f"{n_shortened} of {len(texts)} prompts are cut off. Later long prompts are cut "
                "off, too.",
                file=sys.stderr,
            )
        rows_of_ids, rows_of_types = encoded.values()
        ids = [np.array(row, np.int32) for row in rows_of_ids]
        types = [np.array(row, np.int32) for row in rows_of_types]
        tokens = TokenizedTexts(
            ids=ids, types=types, most=self._max_tokens, pad=self._tokenizer.pad_token_id or 0
        )
        scores = probabilities(
            self._apply, self._params, tokens, batch_size=_SCORER_BATCH_SIZE, of=jax.nn.identity
        )
        return RewardValues(scores[:, 0])
