"""The evaluation by rewards of greedy completions, before and after training."""

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
from train.live.turns.rows import AskedRow, TurnCompletion
from train.live.turns.use import TurnDrawer, tokenize_with_tools
from train.processes.mesh import make_mesh
from train.reporters.files import read_json
from train.rewards.ask import ask, columns_of, mean_known
from train.rewards.reward import RewardBatch
from train.run.complete import complete_prompts
from train.run.log import doing
from train.run.output import SCORES
from train.run.task import EvaluatedModel, Evaluation, EvaluationContext, Progress

REWARD = "reward"  # the name of the score
BASE, ADAPTED = "base", "fine-tuned"
# The options that a reward of a held-out prompt's completion depends on, beside the prompt.
_OF_REWARDS = (
    *("reward", "reward_weights", "max_new_tokens", "stop"),
    *("tools", "environment", "max_turns", "max_tool_output"),
)


@dataclasses.dataclass
class RewardEvaluation:
    """Rewards greedy completions of held-out prompts before and after training."""

    context: EvaluationContext
    feed: PromptFeed

    def __post_init__(self) -> None:
        rows = self.context.rows.held_out
        tools = self.feed.tools
        shown = () if tools is None else tools.host.tools
        tokens = tokenize_with_tools(rows, shown, self.context.outline, "the held-out rows")
        self.prompts = TokenizedPrompts(rows, tokens)
        self.found: dict[str, Any] = {}
        self._drawer: TurnDrawer | None = None
        if tools is not None:
            of = self.context
            self._drawer = TurnDrawer(of.config, of.outline, tools, of.stop, temperature=0.0)

    def before(self, evaluated: EvaluatedModel) -> None:
        """Rewards the base, unless an interrupted run did."""
        self.found = read_json(self.context.folder / SCORES)
        if BASE not in self.found.get(REWARD, {}):
            self._measure(BASE, evaluated)

    def reuse_base_scores(self, other: Evaluation) -> bool:
        """Takes another run's measures of the base on the same prompts."""
        if not isinstance(other, RewardEvaluation) or other.prompts != self.prompts:
            return False
        mine, theirs = self.context.config.data, other.context.config.data
        if any(getattr(mine, name) != getattr(theirs, name) for name in _OF_REWARDS):
            return False
        if BASE not in other.found.get(REWARD, {}):  # what failed is tried again
            return False
        self.found = {REWARD: {BASE: other.found[REWARD][BASE]}}
        return True

    def score(self, evaluated: EvaluatedModel, progress: Progress) -> dict[str, float]:
        """Returns the mean reward of the completions that have one; {} where none has."""
        of = self.prompts
        turns: list[TurnCompletion] | None = None
        if self._drawer is None:
            texts, ids = self._complete(evaluated, progress)
        else:
            turns = self._converse(self._drawer, evaluated)
            texts, ids = [x.text for x in turns], [x.ids for x in turns]
        names = list(dict.fromkeys([*self.feed.prompts.columns, *of.columns]))
        asked = [of.asked(row) for row in range(len(of.rows))]
        state = self.feed.progress(self.feed.done)
        batch = RewardBatch(asked, texts, ids, columns_of(of.rows, names), 1, state)
        assert self.feed.rewards is not None
        said = self.context.console, self.context.stop
        if turns is None:
            scored = ask(self.feed.rewards, batch, *said)
        else:
            scored = ask_of_turns(self.feed.rewards, batch, turns, *said)
        self.newest = [
            {
                "prompt": prompt,
                "answer": text,
                "reward": None if np.isnan(reward) else float(reward),
            }
            for prompt, text, reward in zip(asked, texts, scored.total, strict=True)
        ]
        if (mean := mean_known(scored.total)) is None:
            why = f" ({scored.lost})" if scored.lost else ""
            tell(self.context.console, f"warning: no held-out completion has a reward{why}")
            return {}
        return {REWARD: mean}

    def _complete(
        self, evaluated: EvaluatedModel, progress: Progress
    ) -> tuple[list[str], list[list[int]]]:
        """Returns the texts and tokens of greedy completions."""
        outline, data = self.context.outline, self.context.config.data
        ids = complete_prompts(
            evaluated,
            outline,
            self.prompts.tokens,
            new_tokens=data.max_new_tokens,
            progress=progress,
        )
        cut = [*map(StopTexts(outline.tokenizer, data.stop).cut, ids)]
        ids = [numbers[:n] for numbers, (_, n) in zip(ids, cut, strict=True)]
        return [text for text, _ in cut], ids

    def _converse(self, drawer: TurnDrawer, evaluated: EvaluatedModel) -> list[TurnCompletion]:
        """Returns greedy completions that call tools."""
        config, rows = self.context.config, self.prompts.rows
        asked = [
            AskedRow(at, row, name_of(row, "the held-out rows", at + 1), self.prompts.tokens[at])
            for at, row in enumerate(rows)
        ]
        run, places = config.run, config.optim.batch_size
        mesh = make_mesh(run.mesh, places, slice_axis=run.slice_axis)
        layout = Layout.of(mesh, self.context.outline.config)
        key, longest = jax.random.key(0), self.prompts.longest
        model = evaluated.model, evaluated.forward, layout
        return drawer.draw(model, evaluated.params, asked, key, places, longest)

    def after(self, evaluated: EvaluatedModel) -> dict[str, float]:
        """Rewards the trained model; writes and prints the rewards."""
        self._measure(ADAPTED, evaluated)
        rewards = self.found.get(REWARD, {})
        figures = [rewards.get(way) for way in (BASE, ADAPTED)]
        rows = [("reward", *("none" if x is None else f"{x:.4f}" for x in figures))]
        answers = [self.found.get("answers", {}).get(way, ()) for way in (BASE, ADAPTED)]
        if any(without := [sum(a["reward"] is None for a in each) for each in answers]):
            rows.append(("prompts without one", *map(str, without)))
        title = f"mean reward of {len(self.prompts.rows)} held-out prompts"
        print_figures(self.context.console, title, ("", BASE, ADAPTED), rows)
        return {REWARD: rewards[ADAPTED]} if ADAPTED in rewards else {}

    def _measure(self, way: str, evaluated: EvaluatedModel) -> None:
        n = len(self.prompts.rows)
        self.found.get(REWARD, {}).pop(way, None)  # of an earlier end of a run that went on
        with doing(self.context.console, f"{way}: completing {n} held-out prompts") as progress:
            try:
                scores = self.score(evaluated, progress)
            except Dropped:
                raise self.context.stop.interrupted() from None
        if scores:
            self.found.setdefault(REWARD, {})[way] = scores[REWARD]
        self.found.setdefault("answers", {})[way] = self.newest
        write_json(self.context.folder / SCORES, self.found)


def standard_error(scores: Mapping[str, Any]) -> float | None:
    """Returns the standard error of the trained model's mean reward, from a run's scores.json.

    It is that over the held-out prompts; None with fewer than two rewards.
    """
    known = [reward for reward in question_scores(scores) if reward is not None]
    return float(np.std(known, ddof=1) / np.sqrt(len(known))) if len(known) > 1 else None


def question_scores(scores: Mapping[str, Any]) -> list[float | None]:
    """Returns the trained model's reward of each held-out prompt, from a run's scores.json."""
    return [answer["reward"] for answer in scores.get("answers", {}).get(ADAPTED, ())]


def evaluation(context: EvaluationContext) -> RewardEvaluation | None:
    """Returns the evaluation by rewards; None where no prompt is held out."""
    assert context.data.feed is not None
    feed = context.data.feed(0)
    assert isinstance(feed, PromptFeed)
    return RewardEvaluation(context, feed) if context.rows.held_out else None
