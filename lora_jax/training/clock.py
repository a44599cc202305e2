"""Measures the seconds of training steps, without pauses for other work."""

import contextlib
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.monitoring

_COMPILE_EVENTS = "/jax/core/compile/"  # the prefix of JAX's events that trace, lower or compile


class StepClock:
    """Counts the seconds of steps, without pauses and compilations.

    It is used in a `with`, in the thread that takes the steps. Runs side by side share a clock, so
    that a measurement of one is no step of another.

    Attributes:
      compile_seconds: seconds of compilations so far, but for those in pauses.
      under_way: arrays of steps that were begun; a pause waits for them first.
    """

    def __init__(self) -> None:
        self.compile_seconds = 0.0
        self.under_way: Any = ()
        self._pause_seconds = 0.0
        self._is_paused = False
        self._compilations: list[tuple[float, float]] = []  # begin and end, in order
        self._thread = threading.get_ident()

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._note_compilation)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note_compilation)

    def now(self) -> float:
        """Returns the seconds of steps since an arbitrary point."""
        return time.perf_counter() - self._pause_seconds - self.compile_seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waits until the running steps end, and stops the clock within a block."""
        jax.block_until_ready(self.under_way)
        pause_start = time.perf_counter()
        self._is_paused = True
        try:
            yield
        finally:
            self._pause_seconds += time.perf_counter() - pause_start
            self._is_paused = False

    def _note_compilation(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Counts a compilation that just ended; nested events count once."""
        is_not_of_steps = self._is_paused or threading.get_ident() != self._thread
        if is_not_of_steps or not event.startswith(_COMPILE_EVENTS):
            return
        end = time.perf_counter()
        begin = end - duration_secs
        # Earlier events that lie within this one are part of it: remove their seconds.
        while self._compilations and self._compilations[-1][1] > begin:
            inner_begin, inner_end = self._compilations.pop()
            self.compile_seconds -= inner_end - inner_begin
            begin = min(begin, inner_begin)
        self._compilations.append((begin, end))
        self.compile_seconds += end - begin


class StepTimes(NamedTuple):
    """Statistics of the seconds of a run's steps.

    Attributes:
      median, low, high: the median, the lower quartile, and the upper quartile.
    """

    median: float
    low: float
    high: float


def quartiles_of_seconds(seconds: Sequence[float]) -> StepTimes | None:
    """Returns the median and quartiles of steps' seconds; None without steps."""
    if not seconds:
        return None
    if len(seconds) == 1:
        return StepTimes(median=seconds[0], low=seconds[0], high=seconds[0])
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return StepTimes(median=median, low=low, high=high)
