"""The default task of `train.sft`: translating questions to SQL on unseen databases."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.hf.packaged import SMOLLM2
from lora_jax.training.data.rows import Row
from lora_jax.training.processes import write_json
from train.console.errors import UserError, flag
from train.data import dataset
from train.environments.sql.examples import training_examples
from train.options.defaults import Defaults
from train.options.scripts.sft import Config
from train.reporters.files import read_json
from train.run.log import doing
from train.run.output import SCORES
from train.run.pretrained import ModelInfo
from train.run.task import Data, Evaluation, EvaluationContext, Progress, TaskRows, reads_all
from train.tasks import chats
from train.tasks.sql import evaluate

STEPS = 35


def check(config: Config) -> None:
    """Raises a UserError for options about a user's own rows."""
    for name in ("fields", "eval_dataset"):
        if getattr(config.data, name):
            raise UserError(f"{flag(name)} is about rows of your own: name them with --dataset")
    if config.run.score_every and not config.run.eval_questions:
        raise UserError("--eval-questions 0 leaves --score-every no questions to ask: give more")


def read_rows(config: Config) -> TaskRows:
    """Returns the training examples, and the questions of the evaluation as held-out rows."""
    data, optim = config.data, config.optim
    rows = _as_rows(
        training_examples(
            data.rows or STEPS * optim.batch_size * optim.grad_accum,
            seed=optim.seed,
            shuffle_schemas=data.shuffle_schemas,
        )
    )
    questions = _questions(config)
    measured = [_as_rows(next(iter(questions.values())))] if questions else []
    of_questions = [dataset.dataset_from_rows("the questions", rows) for rows in measured]
    return TaskRows([dataset.dataset_from_rows(data.dataset[0], rows)], of_questions)


def examples(config: Config, rows: TaskRows, outline: ModelInfo) -> Data:
    """Returns the rows as sequences; checks that few-shot prompts and answers fit the model."""
    if questions := _questions(config):
        outline.check_length(evaluate.longest_prompt(outline, questions), "--eval-questions")
    return chats.examples(config, rows, outline)


@dataclasses.dataclass
class SqlEvaluation:
    """Evaluation by questions before and after training."""

    context: EvaluationContext
    scores: evaluate.SqlScores

    def before(self, model: Any, params: Any, forward: Callable[..., Any]) -> None:
        """Asks the base, without and with solved examples, unless an interrupted run did."""
        path, scores = self.context.folder / SCORES, self.scores
        if scores.reuse_base_scores(read_json(path)):
            return
        for way, few_shot in ((evaluate.ZERO_SHOT, False), (evaluate.FEW_SHOT, True)):
            self._ask(way, model, params, forward, few_shot)
        write_json(path, scores.as_json())

    def reuse_base_scores(self, other: Evaluation) -> bool:
        """Takes the base's answers from another run, if it asked the same questions."""
        if not isinstance(other, SqlEvaluation) or not self.scores.reuse_base_scores(
            other.scores.as_json()
        ):
            return False
        write_json(self.context.folder / SCORES, self.scores.as_json())
        return True

    def score(
        self, model: Any, params: Any, forward: Callable[..., Any], progress: Progress
    ) -> dict[str, float]:
        """Asks the adapted model; returns the execution accuracies."""
        scores, outline = evaluate.SqlScores(self.scores.questions), self.context.outline
        answers = evaluate.answer(
            model, params, outline, scores.questions, forward=forward, progress=progress
        )
        scores.answers[evaluate.ADAPTED] = answers
        return _accuracies(scores)

    def after(self, model: Any, params: Any, forward: Callable[..., Any]) -> dict[str, float]:
        """Asks the trained model; writes its answers; prints examples, and returns accuracies."""
        self._ask(evaluate.ADAPTED, model, params, forward, few_shot=False)
        write_json(self.context.folder / SCORES, self.scores.as_json())
        evaluate.print_examples(self.context.console, self.scores.examples())
        evaluate.print_scores(self.context.console, self.scores.accuracies())
        return _accuracies(self.scores)

    def _ask(
        self, way: str, model: Any, params: Any, forward: Callable[..., Any], few_shot: bool
    ) -> None:
        questions, outline = self.scores.questions, self.context.outline
        with doing(
            self.context.console, f"{way}: answering {2 * self.scores.n} questions"
        ) as progress:
            self.scores.answers[way] = evaluate.answer(
                model,
                params,
                outline,
                questions,
                forward=forward,
                few_shot=few_shot,
                progress=progress,
            )


def _accuracies(scores: evaluate.SqlScores) -> dict[str, float]:
    """Returns the execution accuracies of the trained model."""
    of_kind = {kind: ways[evaluate.ADAPTED] for kind, ways in scores.accuracies().items()}
    return {
        "accuracy": sum(of_kind.values()) / len(of_kind),
        "unseen_schemas": of_kind[evaluate.UNSEEN_SCHEMAS],
        "unseen_phrasings": of_kind[evaluate.UNSEEN_BOTH],
    }


def evaluation(context: EvaluationContext) -> SqlEvaluation | None:
    """Returns the evaluation by questions; None if --eval-questions is 0."""
    questions = _questions(context.config)
    return SqlEvaluation(context, evaluate.SqlScores(questions)) if questions else None


def _questions(config: Config) -> evaluate.Questions | None:
    return _drawn(config.run.eval_questions) if config.run.eval_questions else None


_drawn = functools.cache(evaluate.draw_questions)


def _as_rows(made: Any) -> list[Row]:
    return [{"messages": example.messages} for example in made]


def baselines(scores: Mapping[str, Any]) -> dict[str, float]:
    """Returns the base's accuracies, means of both kinds of questions, from a run's scores.json."""
    of_kind = scores.get("accuracy", {}).values()
    base = (evaluate.ZERO_SHOT, evaluate.FEW_SHOT)
    found = {way: [ways[way] for ways in of_kind if way in ways] for way in base}
    return {way: sum(values) / len(values) for way, values in found.items() if values}


TASK = dataclasses.replace(
    chats.TASK,
    defaults=Defaults(
        model=SMOLLM2.name,
        alpha=10.0,
        lr=1e-3,
        full_lr=1e-4,
        beta2=0.99,
        steps=STEPS,
        eval_questions=16,  # the default command ends within five minutes on two cores
    ),
    check=check,
    rows=read_rows,
    examples=examples,
    evaluation=evaluation,
    reads=reads_all,  # the questions are drawn by --seed, as many as 35 steps see
    score="accuracy",
    baselines=baselines,
)
