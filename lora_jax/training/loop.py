"""The training loop: the compiled step over the batches; metrics, measurements, checkpoints."""

import dataclasses
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lora_jax.core.types import Tree
from lora_jax.training.clock import StepClock, StepTimes, times_of_steps
from lora_jax.training.errors import Diverged, Dropped, Interrupted, TrainingError
from lora_jax.training.losses import Reduction
from lora_jax.training.processes import Agreement, broadcast_values
from lora_jax.training.run.log import NO_TOKENS, Log, window_line
from lora_jax.training.run.stop import Stop
from lora_jax.training.step import State, Step

_SLOW = 0.5  # seconds a step, above which running ahead of the device gains nothing

# Yields the number of a step to take, from 0; is sent its metrics and its number of tokens. Returns
# the seconds of a step (None where none was taken).
Turns = Generator[int, tuple[Mapping[str, Any], int], StepTimes | None]


class Stopped(Interrupted):
    """A run was stopped by a signal, after a step that it has saved."""


class Pace(NamedTuple):
    """The intervals at which the loop logs and saves.

    Attributes:
      log_every: steps between lines of metrics.
      save_every: steps between checkpoints; the last step always has one.
      max_skipped: skipped steps in a row that end the run. Those without a counted token do not
        count.
    """

    log_every: int
    save_every: int
    max_skipped: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeriodicMeasure:
    """Measures the model, every so many steps and at the end of training.

    Attributes:
      every: steps between two measurements; 0 for none.
      prefix: prefix of the names of its measurements in the log: "eval_".
      take: returns the measurements by name; {} logs nothing. None after a signal, which all
        processes agree on. All of them have to call it.
    """

    every: int
    prefix: str
    take: Callable[[State], dict[str, float] | None]

    def is_due(self, done: int, steps: int) -> bool:
        """Returns True if a measurement is due after `done` of `steps` steps."""
        return bool(self.every) and (done % self.every == 0 or done == steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """Connects the loop with its data, its folder and its user.

    Attributes:
      batch: (number of steps before it, the state it begins with) -> a step's batch. Rollouts are
        sampled from the state; data ignore it. The batch must not hold the state's own arrays,
        which the step donates. It may raise `Dropped` after a signal.
      placed: puts a batch on the devices.
      tokens: counts the tokens of a batch, without padding.
      metrics: returns metrics of the batch with that number, to be logged beside those of the step;
        None for one that is not known. A line has their means over the steps.
      lost: returns the reason why nothing can be learned from the batch with that number, whose
        loss is NaN so that its step is skipped; None for a batch like others.
      save: writes a checkpoint; gets the prefixes of the measures that its step still lacks.
      rows: names the rows of the batch with that number, as a user knows them.
      resume_hint: tells an interrupted user how to go on.
      reduction: the loss's, which says what the loss of several steps is.
      measures: are taken in this order.
      owed: the prefixes of the measures that the step to begin with lacks.
      settle: waits until all that was saved is written, where a bucket takes it beside the steps.
      judge: gets what was measured after a step, by prefixed name, before the step is saved; {}
        before the first. Returns True if training ends here.
    """

    batch: Callable[[int, State], dict[str, Any]]
    placed: Callable[[dict[str, Any]], dict[str, Any]]
    tokens: Callable[[dict[str, Any]], int]
    save: Callable[[State, Sequence[str]], None]
    rows: Callable[[int], str]
    resume_hint: str
    metrics: Callable[[int], Mapping[str, float | None]] = lambda number: {}
    lost: Callable[[int], str | None] = lambda number: None
    reduction: Reduction = "mean"
    measures: Sequence[PeriodicMeasure] = ()
    owed: Sequence[str] = ()
    settle: Callable[[], None] = lambda: None
    judge: Callable[[State, dict[str, float]], bool] = lambda state, measured: False


class _StepUnderWay(NamedTuple):
    """A step that was begun, and the seconds that its clock had counted of compilations by then."""

    metrics: Mapping[str, Any]
    tokens: int
    compile_seconds: float


class _UnreadStep(NamedTuple):
    """A step whose metrics were not read yet.

    Attributes:
      done: the number of steps with it.
      metrics: metrics of the step, on the device.
      batch_metrics: metrics of its batch; see `Hooks.metrics`.
      lost: reason why nothing can be learned from its batch; None for none.
    """

    done: int
    metrics: Mapping[str, Any]
    batch_metrics: Mapping[str, float | None]
    lost: str | None


class _Window:
    """Holds the steps whose metrics were not read yet: reading them waits for the device.

    Attributes:
      seconds: seconds of each step that has ended. Of a step during which the host compiled the
        next one, they are not known.
      skipped: the skipped steps in a row, up to the last that was read, but for those without a
        counted token.
    """

    def __init__(self, run: Pace, hooks: Hooks, log: Log, clock: StepClock) -> None:
        self.seconds: list[float] = []
        self.skipped = 0
        self._run, self._hooks, self._log, self._clock = run, hooks, log, clock
        self._steps: list[_UnreadStep] = []
        self._under_way: list[_StepUnderWay] = []
        self._last_end = clock.now()
        self._tokens, self._token_seconds = 0, 0.0  # of the steps in `seconds` that are not read

    def add(self, step: _UnreadStep, tokens: int) -> None:
        """Adds a step that was begun, whose batch has so many tokens."""
        self._steps.append(step)
        self._under_way.append(_StepUnderWay(step.metrics, tokens, self._clock.compile_seconds))

    def wait(self, *, under_way: int) -> None:
        """Waits until at most so many steps are under way, and notes the seconds of the others."""
        while len(self._under_way) > under_way:
            step = self._under_way.pop(0)
            jax.block_until_ready(step.metrics)
            end = self._clock.now()
            if step.compile_seconds == self._clock.compile_seconds:
                self.seconds.append(end - self._last_end)
                self._token_seconds += end - self._last_end
                self._tokens += step.tokens
            self._last_end = end

    def read(self) -> None:
        """Logs the steps as one line, and those that were skipped one by one.

        Raises:
          Diverged: too many in a row were skipped.
        """
        if not self._steps:
            return
        taken = []
        for step in self._steps:
            at, lost = step.done, step.lost
            v = {name: float(value) for name, value in step.metrics.items()}
            if v["skipped"] and v["count"] == 0 and lost is None:
                self._log.skipped(at, {**v, "lost": NO_TOKENS})
                continue
            self.skipped = self.skipped + 1 if v["skipped"] else 0
            if v["skipped"]:
                self._log.skipped(at, v if lost is None else {**v, "lost": lost})
            if self.skipped == self._run.max_skipped:
                rows = self._hooks.rows(at - 1)
                raise _diverged(at, v, self._run.max_skipped, rows, lost)
            if not v["skipped"]:
                taken.append((v, step.batch_metrics))
        if taken:
            speed = self._tokens / self._token_seconds if self._token_seconds else None
            step_metrics, batch_metrics = zip(*taken, strict=True)
            line = window_line(step_metrics, batch_metrics, speed, self._hooks.reduction)
            self._log.add({"step": self._steps[-1].done, **line})
        self._steps, self._tokens, self._token_seconds = [], 0, 0.0


def train(
    step: Step, state: State, base: Tree, steps: int, run: Pace, hooks: Hooks, log: Log, stop: Stop
) -> tuple[State, StepTimes | None]:
    """Trains from where `state` is to `steps`, or until `hooks.judge` ends it.

    Skipped steps (see `make_step`) are logged. After one that was not finite, no checkpoint is
    written until a step succeeds: what was learned before it may be at fault, and a run can go back
    to the last checkpoint. A step without a counted token holds up no checkpoint.

    A run that was interrupted before it measured a step measures it on resuming, and so gets the
    same measurements as a run without a break.

    Args:
      step: the compiled step, which donates the state.
      state: the state to begin with.
      base: the frozen half of the parameters.
      steps: the number of the last step.
      run: says how often to log and save.
      hooks: makes batches, measures and saves.
      log: gets a line a window of steps.
      stop: tells of a signal.

    Returns:
      The last state and the seconds of a step (None where none was taken).

    Raises:
      Interrupted: after a signal, once the step is finished and saved.
      Diverged: `run.max_skipped` steps in a row were skipped.
    """
    held = [state]
    with StepClock() as clock, stop.deferred():
        turns = training_steps(lambda: held[0], steps, run, hooks, log, stop, clock)
        try:
            number = next(turns)
            while True:
                try:
                    batch = hooks.batch(number, held[0])
                except Dropped as dropped:
                    turns.throw(dropped)  # it saves, and raises Stopped
                n_tokens = hooks.tokens(batch)
                held[0], metrics = step(held[0], base, hooks.placed(batch))
                number = turns.send((metrics, n_tokens))
        except StopIteration as end:
            return held[0], end.value


def training_steps(
    now: Callable[[], State],
    steps: int,
    run: Pace,
    hooks: Hooks,
    log: Log,
    stop: Stop,
    clock: StepClock,
) -> Turns:
    """Yields the index of each step and is sent its metrics: `train` without taking the steps.

    Its driver takes them. A driver with several of these takes one step of each at a time.

    Args:
      now: returns the state after the steps so far; it is called where a state is looked at: before
        the first step, and to measure, judge and save.
      steps, run, hooks, log, stop: see `train`. Of `hooks`, `batch`, `tokens` and `placed` are the
        driver's, who also defers signals.
      clock: measures the seconds of steps; runs of one driver share it.

    Yields:
      The number of steps before the one to take. A driver without its batch, as a signal came,
      throws `Dropped`: the steps before are saved.

    Returns:
      The seconds of a step (None where none was taken).

    Raises:
      Stopped, Diverged: see `train`.
    """
    agreement, turn, took = Agreement(), time.monotonic(), 0.0
    with clock.paused():
        state = now()
        begun = int(state.step)
        owed: Sequence[PeriodicMeasure] = [m for m in hooks.measures if m.prefix in hooks.owed]
        measured, owed = _measured(owed, now, begun, log)
        if owed and begun < steps:  # the checkpoint says so already
            raise _stopped(begun, hooks, stop)
        if hooks.judge(state, measured):
            return None
        del state
    window = _Window(run, hooks, log, clock)
    for number in range(begun, steps):
        try:
            metrics, n_tokens = yield number
        except Dropped as dropped:  # of which a resumed run makes the same batch
            window.wait(under_way=0)
            window.read()
            if number > begun and number % run.save_every and not window.skipped:
                hooks.save(now(), ())
            stopped = _stopped(number, hooks, stop)
            if dropped.args:
                raise TrainingError(f"{dropped}. The run {stopped}") from None
            raise stopped from None
        done, lost = number + 1, hooks.lost(number)
        step = _UnreadStep(
            done=done, metrics=metrics, batch_metrics={**hooks.metrics(number)}, lost=lost
        )
        window.add(step, n_tokens)
        # The host runs ahead of the device by one step, and of a slow one not at all: a signal then
        # waits for the step in progress alone.
        window.wait(under_way=0 if took > _SLOW else 1)
        took, turn = time.monotonic() - turn, time.monotonic()
        stopping = stop.agreed(agreement, metrics)
        line_is_due = done % run.log_every == 0 or done % run.save_every == 0
        is_read = stopping or done == steps or line_is_due or lost is not None
        due = [measure for measure in hooks.measures if measure.is_due(done, steps)]
        if not is_read and not due:
            continue
        window.wait(under_way=0)
        with clock.paused():
            if is_read:
                window.read()
            if stopping and done < steps:
                measured, owed = {}, due
            else:
                measured, owed = _measured(due, now, done, log)
            stopping = stopping or bool(owed)
            ended = bool(measured) and hooks.judge(now(), measured)
            last = stopping or ended or done == steps
            if last:
                window.read()
            if (last or done % run.save_every == 0) and not window.skipped:
                hooks.save(now(), [measure.prefix for measure in owed])
            if stopping and done < steps:
                raise _stopped(done, hooks, stop)
        if ended:
            break
    return times_of_steps(window.seconds)


def _measured(
    due: Sequence[PeriodicMeasure], now: Callable[[], State], done: int, log: Log
) -> tuple[dict[str, float], Sequence[PeriodicMeasure]]:
    """Returns the measurements, by prefixed name, and the measures that a signal cut off."""
    measured: dict[str, float] = {}
    for index, measure in enumerate(due):
        scores = measure.take(now())
        if scores is None:
            return measured, due[index:]
        if scores:
            named = {
                measure.prefix + name: value for name, value in broadcast_values(scores).items()
            }
            log.add({"step": done, **named})
            measured |= named
    return measured, ()


def _stopped(done: int, hooks: Hooks, stop: Stop) -> Stopped:
    """Returns the end of a run by a signal, once its last step is saved."""
    hooks.settle()
    return Stopped(f"stopped after step {done}. {hooks.resume_hint}", stop.code)


def _diverged(
    step: int, metrics: Mapping[str, Any], n: int, rows: str, lost: str | None
) -> Diverged:
    if lost is not None:
        return Diverged(
            lambda option: (
                f"{option('max_skipped', n)}: so many steps in a row were skipped, as they had "
                f"nothing to learn from. The last is step {step}, {rows}: {lost}. Put it right, "
                f"and begin again; {option('resume', True)} goes on from the last checkpoint, if "
                "there is one"
            )
        )
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
