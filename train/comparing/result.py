"""What a comparison measured, as `compare.json` holds it: everything that the report shows."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

JSON = "compare.json"

Status = Literal["done", "stopped early", "failed", "waiting"]


class Arm(NamedTuple):
    """A configuration, which has one run for each seed.

    Attributes:
      method: "lora", a variant of it such as "dora", or "full".
      rank: of the adapter; None for full fine-tuning, and so are the next two.
      targets: the modules that the adapter is on, as `--targets` names them.
      alpha: of the adapter's scale.
      learning_rate: the peak.
      batch_size: rows a step.
    """

    method: str
    rank: int | None
    targets: tuple[str, ...] | None
    alpha: float | None
    learning_rate: float
    batch_size: int


class Point(NamedTuple):
    """A measurement on the way: the step after which it was made, and its value."""

    step: int
    value: float


class Forgetting(NamedTuple):
    """The loss on text outside the task, in nats a token, of the base and after training."""

    before: float
    after: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A run: an arm with a seed.

    Attributes:
      name: of the run's folder in `runs`.
      arm, seed: what was run.
      status: how it ended. A run that is stopped early was hopeless by the rule.
      error: what ended a failed run.
      steps: those taken.
      losses, held_out: the loss in training and on held-out rows, step by step.
      held_out_loss: after the last step, in nats a token or a row; None if never measured.
      score: the task's own, such as the share of right answers; None where it has none, and for
        runs that did not end.
      trained_parameters: how many numbers were trained.
      saved_bytes: of what a run leaves to ship: the adapter's folder, or all weights.
      compiled_bytes: of the compiled step, arguments and temporaries; None for runs that trained
        side by side in one step with others.
      peak_bytes: of the process, so far.
      step_seconds: the median; None for runs side by side.
      side_by_side: the number of runs that shared its steps; 1 if it ran alone.
      seconds: the wall time that the run took, or its even share of the time of all at its side.
      forgetting: None where it was not measured.
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
    trained_parameters: int | None = None
    saved_bytes: int | None = None
    compiled_bytes: int | None = None
    peak_bytes: int | None = None
    step_seconds: float | None = None
    side_by_side: int = 1
    seconds: float | None = None
    forgetting: Forgetting | None = None


class Latency(NamedTuple):
    """The time of one answer: a decoding step, or the forward pass of a batch of an encoder.

    Attributes:
      arm: whose adapter was timed.
      base, merged, live: medians in seconds: the base alone; the adapter merged into it; the
        adapter beside it.
      what: what was timed, in words: "a decoding step of 8 rows".
    """

    arm: Arm
    base: float
    merged: float
    live: float
    what: str


class Planned(NamedTuple):
    """An arm on a machine that is not there, as `train.plan` computes it.

    Attributes:
      arm: the arm.
      bytes_per_device: of a device, at most.
      step_seconds: at the assumed share of the peak; None where the machine's peak is not known.
      device_hours: of the whole run.
      cost: at the given price; None without one.
    """

    arm: Arm
    bytes_per_device: int
    step_seconds: float | None
    device_hours: float | None
    cost: float | None


class Rung(NamedTuple):
    """A decision of the rule that stops hopeless runs.

    Attributes:
      step: the arms were compared after this step.
      kept, stopped: the arms, and the mean held-out loss of each, best first.
    """

    step: int
    kept: tuple[tuple[Arm, float], ...]
    stopped: tuple[tuple[Arm, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What all runs share.

    Attributes:
      command: the command line.
      script: "train.sft" or "train.classify".
      model: the base, by name.
      dataset: the data, in words.
      steps: of a whole run.
      loss: the name of the loss, with its unit: "loss (nats a token)".
      score: the name of the task's own score, larger is better; None where it has none.
      base_bytes: of the base's weights in memory.
      machine: where it ran, in words.
      date: when it began, as ISO 8601 has it.
      versions: of Python and packages.
      planned_on: the machine of `Planned`, with price and assumed share of the peak, in words.
      outside: the text that forgetting was measured on, in words.
      rule: the rule of early stopping, in words; None where no run was stopped early.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that a comparison measured."""

    facts: Facts
    runs: tuple[Measured, ...]
    rungs: tuple[Rung, ...] = ()
    latencies: tuple[Latency, ...] = ()
    planned: tuple[Planned, ...] = ()
