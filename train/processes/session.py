"""Ends a script early: with one paragraph, an exit code, and no process left behind.

Python handles signals between its own instructions, so none during a compilation of minutes. A
thread therefore listens for them, too, and ends the process if the main thread does not. If one of
many processes ends, all others end with it, whatever they wait for.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import jax
from rich.console import Console

from lora_jax.buckets.copies import shown
from lora_jax.training.errors import Interrupted, TrainingError
from lora_jax.training.run.stop import Stop
from train.console.errors import BAD_INPUT, file_problem, flag
from train.console.output import tell
from train.console.pipe import closed_pipe
from train.processes.hosts import Processes, jax_timeout
from train.processes.peers import Ending, Peers, connect

_PATIENCE = 5.0  # seconds for the main thread to end by itself
_OTHERS = 8.0  # seconds that process 0 waits for the others to end
_FAILED = 1


class Session:
    """Ends the script, and with it all processes of its run.

    Attributes:
      stop: tells of signals.
      release: is closed in the end, also before an exit that skips Python's clean-up.
      began, began_at: when the script, or its part, began: by `time.monotonic` and `time.time`.
    """

    def __init__(self, began: float | None = None) -> None:
        """Begins a session.

        Args:
          began: when the script began, by `time.monotonic`. Without it, the script begins now.
        """
        self.stop = Stop()
        self.release = contextlib.ExitStack()
        now = time.monotonic()
        self.began = now if began is None else began
        self.began_at = time.time() - (now - self.began)
        self._peers: Peers | None = None
        self._claim = threading.Lock()  # held by the thread that ends the process
        self._verdict: tuple[str, int] | None = None  # what another process said, and the exit code
        self._told = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within this context, user errors and signals end this process and all others."""
        try:
            with self._watched(), self.stop.listening(), closed_pipe():
                yield
        except TrainingError as error:
            text = error.said(flag)
            self._end(f"error: {text}", BAD_INPUT, why=f"ended with an error: {text}")
        except Interrupted as error:
            self._end(str(error), error.code, why=f"got {self.stop.name}")
        except SystemExit as error:
            if self._peers is None or not error.code:
                raise
            # The others would wait for it in the next collective.
            self._end("", _FAILED, why="ended, as it does where the reader of its output is gone")
        except Exception as error:
            if problem := file_problem(error):
                why = "cannot read or write a file"
                self._end(f"error: {problem}. {self.stop.remedy}", BAD_INPUT, why=why)
            if self._peers is None:
                raise
            # The death of another process may fail a collective here before it is told.
            self._told.wait(3.0)
            if self._verdict is not None:
                self._end(*self._verdict)
            text = traceback.format_exc()
            self._end(text, _FAILED, why=f"ended with {text.strip().splitlines()[-1]}")
        finally:
            self.release.close()
            if self._peers is not None:
                self._peers.close()

    @contextmanager
    def part(self) -> Iterator[None]:
        """Within this context, a run has a time of its own, and what it holds is released."""
        outer = self.release, self.began, self.began_at
        self.release = contextlib.ExitStack()
        self.began, self.began_at = time.monotonic(), time.time()
        try:
            with self.release:
                yield
        finally:
            self.release, self.began, self.began_at = outer

    def join(self, console: Console, run: Processes) -> None:
        """Connects the processes of a run, so that all of them end if one does."""
        if jax.process_count() == 1:
            return
        peers = connect(run.coordinator, self._hear, run.heartbeat_timeout)
        if isinstance(peers, Peers):
            self._peers = peers
        else:
            tell(
                console,
                f"warning: {peers}: if a process ends early, the others end only once JAX misses "
                f"its heartbeats, after {jax_timeout(run)} seconds. To end at once, allow "
                "connections between the hosts on all ports",
            )

    def _hear(self, ending: Ending) -> None:
        """Ends this process with another one, or because the others have ended without it."""
        process, why, code, unannounced, deferred = ending
        if deferred:
            return self.stop.hear(code - 128)
        self._verdict = (
            f"process {process} of {jax.process_count()} {why}. {self.stop.remedy}",
            code,
        )
        self._told.set()
        if not unannounced:
            time.sleep(_PATIENCE)  # the main thread may end by itself
        # JAX, too, ends a process that has lost process 0 or its own place, with less to say.
        in_haste = unannounced and process in (0, jax.process_index())
        self._end_at_once(*self._verdict, in_haste=in_haste)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Hears of signals in a thread while the main thread may be busy outside Python."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(end is ours)
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(ours,), name="signals", daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            theirs.close()

    def _watch(self, signals: socket.socket) -> None:
        with signals:
            came = False
            while received := signals.recv(1):
                number = received[0]
                if number not in (signal.SIGINT, signal.SIGTERM):
                    continue
                again, came = came, True
                name, deferred = signal.Signals(number).name, self.stop.deferring and not again
                if self._peers is not None:
                    self._peers.tell(f"got {name}", 128 + number, deferred=deferred)
                if deferred:
                    continue
                time.sleep(_PATIENCE)
                self._end_at_once(f"interrupted by {name}. {self.stop.remedy}", 128 + number)

    def _end_at_once(self, message: str, code: int, in_haste: bool = False) -> None:
        """Ends the process from another thread than the main one, unless it ends already.

        Args:
          message: the paragraph for the user.
          code: the exit code.
          in_haste: leaves what is held to the system, which releases it with the process.
        """
        if self._claim.acquire(blocking=False):
            if in_haste:  # writing lets the main thread run, by default for 5 ms
                sys.setswitchinterval(1e-5)
            self._say(message)
            if in_haste:
                os._exit(code)
            self._leave(code)

    def _end(self, message: str, code: int, why: str | None = None) -> NoReturn:
        """Ends the process from the main thread.

        Args:
          message: the paragraph for the user.
          code: the exit code.
          why: the reason to tell the other processes; None if they know it.
        """
        if not self._claim.acquire(blocking=False):
            threading.Event().wait()  # another thread is ending the process
        self._say(message)
        if self._peers is None:
            sys.exit(code)
        if why is not None:
            self._peers.tell(why, code)
        self._leave(code)

    def _say(self, message: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            if message:
                print(f"\n{shown(message.rstrip())}", file=sys.stderr, flush=True)
            sys.stdout.flush()

    def _leave(self, code: int) -> NoReturn:
        """Exits without Python's clean-up, in which JAX would wait for the other processes."""
        with contextlib.suppress(Exception):
            self.release.close()
        if self._peers is not None:
            self._peers.wait_for_the_others(_OTHERS)
        os._exit(code)
