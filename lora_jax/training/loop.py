"""The training loop: runs the compiled step over batches, with logs, measurements and checkpoints.

A measure computes numbers of the model, such as the held-out loss, every so many steps. A step owes
a measure that was due after it and that a signal cut off. An unread step was begun, but its metrics
are still on the device.
"""

import dataclasses
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lora_jax.core.types import Tree
from lora_jax.training.clock import StepClock, StepTimes, quartiles_of_seconds
from lora_jax.training.errors import Diverged, Dropped, Interrupted, TrainingError
from lora_jax.training.losses import Reduction
from lora_jax.training.processes import Agreement, broadcast_values
from lora_jax.training.run.log import NO_TOKENS, Log, window_line
from lora_jax.training.run.stop import Stop
from lora_jax.training.step import State, Step

_SLOW_STEP_SECONDS = 0.5  # above it, running ahead of the device gains nothing

# Yields the number of a step to take, from 0; is sent its metrics and its number of tokens. Returns
# the seconds of a step (None where none was taken).
Turns = Generator[int, tuple[Mapping[str, Any], int], StepTimes | None]


class Stopped(Interrupted):
    """A signal stopped a run after a step that has been saved."""


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
    """A measurement at regular intervals of steps and at the end of training.

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
        if not self.every:
            return False
        return done % self.every == 0 or done == steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """Connects the loop with its data, folder and user.

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
      timed: receives the seconds of all steps that were measured so far, whenever a line is logged.
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
    timed: Callable[[Sequence[float]], None] = lambda seconds: None
    judge: Callable[[State, dict[str, float]], bool] = lambda state, measured: False


class _RunningStep(NamedTuple):
    """A step that the device may still be computing.

    Attributes:
      metrics: metrics of the step, on the device.
      tokens: number of tokens of its batch.
      compile_seconds: seconds of compilation that the clock had counted when the step began.
    """

    metrics: Mapping[str, Any]
    tokens: int
    compile_seconds: float


class _UnreadStep(NamedTuple):
    """A step whose metrics have not been read yet.

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
    """Holds the steps with unread metrics, because reading metrics waits for the device.

    Attributes:
      seconds: seconds of each finished step. A step during which the host compiled the next one is
        missing, because its seconds are not known.
      skipped: number of steps skipped in a row, up to the last that was read. Steps without a
        counted token are ignored.
    """

    def __init__(self, run: Pace, hooks: Hooks, log: Log, clock: StepClock) -> None:
        self.seconds: list[float] = []
        self.skipped = 0
        self._run, self._hooks, self._log, self._clock = run, hooks, log, clock
        self._unread_steps: list[_UnreadStep] = []
        self._running_steps: list[_RunningStep] = []
        self._last_end = clock.now()
        # Tokens and seconds of the unread steps that `seconds` has.
        self._tokens = 0
        self._token_seconds = 0.0

    def add(self, step: _UnreadStep, tokens: int) -> None:
        """Adds a started step, with the number of tokens in its batch."""
        self._unread_steps.append(step)
        running_step = _RunningStep(step.metrics, tokens, self._clock.compile_seconds)
        self._running_steps.append(running_step)

    def wait(self, *, max_running: int) -> None:
        """Waits until at most `max_running` steps run, and records the others' seconds."""
        while len(self._running_steps) > max_running:
            step = self._running_steps.pop(0)
            jax.block_until_ready(step.metrics)
            end = self._clock.now()
            if step.compile_seconds == self._clock.compile_seconds:
                self.seconds.append(end - self._last_end)
                self._token_seconds += end - self._last_end
                self._tokens += step.tokens
            self._last_end = end

    def read(self) -> None:
        """Logs the mean of the successful steps as one line, and each skipped step.

        Raises:
          Diverged: too many in a row were skipped.
        """
        if not self._unread_steps:
            return
        step_metrics = []
        batch_metrics = []
        for step in self._unread_steps:
            metrics = {name: float(value) for name, value in step.metrics.items()}
            if self._is_skipped(step, metrics):
                continue
            step_metrics.append(metrics)
            batch_metrics.append(step.batch_metrics)
        if step_metrics:
            tokens_per_s = self._tokens / self._token_seconds if self._token_seconds else None
            line = window_line(step_metrics, batch_metrics, tokens_per_s, self._hooks.reduction)
            self._log.add({"step": self._unread_steps[-1].done, **line})
        self._unread_steps = []
        self._tokens = 0
        self._token_seconds = 0.0

    def _is_skipped(self, step: _UnreadStep, metrics: Mapping[str, float]) -> bool:
        """Returns True for a skipped step, which it logs and counts.

        Raises:
          Diverged: too many in a row were skipped.
        """
        if not metrics["skipped"]:
            self.skipped = 0
            return False
        if metrics["count"] == 0 and step.lost is None:  # no error: the batch had no counted token
            self._log.skipped(step.done, {**metrics, "lost": NO_TOKENS})
            return True
        self.skipped += 1
        reason = {} if step.lost is None else {"lost": step.lost}
        self._log.skipped(step.done, {**metrics, **reason})
        if self.skipped == self._run.max_skipped:
            rows = self._hooks.rows(step.done - 1)
            raise _make_diverged(step, metrics, self._run.max_skipped, rows)
        return True


def train(
    step: Step, state: State, base: Tree, steps: int, run: Pace, hooks: Hooks, log: Log, stop: Stop
) -> tuple[State, StepTimes | None]:
    """Trains from `state` to step `steps`, or until `hooks.judge` ends training.

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
    with StepClock() as clock, stop.deferred():
        turns = training_steps(lambda: state, steps, run, hooks, log, stop, clock)
        try:
            number = next(turns)
            while True:
                try:
                    batch = hooks.batch(number, state)
                except Dropped as dropped:
                    turns.throw(dropped)  # it saves, and raises Stopped
                n_tokens = hooks.tokens(batch)
                state, metrics = step(state, base, hooks.placed(batch))
                number = turns.send((metrics, n_tokens))
        except StopIteration as end:
            return state, end.value


def training_steps(
    current_state: Callable[[], State],
    steps: int,
    run: Pace,
    hooks: Hooks,
    log: Log,
    stop: Stop,
    clock: StepClock,
) -> Turns:
    """Yields each step's index and receives its metrics; the caller runs the steps.

    The caller, called the driver, takes the steps. A driver of several runs takes one step of each
    in turn.

    Args:
      current_state: returns the state after the steps so far. It is called only where the state is
        needed: before the first step, and to measure, judge and save.
      steps, run, hooks, log, stop: see `train`. The driver itself calls `batch`, `tokens` and
        `placed` of `hooks`, and defers signals.
      clock: measures the seconds of steps; runs of one driver share it.

    Yields:
      The index of the step to take. A driver that got no batch because of a signal throws
      `Dropped`: the completed steps are saved.

    Returns:
      The seconds of a step (None where none was taken).

    Raises:
      Stopped, Diverged: see `train`.
    """
    agreement = Agreement()
    with clock.paused():
        state = current_state()
        first_step = int(state.step)
        owed: Sequence[PeriodicMeasure] = [m for m in hooks.measures if m.prefix in hooks.owed]
        scores, owed = _take_measures(owed, current_state, first_step, log)
        if owed and first_step < steps:  # the checkpoint names them already
            raise _make_stopped(first_step, hooks, stop)
        if hooks.judge(state, scores):
            return None
        del state  # the driver may donate it
    window = _Window(run, hooks, log, clock)
    turn_start = time.monotonic()
    turn_seconds = 0.0
    for number in range(first_step, steps):
        try:
            metrics, n_tokens = yield number
        except Dropped as dropped:  # a resumed run makes the same batch again
            window.wait(max_running=0)
            window.read()
            if number > first_step and number % run.save_every and not window.skipped:
                hooks.save(current_state(), ())
            stopped = _make_stopped(number, hooks, stop)
            if dropped.args:  # an error, and no signal
                raise TrainingError(f"{dropped}. The run {stopped}") from None
            raise stopped from None
        done = number + 1
        lost = hooks.lost(number)
        step = _UnreadStep(
            done=done, metrics=metrics, batch_metrics={**hooks.metrics(number)}, lost=lost
        )
        window.add(step, n_tokens)
        # The host runs ahead of the device by one step, and of a slow one not at all: a signal then
        # waits for the step in progress alone.
        window.wait(max_running=0 if turn_seconds > _SLOW_STEP_SECONDS else 1)
        turn_end = time.monotonic()
        turn_seconds = turn_end - turn_start
        turn_start = turn_end
        is_stopping = stop.agreed(agreement, metrics)
        line_is_due = done % run.log_every == 0 or done % run.save_every == 0
        read_is_due = is_stopping or done == steps or line_is_due or lost is not None
        due = [measure for measure in hooks.measures if measure.is_due(done, steps)]
        if not read_is_due and not due:
            continue
        window.wait(max_running=0)
        with clock.paused():
            if read_is_due:
                window.read()
                hooks.timed(window.seconds)
            if is_stopping and done < steps:
                scores, owed = {}, due
            else:
                scores, owed = _take_measures(due, current_state, done, log)
            is_stopping = is_stopping or bool(owed)
            is_ended_by_judge = bool(scores) and hooks.judge(current_state(), scores)
            is_last = is_stopping or is_ended_by_judge or done == steps
            if is_last:
                window.read()
            if (is_last or done % run.save_every == 0) and not window.skipped:
                hooks.save(current_state(), [measure.prefix for measure in owed])
            if is_stopping and done < steps:
                raise _make_stopped(done, hooks, stop)
        if is_ended_by_judge:
            break
    return quartiles_of_seconds(window.seconds)


def _take_measures(
    due: Sequence[PeriodicMeasure], current_state: Callable[[], State], done: int, log: Log
) -> tuple[dict[str, float], Sequence[PeriodicMeasure]]:
    """Returns the measured scores by prefixed name, and the interrupted measurements."""
    scores: dict[str, float] = {}
    for index, measure in enumerate(due):
        measurements = measure.take(current_state())
        if measurements is None:  # a signal came
            return scores, due[index:]
        if not measurements:
            continue
        prefixed = {
            measure.prefix + name: value for name, value in broadcast_values(measurements).items()
        }
        log.add({"step": done, **prefixed})
        scores |= prefixed
    return scores, ()


def _make_stopped(done: int, hooks: Hooks, stop: Stop) -> Stopped:
    """Returns the exception that ends a run after a signal, once its last step is saved."""
    hooks.settle()
    return Stopped(f"stopped after step {done}. {hooks.resume_hint}", stop.code)


def _make_diverged(
    step: _UnreadStep, metrics: Mapping[str, float], max_skipped: int, rows: str
) -> Diverged:
    """Returns the exception that ends a run after too many consecutive skipped steps.

    Args:
      step: the last of them.
      metrics: its metrics, read.
      max_skipped: the number of skipped steps in a row.
      rows: names the rows of its batch.
    """
    if step.lost is not None:
        return Diverged(
            lambda option: (
                f"{option('max_skipped', max_skipped)}: {max_skipped} steps in a row were skipped, "
                f"because they had nothing to learn from. The last is step {step.done}, {rows}: "
                f"{step.lost}. Correct this, and start again. {option('resume', True)} continues "
                "from the last checkpoint, if there is one."
            )
        )
    return Diverged(
        lambda option: (
            f"{option('max_skipped', max_skipped)}: {max_skipped} steps in a row were skipped, "
            "because their loss, its count or its gradient was not finite. The last is step "
            f"{step.done}: its loss is {metrics['loss']}, its count {metrics['count']}, its "
            f"gradient's norm {metrics['grad_norm']}, its batch {rows}. If something is wrong with "
            "these rows, correct them and start again. Otherwise training diverged. Start again "
            f"with a lower {option('lr')} or a longer {option('warmup')}. To continue from the "
            f"last checkpoint past these steps, use {option('resume', True)} with a higher "
            f"{option('max_skipped')}."
        )
    )
