"""The training loop: the compiled step over the batches, metrics and checkpoints on the way."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from train.errors import Interrupted, UserError
from train.hosts import any_process
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
    rows: Callable[[int], str]  # of that step's batch, as a user knows them
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

    Steps that skip themselves (see `train.step.make_step`) are logged. After one, nothing is saved
    before a step is good again: what was learned before it may be at fault, and the last checkpoint
    is then what can be gone back to.

    Raises Interrupted after a signal, once the step is finished and saved; UserError where
    `run.max_skipped` steps in a row were skipped.
    """
    seconds: list[float] = []
    window: list[tuple[int, dict[str, jax.Array]]] = []  # steps whose metrics were not read yet
    began, n_tokens = time.perf_counter(), 0
    in_a_row = 0  # the skipped steps up to the last that was read
    with stop.deferred():
        for number in range(int(state.step), steps):
            batch = hooks.batch(number)
            n_tokens += hooks.tokens(batch)
            state, metrics = step(state, base, hooks.placed(batch))
            done = number + 1
            window.append((done, metrics))
            # Asked once a step: what is raised has been saved.
            stopping = any_process(stop.signal is not None)
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
                    log.add(_line(done, taken, n_tokens / elapsed))
                window, n_tokens = [], 0
            if run.eval_every and (done % run.eval_every == 0 or done == steps):
                log.add({"step": done, "eval_loss": hooks.evaluate(state)})
            if (last or done % run.save_every == 0) and not in_a_row:
                hooks.save(state)
            if stopping and done < steps:
                raise Interrupted(f"stopped after step {done}. {hooks.resume_hint}", stop.code)
            if not window:
                began = time.perf_counter()
    return state, statistics.median(seconds) if seconds else None


def _line(step: int, taken: list[dict[str, float]], tokens_per_s: float) -> dict[str, Any]:
    """One line for a window that ends with `step`: its loss is the mean over its predictions.

    taken: the metrics of the window's steps, without those that were skipped.
    """
    count = sum(v["count"] for v in taken)
    loss = sum(v["loss"] * v["count"] for v in taken) / max(count, 1)
    newest = {name: value for name, value in taken[-1].items() if name != "skipped"}
    line = {"step": step, **newest, "loss": loss, "count": int(count)}
    return {**line, "tokens_per_s": round(tokens_per_s, 1)}


def _diverged(step: int, metrics: dict[str, float], n: int, rows: str) -> UserError:
    return UserError(
        f"--max-skipped {n}: so many steps in a row were skipped, because their loss or gradient "
        f"was not finite. The last is step {step}: its loss is {metrics['loss']}, its gradient's "
        f"norm {metrics['grad_norm']}, its batch {rows}. If something is wrong with these rows, "
        "put it right and begin again; otherwise training diverged: begin again with a lower --lr "
        "or a longer --warmup. The checkpoints from before are still there: --resume goes on from "
        "the last one, with a higher --max-skipped past these steps"
    )
