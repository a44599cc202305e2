"""Finds the classifier of the options: a base with an adapter, or a model with its own head."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lora_jax.core.types import Forward, Tree
from lora_jax.models import EncoderConfig, VisionConfig
from train.adapters.source import AdapterSource, find_adapter, prepare_to_run
from train.console.errors import UserError
from train.run.classifiers import read_classifier_info, read_fields
from train.run.pretrained import ModelInfo, read_model

# The ends of transformers' names of such models.
_CLASSIFIER_SUFFIXES = ("ForSequenceClassification", "ForImageClassification")
_UNSUPPORTED_PROBLEM_TYPES = ("multi_label_classification", "regression")


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A classifier without its weights, which `load` reads.

    Attributes:
      outline: the model's.
      adapter: the adapter; None for a model with its own head.
      labels: the names of the classes, in the order of their indices.
    """

    outline: ModelInfo
    adapter: AdapterSource | None
    labels: tuple[str, ...]

    def load(self, *, allow_base_mismatch: bool = False) -> tuple[Forward, Tree]:
        """Reads the weights.

        Args:
          allow_base_mismatch: accept an adapter of another base.

        Returns:
          A function with the arguments of `Encoder.apply`, and its parameters.

        Raises:
          UserError: the weights cannot be read.
        """
        name = self.outline.name
        model, params = read_model(name, dtype="float32", **self.outline.head)
        if self.adapter is None:
            return prepare_to_run(model, params)
        tree = self.adapter.load(model, params, name, allow_base_mismatch=allow_base_mismatch)
        return prepare_to_run(model, tree)


def find_classifier(
    adapter: str | None,
    model: str | None,
    labels: Sequence[str] = (),
    *,
    tokenizer: str | None = None,
    allow_base_mismatch: bool = False,
) -> Classifier:
    """Returns the classifier of the options, without reading its weights.

    Args:
      adapter: the option --adapter.
      model: the option --model.
      labels: the option --labels.
      tokenizer: the option --tokenizer.
      allow_base_mismatch: accept an adapter of another base.

    Raises:
      UserError: adapter and model do not make a classifier, or its classes have names already.
    """
    if adapter is None and model is None:
        raise UserError(
            "No classifier is named. Pass the folder of a run or an adapter with --adapter, or a "
            "model that has its own head with --model."
        )
    source = find_adapter(adapter) if adapter is not None else None
    name = model if model is not None else (source.base() if source else "")
    num_labels = source.num_labels if source else None
    if num_labels is None:
        _check_own_head(name, source)
    if source is None or source.is_peft:
        _check_problem(name)
    tokenizer = tokenizer or (source.tokenizer if source else None)
    outline = read_classifier_info(name, num_labels, of=None, tokenizer=tokenizer)
    if source:
        outline = outline.quantized(source.quantize)
    config: Any = outline.config
    if config.num_labels < 2:
        raise UserError(
            f"{source.option if source else f'--model {name}'} has one class, so it is a "
            "regression model or a reward model. Pass a classifier here. Pass a reward "
            "model to --reward of train.grpo."
        )
    if source:
        source.check(outline, allow_base_mismatch=allow_base_mismatch)
    elif outline.absent:
        raise UserError(
            f"--model {name}: The files contain no {outline.absent[0]}, so the head is not "
            "trained. Pass the adapter of a classifier with --adapter, or use another "
            "model."
        )
    adapter_labels = tuple(source.base_info.get("labels", ())) if source else ()
    return Classifier(outline, source, _choose_labels(adapter_labels, config, labels))


def _check_own_head(name: str, source: AdapterSource | None) -> None:
    """Raises a UserError if neither the model nor the adapter has a head for classes."""
    architectures = read_fields(name).get("architectures") or ["no architecture"]
    if any(architecture.endswith(_CLASSIFIER_SUFFIXES) for architecture in architectures):
        return
    what = f"--model {name} is not a classifier: its config.json names {', '.join(architectures)}"
    if source is None:
        raise UserError(
            f"{what}. Use a model whose architecture ends in {' or '.join(_CLASSIFIER_SUFFIXES)}. "
            "For a classifier that a run trained, pass --adapter."
        )
    raise UserError(
        f"{source.option} is not the adapter of a classifier, because it has no head, and {what}. "
        "Pass a run of train.classify, or a PEFT adapter of the task type SEQ_CLS."
    )


def _check_problem(name: str) -> None:
    """Raises a UserError if a model was not trained to predict exactly one class per text."""
    problem = read_fields(name).get("problem_type")
    if problem in _UNSUPPORTED_PROBLEM_TYPES:
        raise UserError(
            f"--model {name}: config.json has the problem_type {problem}, but only one class per "
            "text is supported. Use a model of single_label_classification."
        )


def _choose_labels(
    adapter_labels: Sequence[str],
    config: EncoderConfig | VisionConfig,
    option: Sequence[str],
) -> tuple[str, ...]:
    """Returns the class names of the adapter, the model or --labels, or else LABEL_0, LABEL_1, …"""
    known_labels = tuple(adapter_labels) or config.label_names
    if known_labels and option:
        raise UserError(
            "--labels cannot be used, because the classes already have names "
            f"({', '.join(known_labels)}). Remove --labels."
        )
    if option and (len(option) != config.num_labels or len(set(option)) < len(option)):
        raise UserError(
            f"--labels {' '.join(option)}: The classifier has {config.num_labels} classes. Pass "
            f"{config.num_labels} different names, one per class."
        )
    default_labels = tuple(f"LABEL_{i}" for i in range(config.num_labels))
    return known_labels or tuple(option) or default_labels
