"""Ctrl-C and SIGTERM: at once where there is nothing to save, else after the step in progress."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lora_jax.training.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Knows whether the run was asked to stop; an interruption at once says `message`."""

    def __init__(self) -> None:
        self.message = "interrupted before training began; there is nothing to save"
        self.signal: int | None = None
        self._deferred = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals within, by raising `Interrupted`."""
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defers the first signal within, which only sets `signal`; the second one raises."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Raises `Interrupted` where a signal came while it was deferred."""
        if self.signal is not None:
            raise Interrupted(self.message, self.code)

    @property
    def code(self) -> int:
        """Returns the exit code that shells give for the signal."""
        return 128 + (self.signal or signal.SIGINT)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = self.signal is not None, number
        if again or not self._deferred:
            raise Interrupted(self.message, self.code)
