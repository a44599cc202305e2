"""The measurements of a comparison, as `compare.json` contains them."""

import dataclasses
import functools
import inspect
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from lora_jax.training.processes import write_json
from train.console.errors import UserError, as_user_errors

JSON = "compare.json"

Status = Literal["done", "stopped early", "failed", "waiting"]


class Arm(NamedTuple):
    """A configuration, which is trained once for each seed.

    Attributes:
      method: "lora", a variant of it such as "dora", "said" or "did" for a random subspace, or
        "full".
      rank: rank of the adapter; None for full fine-tuning, and so are the next two.
      targets: the modules that the adapter is on, as `--targets` names them.
      alpha: alpha of the adapter's scale.
      learning_rate: the peak.
      batch_size: rows a step.
      dimension: dimension of a random subspace; None for all other methods.
    """

    method: str
    rank: int | None
    targets: tuple[str, ...] | None
    alpha: float | None
    learning_rate: float
    batch_size: int
    dimension: int | None = None

    def rate_group(self) -> "Arm":
        """Returns the arm without its learning rate, equal for all arms that differ only in it."""
        return self._replace(learning_rate=0.0)


class Point(NamedTuple):
    """A measurement during training: the step after which it was made, and its value."""

    step: int
    value: float


class Forgetting(NamedTuple):
    """The loss on text outside the task, in nats per token, of the base and after training."""

    before: float
    after: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a run: an arm with a seed.

    Attributes:
      name: name of the run's folder in `runs`.
      arm, seed: what was run.
      status: how it ended. A run that is stopped early was hopeless by the rule.
      error: what ended a failed run.
      steps: number of steps taken.
      losses, held_out: the loss in training and on held-out rows, step by step.
      held_out_loss: after the last step, in nats per token or a row; None if never measured.
      score: the task's own, such as the share of right answers; None where it has none, and for
        runs that did not end.
      scores: the score on the way, where runs are compared by it.
      score_error: the standard error of `score` over the held-out rows; None where it is not known.
      question_scores: the score of each held-out question, in one order for all runs; None for a
        question without one. Empty where they are not known.
      divergences: KL(base ‖ run) on held-out prompts, in nats per token, where it was measured.
      trained_parameters: how many numbers were trained.
      saved_bytes: bytes of what a run leaves to ship: the adapter's folder, or all weights.
      compiled_bytes: bytes of the compiled step, arguments and temporaries; None for runs that
        trained side by side in one step with others.
      peak_bytes: peak bytes of the process, so far.
      step_seconds: the median; None for runs side by side.
      step_seconds_low, step_seconds_high: the quartiles of the steps' times; None in files of
        earlier versions.
      side_by_side: the number of runs that shared its steps; 1 if it ran alone.
      seconds: the wall time that the run took, or its even share of the time of all at its side.
      forgetting: None where it was not measured.
      intruders: intruder dimensions of a matrix, on average over the layers; None if not counted.
    """

    name: str
    arm: Arm
    seed: int
    status: Status
    error: str | None = None
    steps: int = 0
    losses: tuple[Point, ...] = ()
    held_out: tuple[Point, ...] = ()
    held_out_loss: float | None = None
    score: float | None = None
    scores: tuple[Point, ...] = ()
    score_error: float | None = None
    question_scores: tuple[float | None, ...] = ()
    divergences: tuple[Point, ...] = ()
    trained_parameters: int | None = None
    saved_bytes: int | None = None
    compiled_bytes: int | None = None
    peak_bytes: int | None = None
    step_seconds: float | None = None
    step_seconds_low: float | None = None
    step_seconds_high: float | None = None
    side_by_side: int = 1
    seconds: float | None = None
    forgetting: Forgetting | None = None
    intruders: float | None = None

    @property
    def training_loss(self) -> float | None:
        """The last loss in training; None if none was recorded."""
        return self.losses[-1].value if self.losses else None

    @property
    def divergence(self) -> float | None:
        """The last divergence from the base; None if it was not measured."""
        return self.divergences[-1].value if self.divergences else None

    @property
    def forgotten(self) -> float | None:
        """The rise of the loss on text outside the task; None if it was not measured."""
        return self.forgetting and self.forgetting.after - self.forgetting.before


class Ratio(NamedTuple):
    """The ratio of two times, measured alternately in several rounds.

    Attributes:
      median, low, high: the median of the rounds' ratios, the smallest, and the largest.
    """

    median: float
    low: float
    high: float

    @property
    def is_told_apart(self) -> bool:
        """True if all rounds agree on which of the two is larger."""
        return not self.low <= 1 <= self.high


class Latency(NamedTuple):
    """The time of one answer: a decoding step, or the forward pass of a batch of an encoder.

    Attributes:
      arm: arm whose adapter was timed.
      base, merged, live: medians in seconds: the base alone; the adapter merged into it; the
        adapter beside it.
      what: what was timed, in words: "a decoding step of 8 rows".
      merged_ratio, live_ratio: the times of `merged` and `live` over those of `base`, round by
        round; None in files of earlier versions.
    """

    arm: Arm
    base: float
    merged: float
    live: float
    what: str
    merged_ratio: Ratio | None = None
    live_ratio: Ratio | None = None


class PlanResult(NamedTuple):
    """The plan of an arm for another machine, as `train.plan` computes it.

    Attributes:
      arm: the arm.
      bytes_per_device: bytes of a device, at most.
      step_seconds: the seconds of a step, by the compiler's estimate or at the assumed share of
        the peak; None if neither is known.
      device_hours: device hours of the whole run.
      cost: at the given price; None without one.
    """

    arm: Arm
    bytes_per_device: int
    step_seconds: float | None
    device_hours: float | None
    cost: float | None


class Rung(NamedTuple):
    """A decision of the early-stopping rule.

    Attributes:
      share: the arms were compared after this share of their steps.
      kept, stopped: the arms, and the mean held-out loss, or score, of each, best first.
    """

    share: float
    kept: tuple[tuple[Arm, float], ...]
    stopped: tuple[tuple[Arm, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonFacts:
    """Facts that all runs share.

    Attributes:
      command: the command line.
      script: "train.sft", "train.classify" or "train.grpo".
      model: the base, by name.
      dataset: the data, in words.
      steps: number of steps of a whole run.
      loss: the name of the loss, with its unit: "loss (nats per token)".
      score: the name of the task's own score, larger is better; None where it has none.
      base_bytes: bytes of the base's weights in memory.
      base_saved_bytes: bytes of the base's files, saved as a full model is; None where that was not
        measured.
      weights: the weights that stood in for those of the hub, in words; None for the hub's own.
      machine: where it ran, in words.
      date: when it began, as ISO 8601 has it.
      versions: versions of Python and packages.
      planned_on: the machine of `PlanResult`, with price and assumed share of the peak, in words.
      outside: the text that forgetting was measured on, in words.
      rule: the rule of early stopping, in words; None where no run was stopped early.
      baselines: the task's score without training, by what gets it: "always the commonest label".
      by_score: whether the rule looks at the score, which is larger the better; else at the loss.
      diverging_on: the prompts on which the divergence from the base was measured, in words; None
        where it was not.
      eval_questions: the value of --eval-questions; None for scripts without it.
      most_questions: the largest value of it that the data has questions for; None where another
        value changes nothing, or that is not known.
    """

    command: str
    script: str
    model: str
    dataset: str
    steps: int
    loss: str
    score: str | None
    base_bytes: int
    machine: str
    date: str
    versions: Mapping[str, str]
    planned_on: str | None = None
    outside: str | None = None
    rule: str | None = None
    baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    by_score: bool = False
    diverging_on: str | None = None
    base_saved_bytes: int | None = None
    weights: str | None = None
    eval_questions: int | None = None
    most_questions: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """All measurements of a comparison."""

    facts: ComparisonFacts
    runs: tuple[RunResult, ...]
    rungs: tuple[Rung, ...] = ()
    latencies: tuple[Latency, ...] = ()
    planned: tuple[PlanResult, ...] = ()


Kind = TypeVar("Kind")


def write(comparison: Comparison, folder: Path) -> None:
    """Writes `compare.json` into a folder atomically."""
    write_record(comparison, folder / JSON)


def read(folder: Path) -> Comparison:
    """Returns the comparison that `write` wrote into a folder.

    Raises:
      UserError: the file is missing, is no JSON, or a field is of another kind.
    """
    return read_record(Comparison, folder / JSON)


def write_record(record: object, path: Path) -> None:
    """Writes a dataclass or a named tuple as JSON atomically.

    Every tuple with field names is an object there. Numbers that JSON lacks are the strings
    "NaN", "Infinity" and "-Infinity".
    """
    write_json(path, _to_json(record))


def read_record(kind: type[Kind], path: Path) -> Kind:
    """Reads a record that `write_record` wrote.

    Fields that have a default may be missing, as in the files of an earlier version.

    Args:
      kind: the type of what was written.
      path: the file.

    Raises:
      UserError: the file is missing, is no JSON, or a field is of another kind.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}). Pass the output folder of train.compare."
        ) from error
    with as_user_errors(ValueError, prefix=f"{path} is not JSON: "):  # Unicode's errors, too
        content = json.loads(text)
    hint = "; only train.compare writes this file"
    with as_user_errors(_Mismatch, prefix=f"{path}: ", suffix=hint):
        return _parse_value(content, kind, "")


_NOT_FINITE = ("NaN", "Infinity", "-Infinity")
_EXPECTED = {int: "an integer", str: "a string", bool: "true or false"}


class _Mismatch(Exception):
    """The error for a file's value that does not fit its field. The message names the field."""


def _to_json(value: Any) -> object:
    """Returns a value as JSON represents it; the inverse of `_parse_value`."""
    field_names = _fields_of_record(value.__class__)
    if field_names:
        return {name: _to_json(getattr(value, name)) for name in field_names}
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    return value


def _parse_value(value: Any, kind: Any, field: str) -> Any:
    """Converts a JSON value to a field's annotated type.

    Args:
      value: the value.
      kind: the type.
      field: the path of the field in the file, for errors: "runs[0].arm"; "" for the whole file.
    """
    origin = typing.get_origin(kind)
    if origin is not None:
        return _parse_generic(value, origin, typing.get_args(kind), field)
    is_required = _fields_of_record(kind)
    if is_required:
        _check_value(isinstance(value, dict), field, "an object", value)
        return _parse_record(value, kind, is_required, f"{field}." if field else "")
    is_bool = isinstance(value, bool)
    if kind is float:
        is_number = isinstance(value, int | float) and not is_bool
        _check_value(is_number or value in _NOT_FINITE, field, "a number", value)
        return float(value)
    is_of_kind = isinstance(value, kind) and is_bool == (kind is bool)
    _check_value(is_of_kind, field, _EXPECTED[kind], value)
    return value


def _parse_generic(value: Any, origin: Any, arguments: tuple[Any, ...], field: str) -> Any:
    """Parses a value of a type with arguments, such as `tuple[Arm, ...]`; see `_parse_value`."""
    if origin in (typing.Union, types.UnionType):  # X | None
        if value is None:
            return None
        (kind,) = [argument for argument in arguments if argument is not types.NoneType]
        return _parse_value(value, kind, field)
    if origin is Literal:
        _check_value(value in arguments, field, " or ".join(map(repr, arguments)), value)
        return value
    if origin is tuple:
        _check_value(isinstance(value, list), field, "a list", value)
        is_of_any_length = arguments[-1] is Ellipsis
        kinds = (arguments[0],) * len(value) if is_of_any_length else arguments
        _check_value(len(kinds) == len(value), field, f"a list of {len(kinds)}", value)
        return tuple(
            _parse_value(item, kinds[index], f"{field}[{index}]")
            for index, item in enumerate(value)
        )
    # Mapping[str, X]
    _check_value(isinstance(value, dict), field, "an object", value)
    _, item_kind = arguments
    return {key: _parse_value(item, item_kind, f"{field}[{key!r}]") for key, item in value.items()}


def _parse_record(
    record: Mapping[str, Any], kind: Any, is_required: Mapping[str, bool], prefix: str
) -> Any:
    """Converts a JSON object to a record.

    Args:
      record: the object.
      kind: the record's type.
      is_required: field of the record -> whether it has no default.
      prefix: the path of the object in the file, before the names of its fields: "runs[0].".
    """
    for name in record:
        if name not in is_required:
            raise _Mismatch(f"{prefix}{name} is no field of {kind.__name__}")
    for name in is_required:
        if is_required[name] and name not in record:
            raise _Mismatch(f"{prefix}{name} is missing")
    kinds = typing.get_type_hints(kind)
    values = {
        name: _parse_value(value, kinds[name], prefix + name) for name, value in record.items()
    }
    return kind(**values)


@functools.cache
def _fields_of_record(kind: Any) -> dict[str, bool]:
    """Returns the field names of a record's type, and whether each has no default."""
    is_record = dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")
    if not is_record:
        return {}
    parameters = inspect.signature(kind).parameters.values()
    return {parameter.name: parameter.default is parameter.empty for parameter in parameters}


def _check_value(is_valid: bool, field: str, expected: str, value: object) -> None:
    """Raises a `_Mismatch` if a value does not fit its field."""
    if is_valid:
        return
    text = json.dumps(value)
    if len(text) > 60:
        text = f"{text[:57]}..."
    raise _Mismatch(f"{field or 'the content'} is {text}, but it must be {expected}")
