"""Stops a run on Ctrl-C or SIGTERM: immediately if nothing needs saving, else after the step."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

from lora_jax.training.errors import Interrupted
from lora_jax.training.processes import Agreement

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Has the main thread look for what another process said; by default it does nothing.
_LOOK = getattr(signal, "SIGURG", None)
_AGAIN = 0.05  # seconds until a signal whose exception Python dropped comes again


class Stop:
    """Records signals that ask the run to stop, and decides when it stops.

    Attributes:
      remedy: tells an interrupted user how to go on, at this point of the run.
      signal: the number of the signal that came; None for none.
      deferring: whether a first signal waits for the end of the step.
      raising: whether one raises nevertheless, within work that is dropped.
    """

    def __init__(self) -> None:
        self.remedy = "Training had not begun, and nothing was lost: run the same command again"
        self.signal: int | None = None
        self.deferring = self.raising = False
        self._came = False  # whether a signal came to this process
        self._elsewhere: int | None = None  # the signal of another process
        self._timer: threading.Timer | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles signals within a block, by raising `Interrupted`.

        Python drops an exception that is raised in a destructor or while garbage is collected (JAX
        has a callback there); such a signal comes again a moment later.
        """
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        if _LOOK is not None:
            before[_LOOK] = signal.signal(_LOOK, lambda *_: self._look())
        hook = sys.unraisablehook
        sys.unraisablehook = partial(self._send_again, hook)
        try:
            yield
        finally:
            sys.unraisablehook = hook
            try:
                self._forget_timer()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defers the first signal in a block to `signal`; a second one raises."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """Raises `Interrupted` for any signal in a block whose work a resumed run repeats.

        For work that the run does again when it goes on. A signal of another process counts, too;
        see `hear`.
        """
        self.raising = True
        try:
            self._look()
            self.check()
            yield
        finally:
            self.raising = False

    def hear(self, number: int) -> None:
        """Records that another process received a signal; see `dropping`."""
        self._elsewhere = number
        main = threading.main_thread().ident
        if self.raising and _LOOK is not None and main is not None:
            signal.pthread_kill(main, _LOOK)

    def agreed(self, agreement: Agreement, turn: Any = ()) -> bool:
        """Returns True if any process received a signal; all processes must call this each turn.

        Args:
          agreement: counts the turns.
          turn: arrays that are ready once the turn is over.
        """
        number = agreement.largest(lambda: self.signal, turn)
        self.signal = self.signal or number
        return number is not None

    def check(self) -> None:
        """Raises `Interrupted` if a deferred signal has arrived."""
        if self.signal is not None:
            raise self.interrupted()

    def interrupted(self) -> Interrupted:
        """Returns the exception for an interruption at this point of the run."""
        return Interrupted(f"interrupted by {self.name}. {self.remedy}", self.code)

    @property
    def code(self) -> int:
        """Returns the exit code that shells use for the signal."""
        return 128 + (self.signal or signal.SIGINT)

    @property
    def name(self) -> str:
        """Returns the name of the signal: "SIGTERM"."""
        return signal.Signals(self.signal or signal.SIGINT).name

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again, self._came, self.signal = self._came, True, number
        if again or not self.deferring or self.raising:
            raise self.interrupted()

    def _look(self) -> None:
        if self.raising and self._elsewhere is not None:
            self.signal = self.signal or self._elsewhere
            raise self.interrupted()

    def _send_again(
        self, report: Callable[["sys.UnraisableHookArgs"], Any], dropped: "sys.UnraisableHookArgs"
    ) -> None:
        """Sends a signal again whose exception Python has dropped."""
        if not isinstance(dropped.exc_value, Interrupted) or self.signal is None:
            report(dropped)
            return
        main, number = threading.main_thread().ident, self.signal
        assert main is not None
        if not self.deferring or self.raising:
            self.signal, self._came = None, False  # it still is the first one
        self._forget_timer()
        self._timer = threading.Timer(_AGAIN, signal.pthread_kill, (main, number))
        self._timer.daemon = True
        self._timer.start()

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
