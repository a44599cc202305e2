"""Processes that begin with what all scripts import: forks of one that has imported it.

A process of Python's own spends seconds on imports, of which a test that kills a run a dozen times
has a dozen. Forks share them: each is still a process, with its own devices, exit code and signals.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

_IMPORTED = (
    *("train.finetune", "train.live.rollouts", "datasets", "orbax.checkpoint"),
    *(
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "transformers.models.auto.tokenization_auto",
    ),
)
_POLL = 0.02  # seconds
_asking = threading.Lock()  # a thread kills what another waits for


class Forked:
    """A process that runs what the words would after `python`; it writes to files.

    Attributes:
      pid: Number of the process.
      out, err: Files of what it prints.
      returncode: Its exit code, negative for a signal; None while it runs.
    """

    def __init__(
        self,
        words: Sequence[object],
        folder: Path,
        env: dict[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        """Starts it.

        Args:
          words: As of Python: a file, "-m" and a module, or "-c" and code, with arguments.
          folder: Where it runs, and where its files are.
          env: Adds to the environment.
          log: Its one file, to append to.
        """
        place = folder / f"fork-{time.monotonic_ns()}"
        self.out, self.err = log or Path(f"{place}.out"), log or Path(f"{place}.err")
        for file in (self.out, self.err):
            file.touch()  # it may be read at once
        asked = {"words": [*map(str, words)], "cwd": str(folder), "env": env or {}}
        asked |= {"out": str(self.out), "err": str(self.err)}
        self.pid = _ask(asked)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Returns the exit code; None while it runs."""
        if self.returncode is None:
            self.returncode = _ask({"ended": self.pid})
        return self.returncode

    def wait(self, timeout: float = 600.0) -> int:
        """Returns the exit code, once it ends."""
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.out), timeout)
            time.sleep(_POLL)
        return code

    def communicate(self, timeout: float = 600.0) -> tuple[str, str]:
        """Waits for its end; returns what it printed, and its errors."""
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Asks it to end."""
        self.send_signal(signal.SIGTERM)


@cache
def _server() -> subprocess.Popen[str]:
    """Returns the process that forks for this one; it ends with it."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.train.forks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    atexit.register(lambda: (server.kill(), server.communicate()))
    return server


def _ask(request: dict[str, Any]) -> Any:
    with _asking:
        server = _server()
        assert server.stdin and server.stdout
        server.stdin.write(f"{json.dumps(request)}\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())


def _serve() -> dict[str, Any]:
    """Answers requests until there are no more; returns in each fork, what it is to run."""
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if (pid := request.get("ended")) is not None:
            if pid not in ended and (waited := os.waitpid(pid, os.WNOHANG))[0]:
                ended[pid] = os.waitstatus_to_exitcode(waited[1])
            print(json.dumps(ended.get(pid)), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            return request
    os._exit(0)


def _become(request: dict[str, Any]) -> None:
    """Turns this process into the one that was asked for, and runs its words."""
    import jax

    for number, name in enumerate((os.devnull, request["out"], request["err"])):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # what is said is there, however it ends
    os.environ.update(request["env"])
    for name, value in request["env"].items():
        if name.startswith("JAX_"):  # was read when JAX was imported
            read = {"true": True, "false": False}.get(value, value)
            jax.config.update(name.lower(), int(value) if value.isdecimal() else read)
    os.chdir(request["cwd"])
    first, *rest = request["words"]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    import importlib

    from tests.surroundings import hide_torch

    hide_torch()
    for module in _IMPORTED:
        importlib.import_module(module)
    _become(_serve())
