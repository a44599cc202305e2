"""Finds the rewards that --reward names, a reward model among them, and adds up what they say."""

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
    EarnedReward,
    Reward,
    RewardBatch,
    RewardValues,
    earned_reward,
    function_reward,
)
from train.run.classifiers import read_classifier_info

_NEEDS = ("schema", "gold")
_ENVIRONMENTS = "environments"  # of TRL's reward functions
_SCORED_AT_ONCE = 32  # completions in memory at once


def sql_reward(runs: float = 0.0) -> Reward:
    """Returns the reward 1 for SQL with the gold query's rows, `runs` with others, and else 0."""
    values = {MATCHED: 1.0, MISMATCH: runs}

    def judge_all(batch: RewardBatch) -> RewardValues:
        columns = (batch.columns[name] for name in _NEEDS)
        asked = list(zip(*columns, batch.completions, strict=True))
        distinct = list(dict.fromkeys(asked))
        with as_user_errors(ValueError, prefix="--reward sql: "):
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                kinds_found = threads.map(lambda pair: judge(*pair), distinct)
                kind_of = dict(zip(distinct, kinds_found, strict=True))
        kinds = [kind_of[pair] for pair in asked]
        rewards = np.array([values.get(kind, 0.0) for kind in kinds], np.float32)
        return RewardValues(rewards, kinds=dict(Counter(kinds)))

    return Reward(judge_all, _NEEDS)


class RewardTotals(NamedTuple):
    """The rewards of completions.

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
    """Rewards and their weights; a context that ends the processes which they need.

    Attributes:
      names: the rewards' names.
      needs: the columns that each cannot do without, by its name.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Sequence[float]) -> None:
        self._rewards, self._weights = rewards, np.array(weights, np.float32)
        self.names = [*rewards]
        self.needs = {name: reward.needs for name, reward in rewards.items()}
        self._known: set[tuple[str, str]] = set()
        self._was_silent = False

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        for reward in self._rewards.values():
            reward.close()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        *,
        group: int,
        state: Mapping[str, Any] | None = None,
        chats: Sequence[Sequence[Mapping[str, Any]]] = (),
        earned: Sequence[EarnedReward] = (),
    ) -> RewardTotals:
        """Returns the rewards of completions; see `RewardBatch` for what is given."""
        batch = RewardBatch(
            prompts, completions, completion_ids, columns, group, state or {}, chats, earned
        )
        judged = {name: reward.judge(batch) for name, reward in self._rewards.items()}
        values = np.stack([got.values for got in judged.values()])  # [rewards, n]
        if earned:
            values[:, [each.is_lost for each in earned]] = np.nan
        failed = np.isinf(values)
        values = np.where(failed, np.float32(np.nan), values)
        given = ~np.isnan(values)
        total = np.where(given, values, 0).T @ self._weights
        return RewardTotals(
            np.where(given.any(0) & ~failed.any(0), total, np.float32(np.nan)),
            dict(zip(judged, values, strict=True)),
            failed.any(0),
            {name: dict(got.failures) for name, got in judged.items() if got.failures},
            [
                *self._silence(bool(given.any() or failed.any()), len(total)),
                *(x for name, got in judged.items() for x in self._news(name, got, len(total))),
            ],
            next((f"{k}: {text}" for k, got in judged.items() for text in got.said.values()), None),
            {name: dict(got.kinds) for name, got in judged.items() if got.kinds},
            {
                f"{name}/{k}": mean(v)
                for name, got in judged.items()
                for k, v in got.metrics.items()
            },
            {f"{name}/{k}": v for name, got in judged.items() for k, v in got.extra.items()},
        )

    def _silence(self, has_any: bool, n: int) -> list[str]:
        """Returns a sentence where no reward has an opinion, the first time."""
        if has_any or self._was_silent:
            return []
        self._was_silent = True
        return [f"no reward has an opinion on any of {n} completions: nothing is learned from them"]

    def _news(self, name: str, judged: RewardValues, n: int) -> list[str]:
        new = [kind for kind in judged.failures if (name, kind) not in self._known]
        self._known.update((name, kind) for kind in new)
        return [
            f"{name}: no reward for {judged.failures[kind]} of {n} completions ({kind}): "
            f"{judged.said[kind]}"
            for kind in new
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
    """Finds rewards, and starts a process that imports a user's functions.

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
    given = [1.0] * len(specs) if weights is None else weights
    if len(given) != len(specs) or not all(map(math.isfinite, given)):
        raise UserError(
            f"{flag('reward_weights', *given)}: {len(specs)} rewards need as many finite weights"
        )
    if twice := [spec for spec, number in Counter(specs).items() if number > 1]:
        raise UserError(f"--reward {twice[0]} is named twice: give it a weight instead")
    known = {name: make(max_tokens) for name, make in OURS.items()}
    models = [spec for spec in specs if spec not in known and Path(spec).expanduser().is_dir()]
    files = [spec for spec in specs if spec not in (*known, *models)]
    for spec in files:
        path, _, function = spec.rpartition(":")
        if not path.endswith(".py") or not function:
            raise UserError(
                f"--reward {spec}: no folder, and no reward of this name, but {', '.join(known)}; "
                "a function of your own is named as file.py:function, a reward model by its run's "
                "folder"
            )
        if not Path(path).is_file():
            raise UserError(f"--reward {spec}: there is no file {path}")
    known |= {spec: Reward(RewardModel(spec)) for spec in models}
    if files:
        pool = Workers(files, seconds, workers or os.cpu_count() or 1)
        for i, (spec, needs) in enumerate(zip(files, pool.needs, strict=True)):
            known[spec] = Reward(partial(pool.judge, i), needs, pool.close)
    by_name = {_short(spec, specs): known[spec] for spec in specs}
    if earned is not None:
        name = f"environment {earned}" if earned in by_name else earned
        by_name, given = by_name | {name: earned_reward()}, [*given, 1.0]
    rewards = Rewards(by_name, given)
    for spec in specs:
        if missing := [name for name in known[spec].needs if name not in columns]:
            rewards.close()
            if _ENVIRONMENTS in missing:
                raise UserError(
                    f"--reward {spec} takes `{_ENVIRONMENTS}`, which live in other processes: "
                    "reward by a method `get_reward` of the environment instead"
                )
            raise UserError(
                f"--reward {spec} needs the column {missing[0]!r}; the rows have "
                f"{', '.join(columns) or 'none beside the prompt'}"
            )
    return rewards


def _short(spec: str, specs: Sequence[str]) -> str:
    """Returns the name of a function or a folder, or all of it if another one has the same."""
    names = [Path(other.rpartition(":")[2]).name for other in specs]
    name = Path(spec.rpartition(":")[2]).name
    return name if names.count(name) == 1 else spec


class RewardModel:
    """Judges a completion by a model's score of it after its prompt, in this process."""

    def __init__(self, folder: str) -> None:
        """Reads the model that a run left in a folder, over the base that it names.

        Raises:
          UserError: there is none, or its base cannot be read.
        """
        source = find_adapter(folder, "--reward")
        if source.num_labels != 1:
            raise UserError(
                f"{source.given} holds no reward model: name the folder of a run of "
                "`train.classify --labels pairs`"
            )
        tokenizer = source.find_tokenizer("copy it there, or train the reward model again")
        with as_user_errors(UserError, prefix=f"{source.given}: its base cannot be read: "):
            base = source.about.get("model", "")
            outline = read_classifier_info(base, 1, tokenizer=tokenizer)
        outline = outline.quantized(source.quantize)
        source.check(outline)
        self._apply, self._params = Classifier(outline, source, ()).load()
        self._given, self._tokenizer = source.given, outline.tokenizer
        self._most: int = source.about.get("seq_len", outline.max_tokens)
        self._has_said = False

    def __call__(self, batch: RewardBatch) -> RewardValues:
        """Returns the scores; says once that texts are shortened."""
        prompts = [as_text(question({"prompt": text}, "a row").messages) for text in batch.prompts]
        texts = list(zip(prompts, batch.completions, strict=True))
        encoded, n_shortened = encode(texts, self._tokenizer, self._most)
        if n_shortened and not self._has_said:
            self._has_said = True
            print(
                f"{self._given} reads {self._most} tokens: {n_shortened} of {len(texts)} prompts "
                "lose their beginning, and so do later ones",
                file=sys.stderr,
            )
        ids, types = ([np.array(text, np.int32) for text in each] for each in encoded.values())
        tokens = TokenizedTexts(ids, types, self._most, self._tokenizer.pad_token_id or 0)
        scores = probabilities(
            self._apply, self._params, tokens, batch_size=_SCORED_AT_ONCE, of=jax.nn.identity
        )
        return RewardValues(scores[:, 0])
