"""The task of classifying a user's texts, with a fully trained head on an encoder."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from lora_jax.hf.packaged import MINILM
from lora_jax.training.data import labelled
from lora_jax.training.data.labelled import Fields, Labelled, label_names, predict
from lora_jax.training.data.rows import Row
from lora_jax.training.data.vision.images import Images
from lora_jax.training.losses import CLASSES
from lora_jax.training.processes import is_first, write_json
from train.console.errors import as_user_errors
from train.data.files import is_image_folder, read_rows
from train.data.lines import format_padding_line
from train.options.defaults import Defaults
from train.options.paths import kind_of
from train.options.scripts.classify import HEAD, ClassifyDataConfig, Config
from train.processes.hosts import map_over_processes
from train.run.classifiers import read_classifier_info
from train.run.log import doing
from train.run.output import CONFUSION, SCORES
from train.run.pretrained import ModelInfo
from train.run.rules import peft_fields
from train.run.task import (
    Data,
    EvaluatedModel,
    Evaluation,
    EvaluationContext,
    Progress,
    Task,
    TaskRows,
)
from train.tasks import classes

SEED = 0  # draws the same held-out rows for every run, so that runs are comparable
# Maps (rows to train on, texts) to (the baseline's name, a label for each text).
Baseline = Callable[[Sequence[Row], Sequence[str]], tuple[str, Sequence[str]]]
Part = TypeVar("Part", Labelled, Images)
ADAPTED = "fine-tuned"  # key of the trained model's scores in scores.json, beside the baselines
RIGHT = "right"  # key in scores.json: whether the trained model is right about each held-out row


def completed(config: Config) -> Config:
    """Adds the head to the modules that train in full."""
    adapter = config.adapter
    if adapter.full or adapter.init_adapter or HEAD in adapter.train:
        return config
    if adapter.intrinsic is not None:  # all parameters train
        return config
    if adapter.peft_config:
        saved_modules = peft_fields(adapter.peft_config)["modules_to_save"] or ()
        if HEAD in saved_modules:
            return config
    adapter = dataclasses.replace(adapter, train=(HEAD, *adapter.train))
    return dataclasses.replace(config, adapter=adapter)


def read_labelled(data: ClassifyDataConfig) -> tuple[list[Row], list[Row]]:
    """Returns (rows to train on, rows to test on), each with a text and a label.

    Raises:
      TrainingError: the rows cannot be read, lack a field, or are too few to hold out a share.
    """

    check = functools.partial(labelled.check_rows, fields=fields_of(data))
    return read_parts(data, check, functools.partial(split_by_label, data))


def split_by_label(data: ClassifyDataConfig, rows: list[Row]) -> Sequence[Any]:
    """Splits rows into two parts that have the same share of each label."""
    from sklearn.model_selection import train_test_split  # it takes two seconds

    labels = [str(row[data.label]) for row in rows]
    return train_test_split(rows, test_size=data.test_share, random_state=SEED, stratify=labels)


def split_by_group(rows: Sequence[Row], groups: Sequence[str], share: float) -> list[list[Row]]:
    """Splits rows into two parts without a common group; the second has a share of the groups."""
    from sklearn.model_selection import GroupShuffleSplit  # it takes two seconds

    splitter = GroupShuffleSplit(n_splits=1, test_size=share, random_state=SEED)
    ((train_indices, test_indices),) = splitter.split(rows, groups=groups)
    train = [rows[index] for index in train_indices]
    test = [rows[index] for index in test_indices]
    return [train, test]


def read_parts(
    data: ClassifyDataConfig,
    check: Callable[[list[Row], str], None],
    split: Callable[[list[Row]], Sequence[Any]],
) -> tuple[list[Row], list[Row]]:
    """Returns checked rows to train on and to test on.

    Args:
      data: the options that name the rows.
      check: raises an error for rows from a source that cannot be used.
      split: splits the rows without --test; may raise a ValueError.
    """
    rows = read_rows(data.dataset, split=data.split, subset=data.subset)[: data.rows]
    check(rows, data.dataset)
    if data.test is None:
        problem = f"--test-share {data.test_share:g} of the {len(rows)} rows cannot be held out: "
        with as_user_errors(ValueError, prefix=problem, suffix=" Pass other rows with --test."):
            train, test = split(rows)
        return train, test
    if names_rows(data.test):
        test = read_rows(data.test)
    else:
        test = read_rows(data.dataset, split=data.test, subset=data.subset)
    check(test, data.test)
    return rows, test


def names_rows(test: str) -> bool:
    """Returns True if --test names a file or a folder of images, and not a split."""
    return bool(kind_of(test)) or is_image_folder(test)


def fields_of(data: ClassifyDataConfig) -> Fields:
    """Returns the names of the fields in the options."""
    return Fields(text=data.text, text_pair=data.text_pair, label=data.label)


def encode(
    data: ClassifyDataConfig, rows: Sequence[Row], names: Sequence[str], tokenizer: Any, source: str
) -> Labelled:
    """Returns rows as arrays, of which each process encodes a part; see `training.texts`."""
    return labelled.texts(
        rows,
        tokenizer,
        names=names,
        fields=fields_of(data),
        seq_len=data.seq_len,
        truncate=data.truncate,
        source=source,
        mapped=map_over_processes,
    )


def outline(config: Config, rows: TaskRows) -> ModelInfo:
    """Reads the outline of the encoder, with a head for the classes of the rows."""
    return outline_of(config.data, len(label_names(rows.train, config.data.label)))


def outline_of(data: ClassifyDataConfig, num_labels: int) -> ModelInfo:
    """Reads the outline of the encoder, with a head for `num_labels` classes."""
    assert data.model is not None, "the options have no defaults yet"
    outline = read_classifier_info(data.model, num_labels, tokenizer=data.tokenizer)
    outline.check_length(data.seq_len, f"--seq-len {data.seq_len}")
    return outline


def examples(config: Config, rows: TaskRows, outline: ModelInfo) -> Data:
    """Returns the texts as arrays, with their class indices."""
    data = config.data
    names = label_names(rows.train, data.label)
    train = encode(data, rows.train, names, outline.tokenizer, data.dataset)
    test = encode(data, rows.held_out, names, outline.tokenizer, data.test or "the held-out rows")
    return Data(
        train=train,
        held_out=test,
        measured=select_spread(test, config.run.eval_rows),
        name=lambda row: repr(rows.train[row][data.text]),
        source=data.dataset,
        facts={"labels": names, "sequence_length": train.lengths[-1], "lengths": train.lengths},
        lines=(
            *count_lines(rows, data.label, "texts"),
            format_padding_line(len(train), "texts", train.lengths, train.filled),
        ),
    )


def select_spread(test: Part, n_rows: int | None) -> Part | None:
    """Returns `n_rows` texts or images, spread evenly over the test rows; None for all of them."""
    if n_rows is None or n_rows >= len(test):
        return None
    indices = np.linspace(0, len(test) - 1, n_rows).astype(int)
    arrays: Any = {name: array[indices] for name, array in test.by_name().items()}
    return dataclasses.replace(test, **arrays)


def count_lines(rows: TaskRows, label: str, unit: str) -> Iterator[str]:
    """Yields a line for each part of the rows, with its number of rows and of each label."""
    for purpose, part in (("to train on", rows.train), ("to test on", rows.held_out)):
        yield f"{len(part)} {unit} {purpose}: {_label_counts(part, label)}"


def _label_counts(rows: Sequence[Row], label: str) -> str:
    """Returns the number of rows per label as text, such as "3 negative, 5 positive"."""
    counts = Counter(str(row[label]) for row in rows)
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def label_by_majority(
    rows: Sequence[Row], texts: Sequence[str], label: str
) -> tuple[str, list[str]]:
    """Labels each text with the most frequent label of the rows, as a baseline."""
    counts = Counter(str(row[label]) for row in rows)
    ((commonest_label, _),) = counts.most_common(1)
    return "always the commonest label", [commonest_label] * len(texts)


@dataclasses.dataclass
class ClassifierEvaluation:
    """Evaluates the model, and baselines that need no model, on the held-out texts or images.

    Attributes:
      context: the run.
      baselines: baselines besides the commonest label.
      unit: the noun for the classified things, such as "texts".
      titles: returns the held-out texts, or the names of held-out images.
    """

    context: EvaluationContext
    baselines: Sequence[Baseline] = ()
    unit: str = "texts"
    titles: Callable[[EvaluationContext], list[str]] = lambda context: [
        row[context.config.data.text] for row in context.rows.held_out
    ]

    def before(self, evaluated: EvaluatedModel) -> None:
        """Does nothing, because the head is not trained yet."""

    def reuse_base_scores(self, other: Evaluation) -> bool:
        """Returns False, because the base is not measured."""
        return False

    def score(self, evaluated: EvaluatedModel, progress: Progress) -> dict[str, float]:
        """Classifies the held-out rows, and returns accuracy and macro F1."""
        test: Any = self.context.data.held_out
        batch_rows = 4 * self.context.config.optim.batch_size
        probabilities = predict(evaluated.forward, evaluated.params, test, batch_rows)
        names = self.context.data.facts["labels"]
        scores = classes.scores_of(test.labels, probabilities.argmax(-1), names)
        return {name: scores[name] for name in ("accuracy", "macro_f1")}

    def after(self, evaluated: EvaluatedModel) -> dict[str, float]:
        """Classifies the held-out rows, and writes, prints and returns the scores."""
        context = self.context
        test: Any = context.data.held_out
        names = context.data.facts["labels"]
        batch_rows = 4 * context.config.optim.batch_size
        with doing(context.console, f"classifying {len(test)} {self.unit}"):
            probabilities = predict(evaluated.forward, evaluated.params, test, batch_rows)
        texts = self.titles(context)
        predictions = probabilities.argmax(-1)
        is_right = (predictions == test.labels).tolist()
        scores = classes.scores_of(test.labels, predictions, names, self.unit)
        scores_of_method = self._baseline_scores(test, texts, names)
        scores_of_method[ADAPTED] = scores
        write_json(context.folder / SCORES, {**scores_of_method, RIGHT: is_right})
        if is_first():
            classes.draw_confusion(context.folder / CONFUSION, scores["confusion"], names)
        classes.print_mistakes(context.console, texts, test.labels, probabilities, names, self.unit)
        classes.print_classes(context.console, scores, self.unit)
        title = f"{len(test)} held-out {self.unit}"
        classes.print_scores(context.console, scores_of_method, title)
        return {name: scores[name] for name in ("accuracy", "macro_f1")}

    def _baseline_scores(
        self, test: Any, texts: Sequence[str], names: Sequence[str]
    ) -> dict[str, Any]:
        """Returns the scores of the baselines, by name."""
        rows = self.context.rows.train
        label_field = self.context.config.data.label
        predictions: list[tuple[str, Sequence[str]]] = [label_by_majority(rows, texts, label_field)]
        predictions += [baseline(rows, texts) for baseline in self.baselines]
        index_of_label = {name: index for index, name in enumerate(names)}
        scores: dict[str, Any] = {}
        for baseline_name, labels in predictions:
            indices = np.array([index_of_label[label] for label in labels])
            scores[baseline_name] = classes.scores_of(test.labels, indices, names, self.unit)
        return scores


def baselines(scores: Mapping[str, Any]) -> dict[str, float]:
    """Returns the accuracies of the baselines, from a run's scores.json."""
    names = [name for name in scores if name not in (ADAPTED, RIGHT)]
    return {name: scores[name]["accuracy"] for name in names}


TASK = Task(
    defaults=Defaults(model=MINILM.name, alpha=2.0, lr=1e-3, full_lr=3e-5, epochs=3.0),
    completed=completed,
    rows=lambda config: TaskRows(*read_labelled(config.data)),
    outline=outline,
    examples=examples,
    loss=lambda config, layout: CLASSES,
    evaluation=ClassifierEvaluation,
    score="accuracy",
    baselines=baselines,
    question_scores=lambda scores: [*map(float, scores.get(RIGHT, ()))],
)
