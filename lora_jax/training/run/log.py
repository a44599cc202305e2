"""The log of a run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

from lora_jax.training.losses import HELD_OUT, OWN_METRICS, UNITS, Reduction
from lora_jax.training.processes import is_first

Line = dict[str, Any]


NO_TOKENS = "no token of its batch counts"  # the reason of a step that was skipped


class Log(Protocol):
    """Receives one line of metrics per window of steps; used as a context manager."""

    def __enter__(self) -> "Log": ...

    def __exit__(self, *_: Any) -> None: ...

    def add(self, line: Line) -> None:
        """Receives a line of metrics, which has a `step`."""

    def skipped(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Receives the metrics of a skipped step.

        `lost` says why if its batch does. It is `NO_TOKENS` where the batch has no counted token.
        """


class NullLog:
    """Discards everything; used by all processes but the first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, line: Line) -> None:
        """Discards the line."""

    def skipped(self, step: int, metrics: Mapping[str, float]) -> None:
        """Discards the metrics."""


def skipped_line(step: int, metrics: Mapping[str, Any]) -> Line:
    """Returns the log line of a skipped step, with a `reason` if no token counted.

    Args:
      step: the step.
      metrics: as `Log.skipped` gets them.
    """
    line: Line = {"step": step, "skipped": 1.0}
    if metrics.get("lost") == NO_TOKENS:
        line["reason"] = NO_TOKENS
    return line


def window_line(
    steps: Sequence[Mapping[str, float]],
    batches: Sequence[Mapping[str, float | None]],
    tokens_per_s: float | None,
    reduction: Reduction,
) -> Line:
    """Returns the metrics of a window of steps, without the step number.

    The loss is the mean over the window's units or, of a loss that is a sum, over its steps. Logs
    are means over the units, of steps without any over the steps. 0 stands for one that a step does
    not have. A log with a count of its own (`UNITS`) is a mean over its own units, and a line
    leaves it out where there are none.

    Args:
      steps: metrics of each step, without the skipped steps.
      batches: metrics of the batches of these steps; see `_batch_line`.
      tokens_per_s: speed of the steps; None where it is not known.
      reduction: reduction of the loss.
    """
    line: dict[str, float | None] = {}
    # The newest values, such as the learning rate.
    for name, value in steps[-1].items():
        if name != "skipped" and not name.endswith(UNITS):
            line[name] = value
    for name in _log_names(steps):
        line[name] = _mean_over_units(steps, name)
    line |= _batch_line(batches)
    if reduction == "mean":
        line["loss"] = _mean_over_units(steps, "loss")
    else:
        line["loss"] = sum(metrics["loss"] for metrics in steps) / len(steps)
    line["count"] = int(sum(metrics["count"] for metrics in steps))
    line["tokens_per_s"] = None if tokens_per_s is None else round(tokens_per_s, 1)
    return {name: value for name, value in line.items() if value is not None}


def _log_names(steps: Sequence[Mapping[str, float]]) -> list[str]:
    """Returns the distinct names of the loss's logs in the metrics of steps."""
    metric_names = dict.fromkeys(name for metrics in steps for name in metrics)
    return [name for name in metric_names if name not in OWN_METRICS and not name.endswith(UNITS)]


def _mean_over_units(steps: Sequence[Mapping[str, float]], name: str) -> float | None:
    """Returns the mean of a metric over units; None if no unit counts for it."""
    own_count_name = f"{name}{UNITS}"
    has_own_count = own_count_name in steps[0]
    has_units = any(metrics["count"] for metrics in steps)
    total = 0.0
    total_weight = 0.0
    for metrics in steps:
        if has_own_count:
            weight = metrics[own_count_name]
        else:
            weight = metrics["count"] if has_units else 1
        if has_own_count and not weight:
            continue  # its value may be NaN
        total += metrics.get(name, 0) * weight
        total_weight += weight
    return total / total_weight if total_weight else None


def _batch_line(batches: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Returns the batch metrics of a window, combined to one line.

    A metric is the mean over the steps, whose batches have as many completions each; it is not
    weighted by their tokens. A maximum (`…_max`) is the largest one. None stands for a metric that
    is not known, and 0 for one that a step does not have.
    """
    line: dict[str, float | None] = {}
    for name in dict.fromkeys(name for metrics in batches for name in metrics):
        values = [metrics.get(name, 0) for metrics in batches]
        known_values = [value for value in values if value is not None]
        if not known_values:
            line[name] = None
        elif name.endswith("_max"):
            line[name] = max(known_values)
        else:
            line[name] = sum(known_values) / len(known_values)
    return line


def losses_of(line: Line) -> str:
    """Returns a text of a line's loss and logs: "loss 0.3333  accuracy 0.875"."""
    logs = (f"  {name} {value:.4g}" for name, value in line.items() if name not in OWN_METRICS)
    norm = f"  grad_norm {line['grad_norm']:.3g}" if "grad_norm" in line else ""
    return f"loss {line['loss']:.4f}{''.join(logs)}{norm}"


def duration(seconds: float) -> str:
    """Returns seconds as text: "3 min 20 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def show(line: Line) -> None:
    """Prints a line of metrics: a window of steps, a held-out measurement, or a skipped step.

    Args:
      line: as `finetune` gives it to its `log`.

    >>> from lora_jax import training
    >>> training.show({"step": 10, "loss": 0.5, "lr": 1e-3})
    step 10 ...
    """
    step = f"step {line['step']}"
    if "skipped" in line:
        why = line.get("reason", "its loss or its gradient is not finite")
        print(f"{step} skipped: {why}", flush=True)
    elif "loss" not in line:
        held_out = {name.removeprefix(HELD_OUT): value for name, value in line.items()}
        print(f"{step}: held-out {losses_of(held_out)}", flush=True)
    else:
        print(f"{step}  {losses_of(line)}  lr {line['lr']:.2e}", flush=True)


class Recorder(NullLog):
    """Records all lines, and passes each to a callback.

    Attributes:
      lines: the lines so far; of a step that was skipped, as `skipped_line` returns it.
    """

    def __init__(self, heard: Callable[[Line], object] | None) -> None:
        self.lines: list[Line] = []
        self._heard = heard

    def add(self, line: Line) -> None:
        """Records a line, and calls the callback in the first process."""
        self.lines.append(line)
        if self._heard is not None and is_first():
            self._heard(line)

    def skipped(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records a skipped step."""
        self.add(skipped_line(step, metrics))
