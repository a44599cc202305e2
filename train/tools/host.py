"""A user's tools and environments, each episode in a process of its own; see `worker.py`."""

import base64
import contextlib
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lora_jax.training.data.rows import Row, name_of
from train.console.errors import UserError, flag
from train.processes.pool import NoAnswer, ProgramPool
from train.tools import worker
from train.tools.contract import Episode, EpisodeTurn, ToolAnswer, ToolCall

_START_SECONDS = 300.0  # imports transformers and the user's files
_AT_ONCE = 256  # episodes that are waited for at the same time
_MOST_BYTES = 1 << 26  # of an answer, whose text the worker cuts
FAILED = math.inf  # in the place of a reward, as rewards have it


class EpisodeLost(Exception):
    """An episode's process took too long, or ended; the message says which."""


class ProcessHost:
    """Opens episodes, each served by a process that a program forks; see `EpisodeHost`."""

    def __init__(self, environment: str | None, tools: Sequence[str], seconds: float) -> None:
        """Describes the tools; starts no process that stays.

        Args:
          environment: ``file.py:Class``, or None.
          tools: ``file.py:function`` of each.
          seconds: how long `reset`, a call and `get_reward` may take.

        Raises:
          UserError: they cannot be imported or described, or this system cannot fork.
        """
        if not hasattr(os, "fork"):
            raise UserError("--tools and --environment need a system that can fork a process")
        self.seconds, self._environment = seconds, environment
        self._specs = [*tools, *filter(None, [environment])]
        path = os.pathsep.join(dict.fromkeys([*sys.path, os.getcwd()]))
        self._env = {"PYTHONHASHSEED": "0", **os.environ}
        self._env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
        described = self._describe()
        self.tools: list[dict[str, Any]] = described["tools"]
        self.rewards: bool = described["rewards"]
        self.needs: list[str] = described["needs"]
        self.generators: list[str] = described["generators"]
        self.later = frozenset[str](described["later"])  # tools that run after the others of a turn
        self.names = [tool["function"]["name"] for tool in self.tools]
        self.name = environment.rpartition(":")[2] if environment else ""
        self._threads = ThreadPoolExecutor(_AT_ONCE, "tools")
        self._lock, self._open = threading.Lock(), set[ProcessEpisode]()
        self._program: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def open(
        self,
        rows: Sequence[Row],
        seeds: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        *,
        rehearsed: bool = False,
    ) -> "list[Future[Episode]]":
        """Opens an episode for each row; see `EpisodeHost`."""
        names = names or [name_of(row, "the rows", n) for n, row in enumerate(rows, start=1)]
        seeds = seeds or [_seed(row) for row in rows]
        episodes = [ProcessEpisode(self, *each) for each in zip(rows, names, seeds, strict=True)]
        for episode in episodes:
            episode.rehearsed = rehearsed
        with self._lock:
            self._open.update(episodes)
        return [self.run(self._begun, episode) for episode in episodes]

    def run(self, function: Any, *args: Any) -> "Future[Any]":
        """Calls a function in a thread."""
        return self._threads.submit(function, *args)

    def connect(self) -> socket.socket:
        """Returns a socket to a process that is forked for an episode."""
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            for attempt in range(2):
                if self._program is not None and self._program[0].poll() is not None:
                    self._end_program()
                if self._program is None:
                    self._program = self._start()
                try:
                    socket.send_fds(self._program[1], [b"+"], [theirs.fileno()])
                    break
                except OSError:  # a tool has ended the program
                    self._end_program()
                    if attempt:
                        raise
        return ours

    def forget(self, episode: "ProcessEpisode") -> None:
        """Takes notice that an episode was closed."""
        with self._lock:
            self._open.discard(episode)

    def close(self) -> None:
        """Ends the processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for episode in [*self._open]:
            episode.close()
        self._threads.shutdown()
        with self._lock:
            self._end_program()

    def _begun(self, episode: "ProcessEpisode") -> Episode:
        if self._environment is not None:
            episode.begin()
        return episode

    def _command(self, mode: str) -> list[str]:
        number = str(int(self._environment is not None))
        return [sys.executable, "-P", worker.__file__, mode, number, *self._specs]

    def _describe(self) -> dict[str, Any]:
        pool = ProgramPool(self._command("describe"), self._env, greeting_seconds=_START_SECONDS)
        try:
            described: dict[str, Any] = json.loads(pool.start())
        except NoAnswer as error:
            option = "environment" if self._environment else "tools"
            raise UserError(f"{flag(option, self._specs[-1])}: importing it {error}") from error
        finally:
            pool.close()
        if "error" in described:
            option = "environment" if described["spec"] == self._environment else "tools"
            raise UserError(f"{flag(option, described['spec'])}: {described['error']}")
        return described

    def _start(self) -> "tuple[subprocess.Popen[bytes], socket.socket]":
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                self._command("serve"),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=self._env,
                start_new_session=True,
            )
        return process, ours

    def _end_program(self) -> None:
        program, self._program = self._program, None
        if program is not None:
            program[1].close()
            program[0].kill()
            program[0].wait()


class ProcessEpisode:
    """An episode in a process of its own; see `Episode`."""

    def __init__(self, host: ProcessHost, row: Row, name: str, seed: int) -> None:
        """Begins nothing yet; `name` is the row's in messages."""
        self.opening: str | None = None
        self.lost: str | None = None
        self.problem: str | None = None
        self.changed: list[str] = []
        self.rehearsed = False
        self._host, self._row, self._name, self._seed = host, row, name, seed
        self._channel: socket.socket | None = None
        self._process, self._held = 0, b""
        self._lock, self._closed = threading.Lock(), False

    def begin(self) -> None:
        """Starts the process, and resets the environment."""
        try:
            with self._lock:
                self._start()
        except EpisodeLost as error:
            self.lost = str(error)

    def call(self, calls: Sequence[ToolCall]) -> "Future[EpisodeTurn]":
        """Runs the calls of a turn; see `Episode`."""
        return self._host.run(self._call, list(calls))

    def reward(self) -> "Future[float | None]":
        """Returns the environment's own reward; see `Episode`."""
        return self._host.run(self._reward)

    def close(self) -> None:
        """Ends the process, and what it has started."""
        self._closed = True
        self._end()
        self._host.forget(self)

    def _call(self, calls: Sequence[ToolCall]) -> EpisodeTurn:
        answers: list[ToolAnswer | None] = [self._refusal(call) for call in calls]
        runs = [index for index, answer in enumerate(answers) if answer is None]
        left = sorted(runs, key=lambda index: calls[index].name in self._host.later)
        try:
            with self._lock:
                if self.lost is not None:
                    raise EpisodeLost(self.lost)
                if self._channel is None:
                    self._start()
                asked = [(calls[index].name, calls[index].arguments) for index in runs]
                for reply in self._ask({"calls": asked}, len(runs), lambda: calls[left[0]].name):
                    index = runs[reply["index"]]
                    left.remove(index)
                    failed = "error" in reply
                    text = str({"error": reply["error"]}) if failed else reply["value"]
                    answers[index] = _answer(calls[index].name, text, failed=failed)
        except EpisodeLost as error:
            self.lost = str(error)
            return EpisodeTurn((), self.lost)
        return EpisodeTurn(tuple(answer for answer in answers if answer is not None))

    def _refusal(self, call: ToolCall) -> ToolAnswer | None:
        """Returns the answer to a call that cannot be run; None for one that can."""
        problem = call.problem
        if problem is None and call.name not in self._host.names:
            problem = f"Tool {call.name} not found."
        if problem is None:
            return None
        return _answer(call.name or "unknown", str({"error": problem}), failed=True)

    def _reward(self) -> float | None:
        if not self._host.rewards:
            return None
        try:
            with self._lock:
                if self.lost is not None:
                    raise EpisodeLost(self.lost)
                (reply,) = self._ask({"reward": True}, 1, lambda: worker.REWARD)
        except EpisodeLost as error:
            self.problem = str(error)
            return FAILED
        value = reply.get("value", FAILED)
        if value is None or math.isfinite(value):
            return value
        self.problem = f"{self._name}: get_reward: {reply.get('said', value)}"
        return FAILED

    def _start(self) -> None:
        """Has a process forked, and resets the environment in it."""
        if self._closed:
            raise EpisodeLost(f"{self._name}: the episode was closed")
        try:
            self._channel = channel = self._host.connect()
            first = self._line(channel, time.monotonic() + _START_SECONDS)
        except (OSError, EOFError) as error:
            self._end()
            problem = str(error) or "it ended, or did not begin"
            raise EpisodeLost(f"{self._name}: no process for its tools: {problem}") from None
        self._process = json.loads(first)["process"]
        request = {"reset": dict(self._row), "seed": self._seed, "rehearsed": self.rehearsed}
        (reply,) = self._ask(request, 1, lambda: worker.RESET)
        if "error" in reply:
            self._end()
            raise EpisodeLost(f"{self._name}: reset: {reply['said']}")
        self.opening = reply["value"] and _valid(reply["value"])
        self.changed = reply["changed"]

    def _ask(
        self, request: Mapping[str, Any], n: int, name: Callable[[], str]
    ) -> Iterator[dict[str, Any]]:
        """Yields the n answers to a request; `name` returns what is waited for, for messages.

        Raises:
          EpisodeLost: an answer took too long, or the process ended.
        """
        channel, seconds = self._channel, self._host.seconds
        if channel is None or self._closed:
            raise EpisodeLost(self.lost or f"{self._name}: the episode was closed")
        try:
            channel.settimeout(seconds)
            channel.sendall(base64.b64encode(pickle.dumps(request)) + b"\n")
            for _ in range(n):
                yield json.loads(self._line(channel, time.monotonic() + seconds))
            return
        except TimeoutError:
            problem = f"took longer than {seconds:g} seconds, --tool-timeout"
        except (OSError, EOFError):
            problem = "ended its process"
        except (RecursionError, ValueError) as error:  # nested too deep, or no JSON
            problem = f"cannot be asked: {error}"
        self._end()
        raise EpisodeLost(f"{self._name}: {name()} {problem}")

    def _line(self, channel: socket.socket, deadline: float) -> bytes:
        while b"\n" not in self._held:
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            channel.settimeout(left)
            more = channel.recv(1 << 16)
            if not more or len(self._held) > _MOST_BYTES:
                raise EOFError
            self._held += more
        line, _, self._held = self._held.partition(b"\n")
        return line

    def _end(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)
            channel.close()
        process, self._process = self._process, 0
        if process:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it ended
                os.killpg(process, signal.SIGKILL)


def _answer(name: str, text: str, *, failed: bool = False) -> ToolAnswer:
    return ToolAnswer(_valid(name), _valid(text), failed)


def _valid(text: str) -> str:
    """Returns a text without halves of surrogate pairs, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def _seed(row: Row) -> int:
    """Returns a seed of `random` for a row's episodes, which are alike then."""
    return zlib.crc32(repr(sorted(row.items(), key=lambda item: str(item[0]))).encode())
