"""From an adapted tree to a trained one: the part that all training scripts share.

`make_ready` makes the state, or takes it from where an earlier run stopped; `fit` trains it to its
end. In between, a script may still look at the base as it was.
"""

import dataclasses
import functools
import operator
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

import lora_jax as lj
from lora_jax.fingerprint import base_fingerprint, differing
from lora_jax.training.batches import Batch, Examples, Order
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.layout import Layout
from lora_jax.training.loop import Hooks, train
from lora_jax.training.losses import Loss, Sums
from lora_jax.training.optimizer import takes_from_base, warmed_up
from lora_jax.training.processes import is_first, wait_for_all
from lora_jax.training.setup import Setup
from lora_jax.training.step import Evaluation, State, make_evaluation
from lora_jax.training.stop import Stop
from train.run.adapter import make_optimizer, rules
from train.run.errors import UserError, as_user_errors
from train.run.log import doing, draw_curve, open_log, read_metrics
from train.run.options import OptimConfig, Options
from train.run.output import ADAPTER, CHECKPOINTS, START, begin, folder_bytes
from train.run.pretrained import Outline
from train.run.report import compiled_bytes, megabytes, peak_bytes, versions

_SHOWN = 32  # as many rows of a batch are named


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Holds the options, folder and data of a run."""

    script: str  # "train.sft"
    config: Options
    folder: Path
    console: Console
    stop: Stop
    examples: Examples
    name: Callable[[int], str]  # of one of the examples, for messages
    order: Order
    steps: int
    rate: float  # the highest learning rate
    layout: Layout

    def batch(self, number: int) -> Batch:
        """The batch of the step that has `number` steps before it, in this process's memory."""
        return self.examples.take(self.order.rows(number))

    def names(self, number: int) -> str:
        """Names the rows of that batch, for messages."""
        rows = self.order.rows(number).ravel().tolist()
        left_out = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        return f"{', '.join(map(self.name, rows[:_SHOWN]))}{left_out} of {self.config.data.dataset}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ready:
    """Holds what training begins with."""

    setup: Setup
    state: State
    base: Any
    checkpoints: Checkpoints
    facts: dict[str, Any]  # what data and base were: each checkpoint has them
    summary: str


def number_of_steps(optim: OptimConfig, order: Order, default: int | None = None) -> int:
    """--steps, or what --epochs comes to, or the default: one epoch, if none is given."""
    if optim.steps is not None:
        return optim.steps
    if optim.epochs is None and default is not None:
        return default
    return order.steps(optim.epochs or 1)


def learning_rate(config: Options, outline: Outline, steps: int) -> float:
    """Returns the highest learning rate: --lr, or the one that --lr-rule gives for this run."""
    optim = config.optim
    if optim.lr_rule is None:
        assert optim.lr is not None, "the options have no defaults yet"
        return optim.lr
    return lj.optim.learning_rate(
        outline.config.hidden_size, family=optim.lr_rule, steps=steps, full=config.adapter.full
    )


def check_rules(config: Options, outline: Outline) -> None:
    """Raises UserError where the rules do not fit the model; reads no weights."""
    if config.adapter.init_adapter is None:
        with as_user_errors(ValueError):
            lj.lorafy(outline.params, rules(config.adapter, outline))


def adapted(config: Options, outline: Outline, plain: Any, folder: Path, key: jax.Array) -> Any:
    """The parameters with a new adapter, with the one to go on from, or with this run's first."""
    start = config.adapter.init_adapter
    if start is None and config.run.resume and (folder / START).exists():
        start = str(folder / START)
    with as_user_errors(ValueError):
        if start is None:
            return lj.lorafy(plain, rules(config.adapter, outline), key=key)
        mismatch = config.adapter.allow_base_mismatch
        return lj.load_adapter(start, plain, allow_base_mismatch=mismatch)


def make_ready(run: Run, params: Any, key: jax.Array, facts: dict[str, Any]) -> Ready:
    """Returns the state to train from, new or resumed; the run's folder is begun.

    Args:
      run: its options, data and folder.
      params: the adapted tree.
      key: of dropout.
      facts: what config.json says beside the options.
    """
    optim = run.config.optim
    summary = lj.summary(params)
    run.console.print(summary, highlight=False, soft_wrap=True)
    params = run.layout.placed(params)
    adapter, base = lj.split(params)
    schedule = warmed_up(run.rate, run.steps, kind=optim.schedule, warmup=optim.warmup)
    setup = Setup.of(run.layout, params, make_optimizer(optim, schedule, params), schedule)
    state = setup.state(adapter, key)
    checkpoints = Checkpoints(run.folder / CHECKPOINTS, run.config.run.keep)
    saved = {"data": run.examples.digest(), "base": base_fingerprint(base)}
    if run.config.run.resume:
        state = _resumed(run, checkpoints, state, saved)
    resolved = {"steps": run.steps, "examples": len(run.examples), "lr": run.rate}
    facts = {"resolved": resolved, **facts, "summary": summary, "versions": versions()}
    wait_for_all("the options of all processes are checked")
    if is_first():
        begin(run.folder, run.config, facts)
    wait_for_all("the run has begun")
    if takes_from_base(params) and not (run.folder / START).exists():
        lj.save_adapter(run.folder / START, params)  # so that --resume decomposes nothing again
    return Ready(
        setup=setup,
        state=state,
        base=base,
        checkpoints=checkpoints,
        facts=saved,
        summary=summary,
    )


def fit(
    run: Run,
    ready: Ready,
    forward: Callable[..., Any],
    loss: Loss,
    held_out: Examples | None,
) -> tuple[Any, dict[str, Any]]:
    """Trains to the end and saves the adapter.

    Args:
      run: its options, data and folder.
      ready: the state to train from.
      forward: the adapted function that the loss calls.
      loss: the function to minimise, and who divides it.
      held_out: examples that the loss is measured on every --eval-every steps.

    Returns:
      The adapted tree, and a report of what training cost.

    Raises:
      Interrupted: after a signal, once the step is finished and saved.
      UserError: too many steps in a row were skipped.
    """
    state, base, checkpoints = ready.state, ready.base, ready.checkpoints
    with doing(run.console, "compiling the step"):
        began = time.perf_counter()
        first = run.layout.batch(run.batch(0), parts=True)
        compiled = ready.setup.lower(forward, loss, state, base, first).compile()
        del first
        compile_seconds = time.perf_counter() - began
    evaluation = jax.jit(make_evaluation(forward, loss), out_shardings=run.layout.whole)
    hooks = Hooks(
        batch=lambda number, state: run.batch(number),
        placed=lambda batch: run.layout.batch(batch, parts=True),
        tokens=run.examples.tokens,
        save=lambda state: checkpoints.save(
            state, {**ready.facts, "cursor": run.order.cursor(int(state.step))}
        ),
        evaluate=lambda state: _means(
            loss, _evaluated(run, evaluation, state.adapter, base, held_out)
        ),
        rows=run.names,
        resume_hint=f"Go on with: {_resume_command(run.script)}",
        reduction=loss.reduction,
    )
    run.stop.message = f"interrupted. {hooks.resume_hint}"
    with open_log(run.folder, run.console, first=int(state.step), last=run.steps) as log:
        state, step_seconds = train(
            compiled, state, base, run.steps, run.config.run, hooks, log, run.stop
        )
    checkpoints.close()

    trained = lj.join(state.adapter, base)
    lj.save_adapter(run.folder / ADAPTER, trained, overwrite=True)
    metrics = read_metrics(run.folder)
    if is_first():
        draw_curve(run.folder, metrics, loss.label)
    report = {
        "summary": ready.summary,
        "steps": run.steps,
        "compile_seconds": compile_seconds,
        "skipped_steps": [line["step"] for line in metrics if "skipped" in line],
        "median_step_seconds": step_seconds,
        "compiled_bytes": compiled_bytes(compiled),
        "peak_bytes": peak_bytes(),
        "adapter_bytes": folder_bytes(run.folder / ADAPTER),
    }
    run.stop.message = f"interrupted; the adapter is in {run.folder / ADAPTER}"
    run.stop.check()
    return trained, report


def print_adapter(run: Run, report: dict[str, Any]) -> None:
    """Prints the adapter's folder and size, and the base's size."""
    run.console.print(
        f"adapter saved in {run.folder / ADAPTER}: {megabytes(report['adapter_bytes'])} beside "
        f"the base's {megabytes(report['base_bytes'])}",
        highlight=False,
        soft_wrap=True,
    )


def _evaluated(
    run: Run, evaluation: Evaluation, adapter: Any, base: Any, examples: Examples | None
) -> Sums:
    """Returns the sums over all examples, as floats."""
    assert examples is not None, "--eval-every without rows to hold out"

    def of_part(part: Batch) -> Sums:
        batch = run.layout.batch(part, parts=False)
        with jax.set_mesh(run.layout.mesh):
            return jax.tree.map(float, evaluation(adapter, base, batch))

    parts = map(of_part, examples.parts(run.config.optim.batch_size))
    return functools.reduce(lambda *sums: jax.tree.map(operator.add, *sums), parts)


def _means(loss: Loss, sums: Sums) -> dict[str, float]:
    """Returns the loss, in the sense of its reduction, and its logs divided by the count."""
    count: Any = sums.count or 1.0
    total: Any = sums.total / count if loss.reduction == "mean" else sums.total
    return {"loss": total, **{name: value / count for name, value in sums.logs.items()}}


def _resumed(run: Run, checkpoints: Checkpoints, state: State, facts: dict[str, Any]) -> State:
    """The state of the newest checkpoint; UserError where it is not of this run."""
    if not checkpoints.steps():
        run.console.print("no checkpoint yet: beginning at step 0")
        return state
    state, saved = checkpoints.restore(state)
    done = int(state.step)
    if saved["data"] != facts["data"] or saved["cursor"] != run.order.cursor(done):
        raise UserError("--resume: the training data are not those that the run began with")
    if wrong := differing(saved["base"], facts["base"]):
        raise UserError(
            f"--resume: the base is not the one that the run began with; {len(wrong)} of its "
            f"weights differ, {wrong[0]} among them"
        )
    if done > run.steps:
        raise UserError(f"--resume: {done} steps are done, more than the {run.steps} asked for")
    run.console.print(f"going on after step {done}", highlight=False)
    return state


def _resume_command(script: str) -> str:
    """The command line of this run, with --resume."""
    options = [arg for arg in sys.argv[1:] if arg not in ("--overwrite", "--resume")]
    return shlex.join(["python", "-m", script, *options, "--resume"])
