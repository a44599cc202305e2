"""Evaluates a model by the rewards of greedy completions, before and after training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.models.sampling.text import StopTexts
from lora_jax.training.data.rows import name_of
from lora_jax.training.errors import Dropped
from lora_jax.training.layout import Layout
from lora_jax.training.processes import write_json
from train.console.output import print_figures, tell
from train.live.prompts import PromptFeed, TokenizedPrompts
from train.live.turn_groups import ask_of_turns
from train.live.turns.rows import TurnCompletion, TurnRequest
from train.live.turns.use import TurnDrawer, tokenize_with_tools
from train.processes.mesh import make_mesh
from train.reporters.files import read_json
from train.rewards.ask import ask, collect_columns, mean_without_nans
from train.rewards.reward import RewardBatch
from train.run.complete import complete_prompts
from train.run.log import doing
from train.run.output import SCORES
from train.run.task import EvaluatedModel, Evaluation, EvaluationContext, Progress

REWARD = "reward"  # the name of the score
BASE, ADAPTED = "base", "fine-tuned"
# The options on which the reward of a held-out prompt's completion depends.
_REWARD_OPTIONS = (
    "reward",
    "reward_weights",
    "max_new_tokens",
    "stop",
    "tools",
    "environment",
    "max_turns",
    "max_tool_output",
)


@dataclasses.dataclass
class RewardEvaluation:
    """Rewards greedy completions of held-out prompts before and after training."""

    context: EvaluationContext
    feed: PromptFeed

    def __post_init__(self) -> None:
        """Tokenises the held-out prompts, and prepares the sampler of runs with tools."""
        context = self.context
        rows = context.rows.held_out
        tools = self.feed.tools
        schemas = () if tools is None else tools.host.tools
        tokens = tokenize_with_tools(rows, schemas, context.outline, "the held-out rows")
        self.prompts = TokenizedPrompts(rows, tokens)
        self.found: dict[str, Any] = {}  # the content of scores.json
        self._drawer: TurnDrawer | None = None
        if tools is not None:
            self._drawer = TurnDrawer(
                context.config, context.outline, tools, context.stop, temperature=0.0
            )

    def before(self, evaluated: EvaluatedModel) -> None:
        """Rewards the base, unless an interrupted run did so already."""
        self.found = read_json(self.context.folder / SCORES)
        if BASE not in self.found.get(REWARD, {}):
            self._measure(BASE, evaluated)

    def reuse_base_scores(self, other: Evaluation) -> bool:
        """Takes another run's rewards of the base on the same prompts, if there are any."""
        if not isinstance(other, RewardEvaluation) or other.prompts != self.prompts:
            return False
        options = self.context.config.data
        other_options = other.context.config.data
        for name in _REWARD_OPTIONS:
            if getattr(options, name) != getattr(other_options, name):
                return False
        # A failed measurement is repeated.
        if BASE not in other.found.get(REWARD, {}):
            return False
        self.found = {REWARD: {BASE: other.found[REWARD][BASE]}}
        return True

    def score(self, evaluated: EvaluatedModel, progress: Progress) -> dict[str, float]:
        """Returns the mean reward of completions with a reward; {} if there are none."""
        # Greedy completions, in one turn or with calls of tools.
        turns: list[TurnCompletion] | None = None
        if self._drawer is None:
            texts, ids = self._complete(evaluated, progress)
        else:
            turns = self._converse(self._drawer, evaluated)
            texts = [completion.text for completion in turns]
            ids = [completion.ids for completion in turns]
        # Their rewards.
        rows = self.prompts.rows
        column_names = list(dict.fromkeys([*self.feed.prompts.columns, *self.prompts.columns]))
        prompts = [self.prompts.prompt_of(row) for row in range(len(rows))]
        batch = RewardBatch(
            prompts=prompts,
            completions=texts,
            completion_ids=ids,
            columns=collect_columns(rows, column_names),
            group=1,
            state=self.feed.progress(self.feed.done),
        )
        assert self.feed.rewards is not None
        console = self.context.console
        if turns is None:
            rewards = ask(self.feed.rewards, batch, console, self.context.stop)
        else:
            rewards = ask_of_turns(self.feed.rewards, batch, turns, console, self.context.stop)
        self.newest = [
            {
                "prompt": prompt,
                "answer": text,
                "reward": None if np.isnan(reward) else float(reward),
            }
            for prompt, text, reward in zip(prompts, texts, rewards.total, strict=True)
        ]
        mean = mean_without_nans(rewards.total)
        if mean is None:
            reason = f" ({rewards.lost})" if rewards.lost else ""
            tell(console, f"warning: no held-out completion has a reward{reason}")
            return {}
        return {REWARD: mean}

    def _complete(
        self, evaluated: EvaluatedModel, progress: Progress
    ) -> tuple[list[str], list[list[int]]]:
        """Returns the texts and tokens of greedy completions."""
        outline = self.context.outline
        data = self.context.config.data
        drawn_ids = complete_prompts(
            evaluated,
            outline,
            self.prompts.tokens,
            new_tokens=data.max_new_tokens,
            progress=progress,
        )
        stop_texts = StopTexts(outline.tokenizer, data.stop)
        texts: list[str] = []
        ids: list[list[int]] = []
        for completion_ids in drawn_ids:
            text, n_tokens = stop_texts.cut(completion_ids)
            texts.append(text)
            ids.append(completion_ids[:n_tokens])
        return texts, ids

    def _converse(self, drawer: TurnDrawer, evaluated: EvaluatedModel) -> list[TurnCompletion]:
        """Returns greedy completions that may call tools."""
        config = self.context.config
        rows: list[TurnRequest] = []
        for index, row in enumerate(self.prompts.rows):
            name = name_of(row, "the held-out rows", index + 1)
            rows.append(TurnRequest(index, row, name, self.prompts.tokens[index]))
        n_slots = config.optim.batch_size
        mesh = make_mesh(config.run.mesh, n_slots, slice_axis=config.run.slice_axis)
        layout = Layout.of(mesh, self.context.outline.config)
        return drawer.draw(
            (evaluated.model, evaluated.forward, layout),
            evaluated.params,
            rows,
            jax.random.key(0),
            n_slots,
            self.prompts.longest,
        )

    def after(self, evaluated: EvaluatedModel) -> dict[str, float]:
        """Rewards the trained model, and writes and prints the rewards."""
        self._measure(ADAPTED, evaluated)
        rewards = self.found.get(REWARD, {})
        answers_of_model = self.found.get("answers", {})
        reward_row = ["reward"]
        missing_row = ["prompts without a reward"]
        n_missing = 0
        for model in (BASE, ADAPTED):
            mean = rewards.get(model)
            reward_row.append("none" if mean is None else f"{mean:.4f}")
            n_model = sum(answer["reward"] is None for answer in answers_of_model.get(model, ()))
            missing_row.append(str(n_model))
            n_missing += n_model
        rows = [reward_row, missing_row] if n_missing else [reward_row]
        title = f"mean reward of {len(self.prompts.rows)} held-out prompts"
        print_figures(self.context.console, title, ("", BASE, ADAPTED), rows)
        return {REWARD: rewards[ADAPTED]} if ADAPTED in rewards else {}

    def _measure(self, name: str, evaluated: EvaluatedModel) -> None:
        """Rewards a model's completions, and writes the rewards to scores.json under its name."""
        title = f"{name}: completing {len(self.prompts.rows)} held-out prompts"
        # A resumed run may have rewards of an earlier end.
        self.found.get(REWARD, {}).pop(name, None)
        with doing(self.context.console, title) as progress:
            try:
                scores = self.score(evaluated, progress)
            except Dropped:
                raise self.context.stop.interrupted() from None
        if scores:
            self.found.setdefault(REWARD, {})[name] = scores[REWARD]
        self.found.setdefault("answers", {})[name] = self.newest
        write_json(self.context.folder / SCORES, self.found)


def standard_error(scores: Mapping[str, Any]) -> float | None:
    """Returns the standard error of the trained model's mean reward, from a run's scores.json.

    It is computed over the held-out prompts, and is None with fewer than two rewards.
    """
    rewards = [reward for reward in question_scores(scores) if reward is not None]
    if len(rewards) < 2:
        return None
    return float(np.std(rewards, ddof=1) / np.sqrt(len(rewards)))


def question_scores(scores: Mapping[str, Any]) -> list[float | None]:
    """Returns the trained model's reward of each held-out prompt, from a run's scores.json."""
    return [answer["reward"] for answer in scores.get("answers", {}).get(ADAPTED, ())]


def evaluation(context: EvaluationContext) -> RewardEvaluation | None:
    """Returns the evaluation by rewards; None without held-out prompts."""
    assert context.data.feed is not None
    feed = context.data.feed(0)
    assert isinstance(feed, PromptFeed)
    return RewardEvaluation(context, feed) if context.rows.held_out else None
