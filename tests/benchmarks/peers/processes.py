"""The contenders' processes: started fresh, asked over pipes, and always ended."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.peers.cases import Case

ROOT = Path(__file__).parents[3]


class Failed(Exception):
    """A contender that raised or ended early; says why, in a line."""


def environment_of(device: str) -> dict[str, str]:
    """Returns the variables of a contender: the same device and cores for all.

    Compiled programs are not kept, so that compilation is measured. On a GPU, JAX takes memory as
    it needs it, since two contenders share the device.
    """
    cores = str(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count())
    variables = {
        "JAX_PLATFORMS": "cpu" if device == "cpu" else "cuda",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "OMP_NUM_THREADS": cores,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    if device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return dict(os.environ) | variables


class Worker:
    """A contender's process. Ends, with all that it started, when the ``with`` block does."""

    def __init__(self, contender: str, device: str) -> None:
        self.log = tempfile.TemporaryFile("w+")
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.peers.worker", contender],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env=environment_of(device),
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the others
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        end(self.process)
        self.log.close()

    def ready(self) -> float:
        """Waits until the contender's imports are done; returns its age then."""
        self._answer()
        return self.age()

    def age(self) -> float:
        """Returns the seconds since the process was started."""
        return time.perf_counter() - self.began

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer.

        Raises:
          Failed: the contender raised an error, or its process ended.
        """
        try:
            print(json.dumps({"do": do} | arguments), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the answer tells why
        return self._answer()

    def load(self, case: Case, folders: Mapping[str, str]) -> dict[str, Any]:
        """Makes the contender load and compile the case's program."""
        return self.ask("load", case=dataclasses.asdict(case), **folders)

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if line:
            answer = json.loads(line)
            if "error" in answer:
                raise Failed(answer["error"])
            return answer
        code = self.process.wait()
        if code == -signal.SIGKILL:
            raise Failed("its process was killed (signal 9), perhaps for want of memory")
        raise Failed(f"its process ended with the code {code}: {self._last_line()}")

    def _last_line(self) -> str:
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()]
        return lines[-1] if lines else "it said nothing"


def end(process: subprocess.Popen[str]) -> None:
    """Kills a process and those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            try:
                stream.close()
            except BrokenPipeError:
                pass


def write_inputs(cases: Sequence[Case], folder: Path) -> None:
    """Writes the cases' models and adapters in a process of its own.

    Raises:
      Failed: gives its last line.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.peers.weights", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment_of("cpu"),
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(json.dumps([dataclasses.asdict(case) for case in cases]))
    finally:
        end(process)
    if process.returncode:
        lines = said.strip().splitlines() or ["it said nothing"]
        raise Failed(f"the weights could not be written: {lines[-1]}")


def time_of_import(module: str, device: str) -> float:
    """Returns the seconds of one import statement in a fresh process."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment_of(device),
        check=False,
    )
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
    return float(done.stdout.splitlines()[-1])
