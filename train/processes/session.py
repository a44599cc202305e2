"""Ends a script early with one paragraph and an exit code, and ends all its processes.

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

from lora_jax.buckets.copies import replace_copy_paths
from lora_jax.training.errors import Interrupted, TrainingError
from lora_jax.training.run.stop import Stop
from train.console.errors import BAD_INPUT, file_problem, flag
from train.console.output import tell
from train.console.pipe import closed_pipe
from train.processes.hosts import Processes, jax_timeout
from train.processes.peers import Ending, Peers, connect

_PATIENCE_SECONDS = 5.0  # seconds for the main thread to end by itself
_OTHERS_SECONDS = 8.0  # seconds that process 0 waits for the others to end
_FAILURE_CODE = 1


class Session:
    """The execution of a script, which can end the script with all processes of its run.

    Attributes:
      stop: tells of signals.
      release: is closed in the end, also before an exit that skips Python's clean-up.
      began, began_at: when the script, or its part, began: by `time.monotonic` and `time.time`.
    """

    def __init__(self, began: float | None = None) -> None:
        """Creates a session with its start time.

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
        self._has_verdict = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Handles user errors and signals in this context: both end all processes."""
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
            why = "ended, because nobody reads its output any more"
            self._end("", _FAILURE_CODE, why=why)
        except Exception as error:
            problem = file_problem(error)
            if problem:
                why = "cannot read or write a file"
                self._end(f"error: {problem}. {self.stop.remedy}", BAD_INPUT, why=why)
            if self._peers is None:
                raise
            # The death of another process may fail a collective here before it is told.
            self._has_verdict.wait(3.0)
            if self._verdict is not None:
                message, code = self._verdict
                self._end(message, code)
            text = traceback.format_exc()
            last_line = text.strip().splitlines()[-1]
            self._end(text, _FAILURE_CODE, why=f"ended with {last_line}")
        finally:
            self.release.close()
            if self._peers is not None:
                self._peers.close()

    @contextmanager
    def part(self) -> Iterator[None]:
        """Gives a part of the script its own start time, and releases its resources at the end."""
        session_release = self.release
        session_began = self.began
        session_began_at = self.began_at
        self.release = contextlib.ExitStack()
        self.began = time.monotonic()
        self.began_at = time.time()
        try:
            with self.release:
                yield
        finally:
            self.release = session_release
            self.began = session_began
            self.began_at = session_began_at

    def join(self, console: Console, run: Processes) -> None:
        """Connects the processes of a run, so that all of them end when one does."""
        if jax.process_count() == 1:
            return
        peers = connect(run.coordinator, self._end_with_peer, run.heartbeat_timeout)
        if isinstance(peers, Peers):
            self._peers = peers
        else:
            tell(
                console,
                f"warning: {peers}. If a process ends early, the others end only after "
                f"{jax_timeout(run)} seconds, when JAX misses its heartbeats. To end them at once, "
                "allow connections between the hosts on all ports.",
            )

    def _end_with_peer(self, ending: Ending) -> None:
        """Ends this process because another one has ended."""
        if ending.deferred:
            self.stop.hear(ending.code - 128)
            return
        n_processes = jax.process_count()
        message = f"process {ending.process} of {n_processes} {ending.why}. {self.stop.remedy}"
        self._verdict = (message, ending.code)
        self._has_verdict.set()
        if not ending.unannounced:
            time.sleep(_PATIENCE_SECONDS)  # the main thread may end by itself
        # JAX, too, ends a process that has lost process 0 or its own place, with less to say.
        in_haste = ending.unannounced and ending.process in (0, jax.process_index())
        self._end_at_once(message, ending.code, in_haste=in_haste)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Watches for signals in a thread while the main thread runs in this context."""
        read_end, write_end = socket.socketpair()
        read_end.setblocking(True)
        write_end.setblocking(False)
        earlier_fd = signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read_end,), name="signals", daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(earlier_fd)
            write_end.close()

    def _watch(self, signals: socket.socket) -> None:
        """Tells the other processes of each signal, and ends this one unless the run defers it.

        Args:
          signals: the socket to which Python writes the number of each signal.
        """
        with signals:
            is_first_signal = True
            for received in iter(lambda: signals.recv(1), b""):
                number = received[0]
                if number not in (signal.SIGINT, signal.SIGTERM):
                    continue
                is_deferred = self.stop.deferring and is_first_signal
                is_first_signal = False
                name = signal.Signals(number).name
                if self._peers is not None:
                    self._peers.tell(f"got {name}", 128 + number, deferred=is_deferred)
                if is_deferred:
                    continue
                time.sleep(_PATIENCE_SECONDS)
                self._end_at_once(f"Interrupted by {name}. {self.stop.remedy}", 128 + number)

    def _end_at_once(self, message: str, code: int, in_haste: bool = False) -> None:
        """Ends the process from any thread except the main one, unless it is ending already.

        Args:
          message: the paragraph for the user.
          code: the exit code.
          in_haste: leaves what is held to the system, which releases it with the process.
        """
        ends_already = not self._claim.acquire(blocking=False)
        if ends_already:
            return
        if in_haste:  # writing lets the main thread run, by default for 5 ms
            sys.setswitchinterval(1e-5)
        self._print_message(message)
        if in_haste:
            os._exit(code)
        self._exit_process(code)

    def _end(self, message: str, code: int, why: str | None = None) -> NoReturn:
        """Ends the process from the main thread.

        Args:
          message: the paragraph for the user.
          code: the exit code.
          why: the reason to tell the other processes; None if they know it.
        """
        if not self._claim.acquire(blocking=False):
            threading.Event().wait()  # another thread is ending the process
        self._print_message(message)
        if self._peers is None:
            sys.exit(code)
        if why is not None:
            self._peers.tell(why, code)
        self._exit_process(code)

    def _print_message(self, message: str) -> None:
        """Prints the last message, and ignores errors of closed outputs."""
        with contextlib.suppress(OSError, ValueError):
            if message:
                print(f"\n{replace_copy_paths(message.rstrip())}", file=sys.stderr, flush=True)
            sys.stdout.flush()

    def _exit_process(self, code: int) -> NoReturn:
        """Exits without Python's cleanup, in which JAX would wait for the other processes."""
        with contextlib.suppress(Exception):
            self.release.close()
        if self._peers is not None:
            self._peers.wait_for_the_others(_OTHERS_SECONDS)
        os._exit(code)
