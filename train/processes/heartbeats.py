"""Signs of life of other processes: which of them has been silent for too long."""

import threading
import time
from collections.abc import Iterable
from typing import NamedTuple

_PER_TIMEOUT, _SLOWEST = 8, 1.0  # heartbeats within a timeout; most seconds between two


class Silence(NamedTuple):
    """A process's silence: for how many seconds, and since which second of the epoch."""

    seconds: float
    since: float


class Heartbeats:
    """Counts for how long each process has been silent.

    Time in which this process stood still itself (it was suspended with all others, say) does not
    count: what the others sent in the meantime is read only afterwards.

    Attributes:
      every: seconds between two heartbeats.
    """

    def __init__(self, processes: Iterable[int], timeout: float) -> None:
        """Begins with a sign of life of each process."""
        self.every = min(timeout / _PER_TIMEOUT, _SLOWEST)
        self._timeout = timeout
        self._lock = threading.Lock()
        self._silences = dict.fromkeys(processes, Silence(0.0, time.time()))

    def heard(self, process: int) -> None:
        """Notes a sign of life."""
        with self._lock:
            if process in self._silences:
                self._silences[process] = Silence(0.0, time.time())

    def forget(self, process: int) -> None:
        """Stops counting for a process, which has ended."""
        with self._lock:
            self._silences.pop(process, None)

    def count(self, seconds: float) -> dict[int, Silence]:
        """Adds time since the last count; returns the silences that are now too long, once each.

        Args:
          seconds: the time; of a longer one than two heartbeats, this process missed the rest.
        """
        with self._lock:
            for process, silence in self._silences.items():
                longer = silence.seconds + min(seconds, 2 * self.every)
                self._silences[process] = silence._replace(seconds=longer)
            late = {p: s for p, s in self._silences.items() if s.seconds >= self._timeout}
            for process in late:
                del self._silences[process]
        return late
