"""The default tasks of the scripts: SQL queries for questions, evaluated on unseen databases.

`TASK` fine-tunes on answers, `PAIRS` on a right query and one with a mistake, `REWARDS` on the
results of executed queries, from an adapter that can write SQL, and `DISTILLATION` on the ratings
of another adapter.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lora_jax.buckets.store import bucket_path
from lora_jax.hf.packaged import SMOLLM2
from lora_jax.training.data.rows import Row
from lora_jax.training.processes import write_json
from train.console.errors import UserError
from train.console.output import tell
from train.console.program import program, resume_hint
from train.data import dataset
from train.environments.sql.examples import SqlExample, evaluation_examples, training_examples
from train.options.defaults import Defaults
from train.options.file import replace_options
from train.options.scripts import dpo, grpo, sft
from train.processes import hosts
from train.processes.session import Session
from train.reporters.files import read_json
from train.run.log import doing
from train.run.output import ADAPTER, CONFIG, SCORES
from train.run.pretrained import ModelInfo
from train.run.shared_prompts import OF_SHARING
from train.run.task import (
    Data,
    EvaluatedModel,
    Evaluation,
    EvaluationContext,
    PriorRuns,
    Progress,
    TaskRows,
    check_alone,
    reads_all,
)
from train.settings.defaults import fill_defaults
from train.tasks import chats, distillation, pairs, prompts, sql_scores

STEPS = 35
_N_HELD_OUT_PAIRS = 64  # on unseen schemas, to measure the loss on
_DEFAULT_PROMPTS = 2_000
_MAX_QUESTIONS = 10_000  # of each kind; 12,000 questions contain no question twice
_FIRST_RUN_FOLDER = "sft"  # the folder, in a run's folder, of the run that trains its first adapter


def check(config: sft.LanguageOptions) -> None:
    """Raises a UserError for options about a user's own rows, and for scores without questions."""
    prompts.check_own_rows(config)
    if config.run.score_every and not config.run.eval_questions:
        raise UserError(
            "--score-every needs questions, but --eval-questions is 0. Pass a positive "
            "--eval-questions, or remove --score-every."
        )


def read_rows(config: sft.Config) -> TaskRows:
    """Returns the training examples, and the questions of the evaluation as held-out rows."""
    data, optim = config.data, config.optim
    train_examples = training_examples(
        data.rows or STEPS * optim.batch_size * optim.grad_accum,
        seed=optim.seed,
        shuffle_schemas=data.shuffle_schemas,
    )
    train = dataset.dataset_from_rows(data.dataset[0], _chat_rows(train_examples))
    questions = _questions(config)
    if not questions:
        return TaskRows([train], [])
    question_rows = _chat_rows(questions[sql_scores.UNSEEN_SCHEMAS])
    return TaskRows([train], [dataset.dataset_from_rows("the questions", question_rows)])


def examples(config: sft.Config, rows: TaskRows, outline: ModelInfo) -> Data:
    """Returns the rows as sequences, and checks that few-shot prompts fit into the model."""
    questions = _questions(config)
    if questions:
        outline.check_length(sql_scores.longest_prompt(outline, questions), "--eval-questions")
    return chats.examples(config, rows, outline)


@dataclasses.dataclass
class SqlEvaluation:
    """Evaluates a model by questions, before and after training."""

    context: EvaluationContext
    scores: sql_scores.SqlScores

    def before(self, evaluated: EvaluatedModel) -> None:
        """Asks the base, without and with solved examples, unless an interrupted run did so."""
        path = self.context.folder / SCORES
        if self.scores.reuse_base_scores(read_json(path)):
            return
        self._ask(sql_scores.ZERO_SHOT, evaluated, few_shot=False)
        self._ask(sql_scores.FEW_SHOT, evaluated, few_shot=True)
        write_json(path, self.scores.as_json())

    def reuse_base_scores(self, other: Evaluation) -> bool:
        """Takes the base's answers from another run that asked the same questions."""
        if not isinstance(other, SqlEvaluation):
            return False
        has_same_questions = self.scores.reuse_base_scores(other.scores.as_json())
        if has_same_questions:
            write_json(self.context.folder / SCORES, self.scores.as_json())
        return has_same_questions

    def score(self, evaluated: EvaluatedModel, progress: Progress) -> dict[str, float]:
        """Asks the adapted model, and returns the execution accuracies."""
        questions = self.scores.questions
        answers = sql_scores.answer(evaluated, self.context.outline, questions, progress)
        return _accuracies(sql_scores.SqlScores(questions, {sql_scores.ADAPTED: answers}))

    def after(self, evaluated: EvaluatedModel) -> dict[str, float]:
        """Asks the trained model, writes and prints its answers, and returns the accuracies."""
        self._ask(sql_scores.ADAPTED, evaluated, few_shot=False)
        write_json(self.context.folder / SCORES, self.scores.as_json())
        sql_scores.print_examples(self.context.console, self.scores.examples())
        sql_scores.print_scores(self.context.console, self.scores.accuracies())
        return _accuracies(self.scores)

    def _ask(self, method: str, evaluated: EvaluatedModel, few_shot: bool) -> None:
        """Asks a model all questions, and keeps the answers under the prompting method's name."""
        questions = self.scores.questions
        title = f"{method}: answering {2 * self.scores.n} questions"
        with doing(self.context.console, title) as progress:
            self.scores.answers[method] = sql_scores.answer(
                evaluated, self.context.outline, questions, progress, few_shot=few_shot
            )


def _accuracies(scores: sql_scores.SqlScores) -> dict[str, float]:
    """Returns the execution accuracies of the trained model."""
    accuracies = {
        kind: accuracy_of_method[sql_scores.ADAPTED]
        for kind, accuracy_of_method in scores.accuracies().items()
    }
    return {
        "accuracy": sum(accuracies.values()) / len(accuracies),
        "unseen_schemas": accuracies[sql_scores.UNSEEN_SCHEMAS],
        "unseen_phrasings": accuracies[sql_scores.UNSEEN_BOTH],
    }


def evaluation(context: EvaluationContext) -> SqlEvaluation | None:
    """Returns the evaluation by questions; None if --eval-questions is 0."""
    questions = _questions(context.config)
    return SqlEvaluation(context, sql_scores.SqlScores(questions)) if questions else None


def _questions(config: sft.Config) -> sql_scores.Questions | None:
    """Returns the questions of the evaluation; None if --eval-questions is 0."""
    n_questions = config.run.eval_questions
    return _draw_questions_once(n_questions) if n_questions else None


_draw_questions_once = functools.cache(sql_scores.draw_questions)


def _chat_rows(examples: list[SqlExample]) -> list[Row]:
    """Returns examples as rows with `messages`."""
    return [{"messages": example.messages} for example in examples]


def baselines(scores: Mapping[str, Any]) -> dict[str, float]:
    """Returns the base's mean accuracies over both kinds of questions, from scores.json."""
    accuracies_of_kind = scores.get("accuracy", {}).values()
    means: dict[str, float] = {}
    for method in (sql_scores.ZERO_SHOT, sql_scores.FEW_SHOT):
        values = [accuracies[method] for accuracies in accuracies_of_kind if method in accuracies]
        if values:
            means[method] = sum(values) / len(values)
    return means


def accuracy_error(scores: Mapping[str, Any]) -> float | None:
    """Returns the standard error of the trained model's accuracy, from a run's scores.json.

    It belongs to the mean over both kinds of questions, which have equal numbers. It is None if the
    accuracy is unknown.
    """
    n_questions = scores.get("questions_of_each_kind", 0)
    shares: list[float] = []
    for accuracies in scores.get("accuracy", {}).values():
        if sql_scores.ADAPTED in accuracies:
            shares.append(accuracies[sql_scores.ADAPTED])
    if n_questions < 2 or not shares:
        return None
    variances = [share * (1 - share) / (n_questions - 1) for share in shares]
    return math.sqrt(sum(variances)) / len(shares)


def question_scores(scores: Mapping[str, Any]) -> list[float]:
    """Returns 1 for each question with a right answer of the trained model, else 0."""
    return [float(right) for results in scores.get("right", {}).values() for right in results]


# The evaluation of each SQL task.
_EVALUATION: dict[str, Any] = {
    "evaluation": evaluation,
    "score": "accuracy",
    "baselines": baselines,
    "score_error": accuracy_error,
    "question_scores": question_scores,
}
TASK = dataclasses.replace(
    chats.TASK,
    **_EVALUATION,
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
    reads=reads_all,  # --seed draws the questions, and the batch size sets their number
    most_questions=lambda config, rows: _MAX_QUESTIONS,
)


def read_pairs(config: dpo.Config) -> TaskRows:
    """Returns pairs on the training schemas and, with --eval-every, pairs on unseen schemas."""
    data, optim = config.data, config.optim
    n_examples = data.rows or STEPS * optim.batch_size * optim.grad_accum
    train_rows = _pairs(training_examples(n_examples, seed=optim.seed))
    train = dataset.dataset_from_rows(data.dataset, train_rows)
    if not config.run.eval_every:
        return TaskRows([train], [])
    held_out_rows = _pairs(evaluation_examples(_N_HELD_OUT_PAIRS))
    return TaskRows([train], [dataset.dataset_from_rows("the questions", held_out_rows)])


def _pairs(examples: list[SqlExample]) -> list[Row]:
    """Returns a pair of the answer and a mistake for each example that has mistakes."""
    preferences: list[Row] = []
    for index, example in enumerate(examples):
        *prompt, answer = example.messages
        if example.mistakes:
            mistake = example.mistakes[index % len(example.mistakes)]
            wrong_answer = {**answer, "content": mistake}
            preferences.append({"prompt": prompt, "chosen": [answer], "rejected": [wrong_answer]})
    return preferences


PAIRS = dataclasses.replace(
    pairs.TASK,
    **_EVALUATION,
    defaults=dataclasses.replace(TASK.defaults, lr=2e-4, full_lr=2e-5),
    check=check,
    rows=read_pairs,
    reads=lambda config: ("loss", *OF_SHARING, *TASK.reads(config)),
)


def reward_by_execution(config: grpo.Config) -> grpo.Config:
    """Returns the options with a reward of executed SQL, unless the user passed --reward."""
    return config if config.data.reward else replace_options(config, {"reward": ("sql",)})


def read_prompts(config: grpo.Config) -> TaskRows:
    """Returns questions on the training schemas."""
    examples = training_examples(config.data.rows or _DEFAULT_PROMPTS, seed=config.optim.seed)
    rows = [
        {"prompt": example.messages[:-1], "schema": example.schema, "gold": example.sql}
        for example in examples
    ]
    return TaskRows(rows, [])


def _calls_tools(config: grpo.Config) -> bool:
    """Returns True if completions may call tools."""
    return bool(config.data.tools) or config.data.environment is not None


def prompt_examples(config: grpo.Config, rows: TaskRows, outline: ModelInfo) -> Data:
    """Returns the prompts, with a line for the log if the evaluation shows no tools."""
    data = prompts.examples(config, rows, outline)
    if not _calls_tools(config) or not config.run.eval_questions:
        return data
    line = "the questions of the evaluation are answered in one turn, without tools"
    return dataclasses.replace(data, lines=(*data.lines, line))


def begin_with_sql(config: grpo.Config, session: Session, prior: PriorRuns) -> grpo.Config:
    """Returns the options with an adapter that writes SQL, trained in the run's folder.

    A model that may call tools starts without it, because this adapter answers at once.
    """
    if config.adapter.init_adapter or config.adapter.full or _calls_tools(config):
        return config
    if bucket_path(config.run.output):
        raise UserError(
            f"--output {config.run.output} is in a bucket, but the run first trains an adapter "
            f"that writes SQL in a local folder. Train this adapter with {program('train.sft')}, "
            "and pass its folder with --init-adapter."
        )
    folder = Path(config.run.output).expanduser() / _FIRST_RUN_FOLDER
    if config.run.dry_run:
        tell(
            hosts.console(),
            f"the run starts with an adapter that learns SQL first and is saved in {folder}",
        )
        return config
    if not (folder / ADAPTER).exists():
        check_alone(
            config, f"an adapter that writes SQL (from {program('train.sft')} or --init-adapter)"
        )
        tell(
            hosts.console(),
            f"the run has two parts: 1. `train.sft` trains an adapter to write SQL, in {folder}; "
            f"2. the adapter trains on rewards, in {config.run.output}",
        )
        sft_config = fill_defaults(_sft_options(config, folder), TASK.defaults)
        session.stop.remedy = resume_hint("train.grpo")
        prior.train("train.sft", sft_config, TASK, session)
        jax.clear_caches()  # the programs of the first run take memory
    return replace_options(config, {"init_adapter": str(folder.absolute())})


def _sft_options(config: grpo.Config, folder: Path) -> sft.Config:
    """Returns the options of the run that trains the first adapter.

    Args:
      config: the options of the run that trains on rewards.
      folder: the folder of the first run.
    """
    data = config.data
    optim = config.optim
    run = config.run
    changes = {
        "model": data.model,
        "tokenizer": data.tokenizer,
        "chat_template": data.chat_template,
        "seed": optim.seed,
        "dtype": optim.dtype,
        "quantize": optim.quantize,
        "mesh": run.mesh,
        "compilation_cache": run.compilation_cache,
        "report_to": run.report_to,
        "output": str(folder),
        "eval_questions": 0,
        "resume": (folder / CONFIG).exists(),
    }
    return dataclasses.replace(replace_options(sft.Config(), changes), adapter=config.adapter)


REWARDS = dataclasses.replace(
    prompts.TASK,
    **_EVALUATION,
    defaults=dataclasses.replace(
        TASK.defaults, lr=5e-5, full_lr=5e-6, steps=100, max_new_tokens=sql_scores.NEW_TOKENS
    ),
    check=check,
    completed=reward_by_execution,
    begin=begin_with_sql,
    rows=read_prompts,
    examples=prompt_examples,
    most_questions=TASK.most_questions,
)

DISTILLATION = dataclasses.replace(
    distillation.TASK,
    **_EVALUATION,
    defaults=dataclasses.replace(REWARDS.defaults, lr=1e-4, full_lr=1e-5),
    check=check,
    rows=read_prompts,
)
