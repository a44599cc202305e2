"""Evaluates the SQL task by running the model's queries on databases that training never saw."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.console.output import print_figures
from train.environments.sql import examples as sql
from train.run.complete import Chat, answer_prompts, tokenize_chats
from train.run.pretrained import ModelInfo
from train.run.task import EvaluatedModel, Progress

ZERO_SHOT, FEW_SHOT, ADAPTED = "base, zero-shot", "base, 4 examples", "fine-tuned"
UNSEEN_SCHEMAS, UNSEEN_BOTH = "unseen schemas", "unseen schemas, unseen phrasings"
N_SHOTS = 4
NEW_TOKENS = 80  # the longest gold query has about fifty tokens
Questions = dict[str, list[sql.SqlExample]]
Answers = dict[str, list[str]]  # by kind of question, in the order of the questions


def draw_questions(n: int) -> Questions:
    """Returns `n` questions of each kind, which are the same for all runs."""
    return {
        UNSEEN_SCHEMAS: sql.evaluation_examples(n),
        UNSEEN_BOTH: sql.evaluation_examples(n, unseen_phrasings=True),
    }


def longest_prompt(outline: ModelInfo, questions: Questions) -> int:
    """Returns the maximum number of tokens of a few-shot prompt with its answer."""
    prompts = tokenize_chats(outline, _chats(questions, few_shot=True))
    return max(map(len, prompts)) + NEW_TOKENS


def answer(
    evaluated: EvaluatedModel,
    outline: ModelInfo,
    questions: Questions,
    progress: Progress,
    *,
    few_shot: bool = False,
) -> Answers:
    """Returns the model's greedily decoded answers, by kind of question.

    Args:
      evaluated: a decoder.
      outline: the model's outline, with its tokenizer.
      questions: the questions, by kind.
      progress: is called with the number of answers so far, and of all.
      few_shot: whether solved examples come first.
    """
    prompts = tokenize_chats(outline, _chats(questions, few_shot))
    texts = answer_prompts(evaluated, outline, prompts, new_tokens=NEW_TOKENS, progress=progress)
    # The answers of each kind follow one another.
    answers: Answers = {}
    start = 0
    for kind, examples in questions.items():
        end = start + len(examples)
        answers[kind] = texts[start:end]
        start = end
    return answers


def _chats(questions: Questions, few_shot: bool) -> list[Chat]:
    """Returns a chat for each question, kind by kind, with or without solved examples."""
    shots = sql.training_examples(N_SHOTS) if few_shot else []
    chats: list[Chat] = []
    for examples in questions.values():
        chats += [sql.few_shot_messages(example, shots) for example in examples]
    return chats


@dataclasses.dataclass
class SqlScores:
    """The answers of each prompting method, and their accuracies."""

    questions: Questions
    answers: dict[str, Answers] = dataclasses.field(default_factory=dict)

    @property
    def n(self) -> int:
        """The number of questions of each kind."""
        return len(self.questions[UNSEEN_SCHEMAS])

    def accuracies(self) -> dict[str, dict[str, float]]:
        """Computes the execution accuracy, by kind of question and prompting method."""
        accuracies: dict[str, dict[str, float]] = {}
        for kind, examples in self.questions.items():
            accuracies[kind] = {}
            for method in self.answers:
                n_right = sum(self.results(method, kind))
                accuracies[kind][method] = n_right / len(examples)
        return accuracies

    def results(self, method: str, kind: str) -> list[bool]:
        """Returns True for each right answer of a method to a kind of questions; [] for none."""
        answers = self.answers.get(method, {}).get(kind, ())
        return [*map(sql.score, self.questions[kind], answers)]

    def as_json(self) -> dict[str, Any]:
        """Returns the accuracies, and each question with its gold query and all answers."""
        return {
            "questions_of_each_kind": self.n,
            "accuracy": self.accuracies(),
            "right": {kind: self.results(ADAPTED, kind) for kind in self.questions},
            "answers": {kind: self._question_rows(kind) for kind in self.questions},
        }

    def _question_rows(self, kind: str) -> list[dict[str, str]]:
        """Returns each question of a kind with its gold query, and the answers by method."""
        rows: list[dict[str, str]] = []
        for index, example in enumerate(self.questions[kind]):
            row = {
                "schema": example.schema,
                "form": example.form,
                "question": example.question,
                "gold": example.sql,
            }
            for method, answers in self.answers.items():
                row[method] = answers[kind][index]
            rows.append(row)
        return rows

    def reuse_base_scores(self, saved: Mapping[str, Any]) -> bool:
        """Takes the base's answers from the scores of an interrupted run.

        Returns:
          False if that run had no answers or other questions. Then nothing is taken.
        """
        try:
            rows_of_kind = {kind: saved["answers"][kind] for kind in self.questions}
            for kind, examples in self.questions.items():
                saved_questions = [row["question"] for row in rows_of_kind[kind]]
                if saved_questions != [example.question for example in examples]:
                    return False
            for method in (ZERO_SHOT, FEW_SHOT):
                self.answers[method] = {}
                for kind, rows in rows_of_kind.items():
                    self.answers[method][kind] = [row[method] for row in rows]
        except KeyError:
            self.answers.clear()
            return False
        return True

    def examples(self, n: int = 6) -> list[dict[str, str]]:
        """Returns some questions with the answers before and after training, marked ✓ or ✗."""
        rows: list[dict[str, str]] = []
        for kind, examples in self.questions.items():
            for index, example in enumerate(examples[: n // 2]):
                row = {"question": example.question, "gold": example.sql}
                for column, method in (("before", ZERO_SHOT), ("after", ADAPTED)):
                    text = self.answers[method][kind][index]
                    mark = "✓" if sql.score(example, text) else "✗"
                    row[column] = f"{mark} {_shorten(text)}"
                rows.append(row)
        return rows


def _shorten(text: str) -> str:
    """Returns at most 160 characters of a text."""
    return text if len(text) <= 160 else f"{text[:159]}…"


def print_scores(console: Console, scores: Mapping[str, Mapping[str, float | None]]) -> None:
    """Prints a table of accuracies: a row per kind of question, a column per prompting method."""
    methods: list[str] = []
    rows: list[list[str]] = []
    for kind, share_of_method in scores.items():
        methods = methods or list(share_of_method)
        rows.append([kind, *(_format_percent(share_of_method[method]) for method in methods)])
    title = "Execution accuracy: answers that return the right rows, in %"
    print_figures(console, title, ("questions", *methods), rows)


def _format_percent(share: float | None) -> str:
    """Returns a share as text in percent; a dash for None."""
    return "–" if share is None else f"{100 * share:.1f}"


def print_examples(console: Console, examples: Sequence[Mapping[str, str]]) -> None:
    """Prints a table with a column per key of the examples; all have the same keys."""
    if not examples:
        return
    table = Table(title="Examples", show_lines=True)
    for name in examples[0]:
        table.add_column(name, overflow="fold", ratio=1)
    for example in examples:
        table.add_row(*map(Text, example.values()))
    console.print(table)
