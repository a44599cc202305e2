"""Pools of programs that answer a line with a line, each in its own process with a time limit."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence


class NoAnswer(Exception):
    """The error for a program that took too long (`late`) or whose process ended."""

    def __init__(self, late: bool, code: int) -> None:
        super().__init__("took too long" if late else f"its process ended (exit code {code})")
        self.late = late


class ProgramPool:
    """Several copies of a program that answers lines. Each copy is started when it is needed.

    One that does not answer in time, or ends, is replaced. A program should end when its input
    does, so that it ends with this process however that ends. Ctrl-C does not reach it. What it
    starts is ended with it. Several threads may ask, each a copy of its own while it does.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        copies: int = 1,
        quiet: bool = False,
        greeting_seconds: float = 0.0,
    ) -> None:
        """Creates a pool without processes.

        Args:
          command: the program and its arguments.
          env: its environment.
          copies: the most copies that run at once.
          quiet: drop what it writes to stderr.
          greeting_seconds: how long it may take for the line that it says once it is ready; 0 if
            it says none.
        """
        self._copies = [_Copy(command, env, quiet, greeting_seconds) for _ in range(copies)]
        self._idle: queue.LifoQueue[_Copy] = queue.LifoQueue()
        for copy in reversed(self._copies):
            self._idle.put(copy)

    def start(self) -> str:
        """Starts the first copy again; returns its greeting, or "" if it has none.

        Raises:
          NoAnswer: it did not say it in time, or its process ended.
        """
        return self._copies[0].start()

    def ask(self, line: str, seconds: float) -> str:
        """Returns the answer to a line. Both are ASCII without line ends.

        Raises:
          NoAnswer: the program did not answer in time, or its process ended.
        """
        copy = self._idle.get()
        try:
            return copy.ask(line, seconds)
        finally:
            self._idle.put(copy)

    def close(self) -> None:
        """Ends the processes. The next line starts a new one."""
        for copy in self._copies:
            copy.close()


class _Copy:
    """One copy of the program with its process; see `ProgramPool`."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], quiet: bool, greeting_seconds: float
    ) -> None:
        self._command = command
        self._env = env
        self._greeting_seconds = greeting_seconds
        self._stderr = subprocess.DEVNULL if quiet else None
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> str:
        """Starts the process again; returns its greeting, or "" if it has none."""
        self.close()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            encoding="ascii",
            env=self._env,
            start_new_session=True,
        )
        if self._greeting_seconds == 0:
            return ""
        return self._answer("", self._greeting_seconds)

    def ask(self, line: str, seconds: float) -> str:
        if self._process is None or self._process.poll() is not None:
            self.start()
        return self._answer(f"{line}\n", seconds)

    def close(self) -> None:
        """Ends the process, and closes its pipes."""
        process = self._process
        self._process = None
        if process is None:
            return
        _kill_process_group(process)
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):  # what was not yet sent is lost
                stream.close()

    def _answer(self, text: str, seconds: float) -> str:
        """Sends a text and returns the line that answers it; ends the process after `seconds`."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            _kill_process_group(process)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(OSError):  # then there is no answer, either
                process.stdin.write(text)
                process.stdin.flush()
            answer = process.stdout.readline()
            if not answer.endswith("\n"):
                raise NoAnswer(is_late.is_set(), process.wait())
            return answer[:-1]
        except BaseException:  # such as Ctrl-C: the answer must not become the next line's
            self.close()
            raise
        finally:
            timer.cancel()


def _kill_process_group(process: subprocess.Popen[str]) -> None:
    """Kills a process and, except on Windows, its child processes."""
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it ended
            os.killpg(process.pid, signal.SIGKILL)
