"""The task of training a reward model, which scores completions, on a user's pairs."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.training.data.comparisons import comparisons, texts_of
from lora_jax.training.data.pairs import check_pairs
from lora_jax.training.data.rows import Row
from lora_jax.training.data.turns import shown
from lora_jax.training.held_out import average_sums
from lora_jax.training.losses import COMPARISONS
from lora_jax.training.losses.classes import pair_margins
from lora_jax.training.processes import write_json
from train.console.errors import UserError
from train.console.output import print_figures
from train.data.lines import format_padding_line
from train.options.scripts.classify import DEFAULT_TASK, Config
from train.processes.hosts import map_over_processes
from train.run.output import SCORES
from train.run.pretrained import ModelInfo
from train.run.task import Data, EvaluatedModel, Evaluation, EvaluationContext, Progress, TaskRows
from train.tasks import labelled

BEFORE, LONGER = "before training", "always the longer completion"
_sums = jax.jit(COMPARISONS, static_argnums=0)
_margins = jax.jit(pair_margins, static_argnums=0)


def check(config: Config) -> None:
    """Raises a UserError if no pairs are named, because the default task has no pairs."""
    if config.data.dataset == DEFAULT_TASK:
        raise UserError(
            "--labels pairs needs pairs. Pass a file or a dataset with pairs with --dataset."
        )


def read_rows(config: Config) -> TaskRows:
    """Reads the pairs, and holds a share out so that no prompt is in both parts."""

    def split(rows: list[Row]) -> Sequence[Any]:
        prompts = [texts_of(row, "")[0] for row in rows]
        return labelled.split_by_group(rows, prompts, config.data.test_share)

    return TaskRows(*labelled.read_parts(config.data, check_pairs, split))


def examples(config: Config, rows: TaskRows, outline: ModelInfo) -> Data:
    """Returns the pairs as arrays."""
    data = config.data
    encode = functools.partial(
        comparisons,
        tokenizer=outline.tokenizer,
        seq_len=data.seq_len,
        truncate=data.truncate,
        mapped=map_over_processes,
    )
    train = encode(rows.train, source=data.dataset)
    test = encode(rows.held_out, source=data.test or "the held-out rows")
    n_padded_tokens = 2 * np.array(train.lengths)[train.groups].sum()
    filled_share = train.attention_mask.sum() / n_padded_tokens
    return Data(
        train=train,
        held_out=test,
        measured=labelled.select_spread(test, config.run.eval_rows),
        name=lambda row: shown(rows.train[row]["chosen"]),
        source=data.dataset,
        facts={
            "labels": ("reward",),
            "seq_len": data.seq_len,
            "sequence_length": train.lengths[-1],
            "lengths": train.lengths,
        },
        lines=(
            f"{len(train)} pairs to train on, {len(test)} to test on",
            format_padding_line(len(train), "pairs", train.lengths, filled_share),
        ),
    )


@dataclasses.dataclass
class RewardModelEvaluation:
    """Measures on held-out pairs how often the better completion gets the higher score."""

    context: EvaluationContext
    found: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def before(self, evaluated: EvaluatedModel) -> None:
        """Measures the base with its new head."""
        self.found[BEFORE] = self.score(evaluated)

    def reuse_base_scores(self, other: Evaluation) -> bool:
        """Returns False, because measuring a base takes little time."""
        return False

    def score(
        self, evaluated: EvaluatedModel, progress: Progress | None = None
    ) -> dict[str, float]:
        """Returns the loss, the share of correctly ordered pairs, and their mean margin."""
        test: Any = self.context.data.held_out
        batches = test.parts(self.context.config.optim.batch_size)
        batch_sums = [_sums(evaluated.forward, evaluated.params, batch) for batch in batches]
        totals = jax.tree.map(lambda *values: float(sum(values)), *batch_sums)
        return average_sums(COMPARISONS, totals)

    def after(self, evaluated: EvaluatedModel) -> dict[str, float]:
        """Measures the trained model, and writes and prints the scores."""
        # A baseline that always prefers the longer completion.
        held_out_rows = self.context.rows.held_out
        is_chosen_longer: list[bool] = []
        for row in held_out_rows:
            _, chosen, rejected = texts_of(row, "")
            is_chosen_longer.append(len(chosen) > len(rejected))
        scores = self.score(evaluated)
        self.found[LONGER] = {"accuracy": float(np.mean(is_chosen_longer))}
        self.found[labelled.ADAPTED] = scores
        saved_scores = {**self.found, labelled.RIGHT: self._is_pair_right(evaluated)}
        write_json(self.context.folder / SCORES, saved_scores)
        rows = [
            (judge, f"{100 * measures['accuracy']:.1f}") for judge, measures in self.found.items()
        ]
        title = f"{len(held_out_rows)} held-out pairs"
        print_figures(self.context.console, title, ("by", "right, in %"), rows)
        return scores

    def _is_pair_right(self, evaluated: EvaluatedModel) -> list[bool]:
        """Returns True for each pair whose better completion gets the higher score."""
        test: Any = self.context.data.held_out
        batches = test.parts(self.context.config.optim.batch_size)
        margins = np.concatenate(
            [_margins(evaluated.forward, evaluated.params, batch) for batch in batches]
        )
        is_right = np.empty(len(test), bool)
        is_right[test.by_length] = margins[: len(test)] > 0
        return is_right.tolist()


TASK = dataclasses.replace(
    labelled.TASK,
    check=check,
    rows=read_rows,
    outline=lambda config, rows: labelled.outline_of(config.data, 1),
    examples=examples,
    loss=lambda config, layout: COMPARISONS,
    evaluation=RewardModelEvaluation,
)
