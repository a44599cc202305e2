"""The arguments of `finetune` as records, and their checks before training starts.

The scripts give their options the names of the arguments, and have numbers and contradictions
checked here, too.
"""

import dataclasses
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

import lora_jax as lj
from lora_jax.core.types import Forward, Model, Tree
from lora_jax.folders import remote_problem
from lora_jax.models import Decoder
from lora_jax.training.data.batches import Arrays, Examples, Packs
from lora_jax.training.data.labelled import Labelled
from lora_jax.training.data.order import Feed, Order
from lora_jax.training.data.vision.images import Images
from lora_jax.training.errors import TrainingError
from lora_jax.training.layout import Layout
from lora_jax.training.losses import CLASSES, COMPARISONS, IMAGES, Loss, Sums, token_loss
from lora_jax.training.optimizer import make_optimizer
from lora_jax.training.optimizers.named import OPTIMIZERS
from lora_jax.training.optimizers.schedules import ScheduleKind, warmed_up
from lora_jax.training.run.best import BEST
from lora_jax.training.run.checkpoints import RECORD

ADAPTER, START, CHECKPOINTS = "adapter", "start", "checkpoints"
_RUN_FILES = (ADAPTER, START, CHECKPOINTS, RECORD, BEST)


class Subject(NamedTuple):
    """A model with its examples, rules, loss and layout."""

    model: Model | Forward
    examples: Examples | Mapping[str, Any]
    rules: Sequence[lj.LoraRule | lj.TrainRule] | None
    loss: Loss | Callable[..., Sums] | None
    layout: Layout


class LengthOptions(NamedTuple):
    """The length of a run, and the batch size of its steps."""

    steps: int | None
    epochs: float | None
    batch_size: int
    grad_accum: int


class RateOptions(NamedTuple):
    """The learning rate over a run, and its optimiser."""

    lr: float | optax.Schedule
    schedule: ScheduleKind
    warmup: int
    weight_decay: float
    optimizer: str | optax.GradientTransformation

    def rates(self, steps: int) -> optax.Schedule:
        """Returns the learning rate of each step."""
        if callable(self.lr):
            return self.lr
        return warmed_up(self.lr, steps, kind=self.schedule, warmup=self.warmup)

    def transformation(self, rates: optax.Schedule, params: Tree) -> optax.GradientTransformation:
        """Returns the optimiser of an adapted tree."""
        if not isinstance(self.optimizer, str):
            return self.optimizer
        return make_optimizer(self.optimizer, rates, params, weight_decay=self.weight_decay)


class FolderOptions(NamedTuple):
    """The folder of a run: its name, how earlier content is treated, and its checkpoints."""

    name: str | Path | None
    resume: bool
    overwrite: bool
    keep: int


class IntervalOptions(NamedTuple):
    """The intervals of logs, measurements and checkpoints, and the limit of skipped steps."""

    log_every: int | None
    eval_every: int | None
    save_every: int | None
    max_skipped: int


class HeldOutOptions(NamedTuple):
    """Held-out examples, and how they choose the best adapter."""

    examples: Examples | Mapping[str, Any] | None
    keep: bool
    patience: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneJob:
    """A run with checked arguments."""

    subject: Subject
    feed: Feed
    loss: Loss
    measured: Examples | None
    steps: int
    rate: RateOptions
    folder: FolderOptions
    intervals: IntervalOptions
    best: HeldOutOptions
    seed: int
    path: Path | None

    def settings(self) -> dict[str, str]:
        """Returns the settings that must not change when a run resumes."""
        optimizer = self.rate.optimizer
        return settings_as_text(
            **self.rate._replace(
                optimizer=optimizer if isinstance(optimizer, str) else "a function"
            )._asdict(),
            rules=self.subject.rules,
            seed=self.seed,
            keep_best=self.best.keep,
        )


def as_examples(examples: Examples | Mapping[str, Any], name: str) -> Examples:
    """Returns examples; checks that a user's own arrays have equal lengths."""
    if isinstance(examples, Mapping):
        arrays = {key: np.asarray(array) for key, array in examples.items()}
        has_scalars = any(array.ndim == 0 for array in arrays.values())
        if has_scalars or len({len(array) for array in arrays.values()}) != 1:
            shapes = ", ".join(f"{key} {array.shape}" for key, array in arrays.items()) or "nothing"
            raise TrainingError(
                f"{name} has {shapes}, but all arrays must have one length, [n, …] each. Pass "
                "arrays with the same first axis."
            )
        examples = Arrays(arrays)
    if not isinstance(examples, Examples):
        raise TrainingError(
            f"{name} is a {type(examples).__name__}, which is no set of examples. Pass "
            "training.chats(rows, tokenizer, …), training.texts(rows, tokenizer, …), or a dict of "
            "arrays."
        )
    if not len(examples):
        raise TrainingError(f"{name} is empty. Pass at least one example.")
    return examples


def matching_examples(
    held_out: Examples | Mapping[str, Any] | None, examples: Examples
) -> Examples | None:
    """Returns held-out examples with the same arrays as the examples, or None."""
    if held_out is None:
        return None
    held_out = as_examples(held_out, "held_out")
    first_row = np.zeros(1, int)
    held_out_names = sorted(held_out.take(first_row))
    names = sorted(examples.take(first_row))
    if held_out_names != names:
        raise TrainingError(
            f"held_out has the arrays {', '.join(held_out_names)}, but examples has "
            f"{', '.join(names)}. Pass held_out with the same arrays."
        )
    return held_out


class NumberRange(NamedTuple):
    """The valid range of an option.

    Attributes:
      hold: tells if a number is in the range.
      needed: what to pass, in words, such as "a positive number".
    """

    hold: Callable[[float], bool]
    needed: str


def numbers_from(least: int) -> NumberRange:
    """Returns the range of numbers not below `least`."""
    return NumberRange(lambda x: x >= least, f"a number of at least {least}")


POSITIVE = NumberRange(lambda x: 0 < x < math.inf, "a positive number")
NOT_NEGATIVE = NumberRange(lambda x: 0 <= x < math.inf, "0 or a positive number")
# JAX takes a larger seed by its last 32 bits.
SEED = NumberRange(lambda x: 0 <= x < 2**32, f"a number from 0 to {2**32 - 1}")
_DECAY_RATE = NumberRange(lambda x: 0 <= x < 1, "a number from 0 to below 1")
_FINITE = "0 or a positive finite number"

# The range of each number, by the names of arguments and options.
NUMBERS = {
    **dict.fromkeys(("steps", "batch_size", "grad_accum", "keep", "patience"), numbers_from(1)),
    **dict.fromkeys(("log_every", "eval_every", "save_every", "max_skipped"), numbers_from(1)),
    "epochs": POSITIVE._replace(needed="a positive number of passes over the data"),
    "lr": POSITIVE._replace(needed="a positive learning rate"),
    "warmup": numbers_from(0),
    "weight_decay": NOT_NEGATIVE._replace(needed=_FINITE),
    "grad_clip": NOT_NEGATIVE._replace(needed=f"{_FINITE} (0 does not clip)"),
    **dict.fromkeys(("lora_plus", "eps"), POSITIVE),
    **dict.fromkeys(("beta1", "beta2", "momentum"), _DECAY_RATE),
    "seed": SEED,
}


def check_numbers(values: Mapping[str, Any], numbers: Mapping[str, NumberRange] = NUMBERS) -> None:
    """Raises a TrainingError for a number outside the range of its option.

    Args:
      values: the options by name; None for one that is not given.
      numbers: the range of each option; options without a range are not checked.
    """
    for name, number_range in numbers.items():
        value = values.get(name)
        if value is not None and not number_range.hold(value):
            raise _out_of_range(name, value, number_range)


def _out_of_range(name: str, value: Any, number_range: NumberRange) -> TrainingError:
    return TrainingError(
        lambda option: f"{option(name, value)} is out of range. Pass {number_range.needed}."
    )


def check_options_agree(values: Mapping[str, Any]) -> None:
    """Raises a TrainingError for options that exclude or require each other.

    Args:
      values: `steps`, `epochs`, `resume`, `overwrite`, `keep_best` and `patience`, among others.
    """
    if values["steps"] is not None and values["epochs"] is not None:
        raise TrainingError(
            lambda option: (
                f"{option('steps')} and {option('epochs')} both set the length of the run. Remove "
                "one of them."
            )
        )
    if values["resume"] and values["overwrite"]:
        raise TrainingError(
            lambda option: (
                f"{option('resume')} continues a run, but {option('overwrite')} deletes it. Remove "
                "one of them."
            )
        )
    if values["patience"] is not None and not values["keep_best"]:
        raise TrainingError(
            lambda option: (
                f"{option('patience', values['patience'])} ends a run that no longer improves, so "
                f"it needs the best adapter of the run. Add {option('keep_best', True)}."
            )
        )


def check_best(keep_best: bool, *, held_out: bool, folder: bool) -> None:
    """Raises a TrainingError if the best adapter cannot be measured or saved."""
    if keep_best and not held_out:
        raise TrainingError(
            "keep_best=True compares adapters by their loss on held-out examples. Pass held_out."
        )
    if keep_best and not folder:
        raise TrainingError(
            "keep_best=True saves adapters in the run's folder, but the run has no folder. Pass "
            "folder."
        )


def choose_loss(
    loss: Loss | Callable[..., Sums] | None, examples: Examples, layout: Layout
) -> Loss:
    """Returns the user's loss, or the default loss for chats, texts or images."""
    if isinstance(loss, Loss):
        return loss
    if loss is not None:
        return Loss(loss, unit=examples.unit)
    if isinstance(examples, Packs):
        layout.check_lengths(examples.lengths)
        return token_loss(**layout.chunks(None))
    if isinstance(examples, Labelled):
        return CLASSES if examples.ids.ndim == 2 else COMPARISONS
    if isinstance(examples, Images):
        return IMAGES
    raise TrainingError(
        "loss is missing, and your own arrays have no default loss. Pass a function (forward, "
        "params, batch, dropout_key) -> training.Sums(total, count, logs)."
    )


def check_folder(folder: str | Path | None, resume: bool, overwrite: bool) -> Path | None:
    """Returns the run's folder, created if missing; changes nothing in it."""
    if folder is None:
        if resume or overwrite:
            name = "resume" if resume else "overwrite"
            raise TrainingError(
                f"{name}=True needs a run's folder, but the run has no folder. Pass folder."
            )
        return None
    problem = remote_problem(folder)
    if problem:
        raise TrainingError(f"the folder {folder} {problem}")
    path = Path(folder).expanduser()
    if not (resume or overwrite) and any((path / name).exists() for name in _RUN_FILES):
        raise TrainingError(
            f"the folder {path} holds another run. Continue it with resume=True, delete it with "
            "overwrite=True, or pass another folder."
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"the folder {path} cannot be written ({error.strerror or error}). Pass another folder."
        ) from error
    return path


def delete_run_files(folder: Path, names: Iterable[str] = _RUN_FILES) -> None:
    """Deletes the named files and folders in a run's folder; by default all files of the run."""
    for path in (folder / name for name in names):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_positions(model: Model | Forward, examples: Examples) -> None:
    """Raises a TrainingError for sequences longer than a decoder's maximum position."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if positions is None or not isinstance(model, Decoder) or not isinstance(examples, Packs):
        return
    longest = int(examples.table.lengths.max())
    if longest > positions:
        raise TrainingError(
            f"a sequence has {longest} tokens, but the model has only {positions} positions. "
            "Reduce seq_len, or load the model with from_pretrained(…, rope_scaling="
            '{"rope_type": "yarn", "factor": 2.0}).'
        )


def check_optimizer(optimizer: object, weight_decay: float) -> None:
    """Raises a TrainingError for an unknown optimiser, or a weight decay that it ignores."""
    if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
        raise TrainingError(
            f"optimizer={optimizer!r} is unknown. Choose one of {', '.join(OPTIMIZERS)}, or pass "
            "an Optax optimizer."
        )
    if not isinstance(optimizer, str) and weight_decay:
        raise TrainingError(
            f"weight_decay={weight_decay} has no effect on your own optimizer. Remove "
            "weight_decay, and build it into the optimizer."
        )


def settings_as_text(**settings: Any) -> dict[str, str]:
    """Returns settings as texts that are equal in each process, for comparison on resuming."""
    return {
        name: "a function" if callable(value) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))
        for name, value in settings.items()
    }


def check_job(
    argument_values: dict[str, Any],
    subject: Subject,
    length: LengthOptions,
    rate: RateOptions,
    folder: FolderOptions,
    intervals: IntervalOptions,
    best: HeldOutOptions,
    seed: int,
) -> FinetuneJob:
    """Checks the arguments of a run before training starts, and returns the run.

    Args:
      argument_values: all arguments of `finetune`, by name.
      subject, length, rate, folder, intervals, best, seed: the same arguments, as records.

    Raises:
      TrainingError: an argument makes no sense, or the folder holds another run.
    """
    examples = as_examples(subject.examples, "examples")
    measured = matching_examples(best.examples, examples)
    check_numbers(argument_values | {"lr": None if callable(rate.lr) else rate.lr})
    check_options_agree(argument_values)
    check_best(best.keep, held_out=measured is not None, folder=folder.name is not None)
    check_optimizer(rate.optimizer, rate.weight_decay)
    for rows in filter(None, (examples, measured)):
        check_positions(subject.model, rows)
    loss = choose_loss(subject.loss, examples, subject.layout)
    order = Order.of(examples, seed, length.batch_size, length.grad_accum)
    return FinetuneJob(
        subject=subject,
        feed=Feed(examples, order, examples.name),
        loss=loss,
        measured=measured,
        steps=length.steps or order.steps(length.epochs or 1),
        rate=rate,
        folder=folder,
        intervals=intervals,
        best=best,
        seed=seed,
        path=check_folder(folder.name, folder.resume, folder.overwrite),
    )
