"""The training loop: the compiled step over the batches, metrics and checkpoints on the way."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from train.errors import Interrupted, UserError
from train.hosts import any_of_all
from train.log import Log, Unheard
from train.options import RunConfig
from train.step import State, Step
from train.stop import Stop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop calls on its way."""

    batch: Callable[[int], dict[str, Any]]  # of the step with so many before it
    placed: Callable[[dict[str, Any]], dict[str, Any]]  # the batch on the devices
    tokens: Callable[[dict[str, Any]], int]  # how many a batch holds, without padding
    save: Callable[[State], None]
    evaluate: Callable[[State], float]  # the loss on held-out data
    resume_hint: str  # what an interrupted user reads


def train(
    step: Step,
    state: State,
    base: Any,
    steps: int,
    run: RunConfig,
    hooks: Hooks,
    log: Log | Unheard,
    stop: Stop,
) -> tuple[State, float | None]:
    """Trains from where `state` is to `steps`: (the last state, the median seconds of a step).

    Raises Interrupted after a signal, once the step is finished and saved; UserError where the
    loss is no number any more.
    """
    seconds: list[float] = []
    window: list[tuple[int, dict[str, jax.Array]]] = []  # steps whose metrics were not read yet
    began, n_tokens = time.perf_counter(), 0
    with stop.deferred():
        for number in range(int(state.step), steps):
            batch = hooks.batch(number)
            n_tokens += hooks.tokens(batch)
            state, metrics = step(state, base, hooks.placed(batch))
            done = number + 1
            window.append((done, metrics))
            # Asked once a step: what is raised has been saved.
            stopping = any_of_all(stop.signal is not None)
            last = done == steps or stopping
            if last or done % run.log_every == 0 or done % run.save_every == 0:
                # Reading the metrics waits for the device, so it is done once a window.
                values = [(at, {k: float(v) for k, v in m.items()}) for at, m in window]
                elapsed = time.perf_counter() - began
                seconds += [elapsed / len(window)] * len(window)
                _check_finite(values)
                log.add(_line(values, n_tokens / elapsed))
                window, n_tokens = [], 0
            if run.eval_every and (done % run.eval_every == 0 or done == steps):
                log.add({"step": done, "eval_loss": hooks.evaluate(state)})
            if last or done % run.save_every == 0:
                hooks.save(state)
            if stopping and done < steps:
                raise Interrupted(f"stopped after step {done}. {hooks.resume_hint}", stop.code)
            if not window:
                began = time.perf_counter()
    return state, statistics.median(seconds) if seconds else None


def _line(values: list[tuple[int, dict[str, float]]], tokens_per_s: float) -> dict[str, Any]:
    """One line for a window: its loss is the mean over the window's predictions."""
    step, newest = values[-1]
    count = sum(v["count"] for _, v in values)
    loss = sum(v["loss"] * v["count"] for _, v in values) / max(count, 1)
    line = {"step": step, **newest, "loss": loss, "count": int(count)}
    return {**line, "tokens_per_s": round(tokens_per_s, 1)}


def _check_finite(values: list[tuple[int, dict[str, float]]]) -> None:
    for step, metrics in values:
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise UserError(
                f"the loss of step {step} is {metrics['loss']}, its gradient's norm "
                f"{metrics['grad_norm']}: training diverged. Begin again with a lower --lr or a "
                "longer --warmup; the checkpoints from before are still there"
            )
