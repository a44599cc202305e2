"""The training loop: the compiled step over the batches, metrics and checkpoints on the way."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax

from lora_jax.training.errors import Diverged, Interrupted
from lora_jax.training.log import Log
from lora_jax.training.losses import HELD_OUT, OWN_METRICS, Reduction
from lora_jax.training.processes import Agreement
from lora_jax.training.step import State, Step
from lora_jax.training.stop import Stop

_SLOW = 0.5  # seconds of a step from which on running ahead of the device gains nothing


class Pace(Protocol):
    """Says how often the loop logs, evaluates and saves.

    Attributes:
      log_every: steps between lines of metrics.
      save_every: steps between checkpoints; the last step always has one.
      eval_every: steps between measurements on held-out data; 0 for none.
      max_skipped: as many skipped steps in a row end the run.
    """

    @property
    def log_every(self) -> int: ...
    @property
    def save_every(self) -> int: ...
    @property
    def eval_every(self) -> int: ...
    @property
    def max_skipped(self) -> int: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """Connects the loop with its data, its folder and its user.

    Attributes:
      batch: makes the batch of the step that has so many steps before it, from the state that this
        step begins with: rollouts are sampled from it, data ignore it. The batch must not hold the
        state's own arrays, whose memory the step takes over.
      placed: puts a batch on the devices.
      tokens: counts the tokens of a batch, without padding.
      save: writes a checkpoint.
      evaluate: returns the loss on held-out data and its logs, by name; None after a signal.
      rows: names the rows of the batch with that number, as a user knows them.
      resume_hint: tells an interrupted user how to go on.
      reduction: the loss's, which says what the loss of several steps is.
    """

    batch: Callable[[int, State], dict[str, Any]]
    placed: Callable[[dict[str, Any]], dict[str, Any]]
    tokens: Callable[[dict[str, Any]], int]
    save: Callable[[State], None]
    evaluate: Callable[[State], dict[str, float] | None]
    rows: Callable[[int], str]
    resume_hint: str
    reduction: Reduction = "mean"


def train(
    step: Step,
    state: State,
    base: Any,
    steps: int,
    run: Pace,
    hooks: Hooks,
    log: Log,
    stop: Stop,
) -> tuple[State, float | None]:
    """Trains from where `state` is to `steps`.

    Steps that skip themselves (see `make_step`) are logged. After a skipped step, no checkpoint is
    written until a step succeeds: what was learned before it may be at fault, and the last
    checkpoint is then what can be gone back to.

    Args:
      step: the compiled step; it takes the state's memory over.
      state: the state to begin with.
      base: the frozen half of the parameters.
      steps: the number of the last step.
      run: says how often to log, evaluate and save.
      hooks: makes batches, evaluates and saves.
      log: gets a line a window of steps.
      stop: tells of a signal.

    Returns:
      The last state and the median seconds of a step (None where none was taken).

    Raises:
      Interrupted: after a signal, once the step is finished and saved.
      Diverged: `run.max_skipped` steps in a row were skipped.
    """
    seconds: list[float] = []
    window: list[tuple[int, dict[str, jax.Array]]] = []  # steps whose metrics were not read yet
    began, n_tokens = time.perf_counter(), 0
    in_a_row = 0  # the skipped steps up to the last that was read
    agreement, turn, took = Agreement(), time.monotonic(), 0.0
    with stop.deferred():
        for number in range(int(state.step), steps):
            batch = hooks.batch(number, state)
            n_tokens += hooks.tokens(batch)
            state, metrics = step(state, base, hooks.placed(batch))
            done = number + 1
            window.append((done, metrics))
            # The host runs ahead of the device by one step, and of a slow one not at all: a signal
            # then waits for the step in progress alone.
            jax.block_until_ready(metrics if took > _SLOW else [m for _, m in window[-2:-1]])
            took, turn = time.monotonic() - turn, time.monotonic()
            stopping = stop.agreed(agreement, metrics)
            last = done == steps or stopping
            if last or done % run.log_every == 0 or done % run.save_every == 0:
                # Reading the metrics waits for the device, so it is done once a window.
                values = [(at, {k: float(v) for k, v in m.items()}) for at, m in window]
                elapsed = time.perf_counter() - began
                seconds += [elapsed / len(window)] * len(window)
                for at, v in values:
                    in_a_row = in_a_row + 1 if v["skipped"] else 0
                    if v["skipped"]:
                        log.skipped(at, v)
                    if in_a_row == run.max_skipped:
                        raise _diverged(at, v, run.max_skipped, hooks.rows(at - 1))
                if taken := [v for _, v in values if not v["skipped"]]:
                    log.add(_line(done, taken, n_tokens / elapsed, hooks.reduction))
                window, n_tokens = [], 0
            due = run.eval_every and (done % run.eval_every == 0 or done == steps)
            if due and not (stopping and done < steps):
                if (held_out := hooks.evaluate(state)) is not None:
                    log.add({"step": done, **{HELD_OUT + k: v for k, v in held_out.items()}})
                elif not window:  # else the next step's metrics are read with this one's
                    stopping = last = True
            if (last or done % run.save_every == 0) and not in_a_row:
                hooks.save(state)
            if stopping and done < steps:
                raise Interrupted(f"stopped after step {done}. {hooks.resume_hint}", stop.code)
            if not window:
                began = time.perf_counter()
    return state, statistics.median(seconds) if seconds else None


def _line(
    step: int, taken: list[dict[str, float]], tokens_per_s: float, reduction: Reduction
) -> dict[str, Any]:
    """Returns one line of metrics for a window of steps that ends with `step`.

    Its loss is the mean over the window's units or, of a loss that is a sum, over its steps. Logs
    are means over the units.

    Args:
      taken: the metrics of the window's steps, without those that were skipped.
    """
    count = sum(v["count"] for v in taken)

    def a_unit(name: str) -> float:
        return sum(v[name] * v["count"] for v in taken) / (count or 1)

    newest = {name: value for name, value in taken[-1].items() if name != "skipped"}
    logs = {name: a_unit(name) for name in newest if name not in OWN_METRICS}
    loss = a_unit("loss") if reduction == "mean" else sum(v["loss"] for v in taken) / len(taken)
    line = {"step": step, **newest, **logs, "loss": loss, "count": int(count)}
    return {**line, "tokens_per_s": round(tokens_per_s, 1)}


def _diverged(step: int, metrics: dict[str, float], n: int, rows: str) -> Diverged:
    return Diverged(
        lambda option: (
            f"{option('max_skipped', n)}: so many steps in a row were skipped, because their loss, "
            f"its count or its gradient was not finite. The last is step {step}: its loss is "
            f"{metrics['loss']}, its count {metrics['count']}, its gradient's norm "
            f"{metrics['grad_norm']}, its batch {rows}. If something is wrong with these rows, "
            "put it right and begin again; otherwise training diverged: begin again with a lower "
            f"{option('lr')} or a longer {option('warmup')}. The checkpoints from before are still "
            f"there: {option('resume', True)} goes on from the last one, with a higher "
            f"{option('max_skipped')} past these steps"
        )
    )
