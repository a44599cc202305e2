"""Runs a user's tools and environments, each episode in its own process; see `worker.py`."""

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
_MAX_EPISODES = 256  # episodes that are waited for at the same time
_MAX_ANSWER_BYTES = 1 << 26  # of an answer, whose text the worker cuts
FAILED = math.inf  # in the place of a reward, as rewards have it


class EpisodeLost(Exception):
    """The error for an episode whose process took too long or ended."""


class ProcessHost:
    """Opens episodes, each in a forked process; see `EpisodeHost`."""

    def __init__(self, environment: str | None, tools: Sequence[str], seconds: float) -> None:
        """Describes the tools in a process that ends afterwards.

        Args:
          environment: ``file.py:Class``, or None.
          tools: ``file.py:function`` of each.
          seconds: how long `reset`, a call and `get_reward` may take.

        Raises:
          UserError: they cannot be imported or described, or this system cannot fork.
        """
        if not hasattr(os, "fork"):
            raise UserError(
                "--tools and --environment need a system that can fork processes. Use Linux or "
                "macOS."
            )
        self.seconds = seconds
        self._environment = environment
        self._specs = [*tools]
        if environment:
            self._specs.append(environment)
        self._process_env = {
            "PYTHONHASHSEED": "0",
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(dict.fromkeys([*sys.path, os.getcwd()])),
        }
        description = self._describe()
        self.tools: list[dict[str, Any]] = description["tools"]
        self.rewards: bool = description["rewards"]
        self.needs: list[str] = description["needs"]
        self.generators: list[str] = description["generators"]
        # Asynchronous tools run after the others of a turn.
        self.async_tools: frozenset[str] = frozenset(description["later"])
        self.names = [tool["function"]["name"] for tool in self.tools]
        self.name = environment.rpartition(":")[2] if environment else ""
        self._threads = ThreadPoolExecutor(_MAX_EPISODES, "tools")
        self._lock = threading.Lock()
        self._episodes: set[ProcessEpisode] = set()
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
        if not names:
            names = [name_of(row, "the rows", number) for number, row in enumerate(rows, start=1)]
        if not seeds:
            seeds = [_seed_from_row(row) for row in rows]
        episodes = []
        for row, name, seed in zip(rows, names, seeds, strict=True):
            episode = ProcessEpisode(self, row, name, seed)
            episode.rehearsed = rehearsed
            episodes.append(episode)
        with self._lock:
            self._episodes.update(episodes)
        return [self.run(self._begin_episode, episode) for episode in episodes]

    def run(self, function: Any, *args: Any) -> "Future[Any]":
        """Calls a function in a thread of the pool."""
        return self._threads.submit(function, *args)

    def connect(self) -> socket.socket:
        """Forks a process for an episode, and returns a socket to it."""
        host_end, episode_end = socket.socketpair()
        with self._lock, episode_end:
            control = self._control()
            try:
                socket.send_fds(control, [b"+"], [episode_end.fileno()])
            except OSError:  # a tool has ended the program
                self._end_program()
                socket.send_fds(self._control(), [b"+"], [episode_end.fileno()])
        return host_end

    def _control(self) -> socket.socket:
        """Returns the socket that controls the program; starts the program if it does not run."""
        if self._program is not None and self._program[0].poll() is not None:
            self._end_program()
        if self._program is None:
            self._program = self._start()
        _, control = self._program
        return control

    def forget(self, episode: "ProcessEpisode") -> None:
        """Removes a closed episode."""
        with self._lock:
            self._episodes.discard(episode)

    def close(self) -> None:
        """Ends the processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for episode in [*self._episodes]:
            episode.close()
        self._threads.shutdown()
        with self._lock:
            self._end_program()

    def _begin_episode(self, episode: "ProcessEpisode") -> Episode:
        """Returns an episode after resetting its environment, if there is one."""
        if self._environment is not None:
            episode.begin()
        return episode

    def _command(self, mode: str) -> list[str]:
        """Returns the command line that starts `worker.py` in a mode."""
        n_environments = "0" if self._environment is None else "1"
        return [sys.executable, "-P", worker.__file__, mode, n_environments, *self._specs]

    def _describe(self) -> dict[str, Any]:
        """Returns the description of the tools; see `train.tools.worker.describe`."""
        command = self._command("describe")
        pool = ProgramPool(command, self._process_env, greeting_seconds=_START_SECONDS)
        try:
            description: dict[str, Any] = json.loads(pool.start())
        except NoAnswer as error:
            option = "environment" if self._environment else "tools"
            raise UserError(
                f"{flag(option, self._specs[-1])}: Importing the file failed: It {error}."
            ) from error
        finally:
            pool.close()
        if "error" in description:
            spec = description["spec"]
            option = "environment" if spec == self._environment else "tools"
            raise UserError(f"{flag(option, spec)}: {description['error']}")
        return description

    def _start(self) -> "tuple[subprocess.Popen[bytes], socket.socket]":
        """Starts the program; returns it and the socket that controls it."""
        control, program_end = socket.socketpair()
        with program_end:
            process = subprocess.Popen(
                self._command("serve"),
                stdin=program_end.fileno(),
                stdout=subprocess.DEVNULL,
                env=self._process_env,
                start_new_session=True,
            )
        return process, control

    def _end_program(self) -> None:
        """Ends the program if it runs."""
        if self._program is None:
            return
        process, control = self._program
        self._program = None
        control.close()
        process.kill()
        process.wait()


class ProcessEpisode:
    """An episode in its own process; see `Episode`."""

    def __init__(self, host: ProcessHost, row: Row, name: str, seed: int) -> None:
        """Creates an episode without a process. Messages call its row `name`."""
        self.opening: str | None = None
        self.lost: str | None = None
        self.problem: str | None = None
        self.changed: list[str] = []
        self.rehearsed = False
        self._host = host
        self._row = row
        self._name = name
        self._seed_from_row = seed
        self._channel: socket.socket | None = None
        self._process_id: int | None = None
        self._received = b""  # after the last whole line
        self._lock = threading.Lock()
        self._closed = False

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
        """Ends the process and its child processes."""
        self._closed = True
        self._end()
        self._host.forget(self)

    def _call(self, calls: Sequence[ToolCall]) -> EpisodeTurn:
        """Returns the answers to the calls of a turn after all calls have run."""
        answers = [self._refusal(call) for call in calls]  # None for calls that are run
        run_indices = [index for index, answer in enumerate(answers) if answer is None]
        try:
            with self._lock:
                if self.lost is not None:
                    raise EpisodeLost(self.lost)
                if self._channel is None:
                    self._start()
                for index, answer in self._run(calls, run_indices):
                    answers[index] = answer
        except EpisodeLost as error:
            self.lost = str(error)
            return EpisodeTurn((), self.lost)
        return EpisodeTurn(tuple(answer for answer in answers if answer is not None))

    def _run(
        self, calls: Sequence[ToolCall], run_indices: Sequence[int]
    ) -> Iterator[tuple[int, ToolAnswer]]:
        """Yields the index and the answer of each call that can be run.

        Args:
          calls: the calls of a turn.
          run_indices: the indices of those that can be run.
        """
        waiting = sorted(run_indices, key=lambda index: calls[index].name in self._host.async_tools)
        request = [(calls[index].name, calls[index].arguments) for index in run_indices]

        def awaited_tool() -> str:
            return calls[waiting[0]].name

        for reply in self._ask({"calls": request}, len(request), awaited_tool):
            index = run_indices[reply["index"]]
            waiting.remove(index)
            failed = "error" in reply
            text = str({"error": reply["error"]}) if failed else reply["value"]
            yield index, _make_answer(calls[index].name, text, failed=failed)

    def _refusal(self, call: ToolCall) -> ToolAnswer | None:
        """Returns the answer to a call that cannot be run; None for one that can."""
        problem = call.problem
        if problem is None and call.name not in self._host.names:
            problem = f"Tool {call.name} not found."
        if problem is None:
            return None
        return _make_answer(call.name or "unknown", str({"error": problem}), failed=True)

    def _reward(self) -> float | None:
        """Returns the environment's reward; a failure sets `problem`."""
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
        """Starts the episode's process, and resets the environment in it."""
        if self._closed:
            raise EpisodeLost(f"{self._name}: the episode was closed")
        try:
            self._channel = self._host.connect()
            greeting = self._line(self._channel, time.monotonic() + _START_SECONDS)
        except (OSError, EOFError) as error:
            self._end()
            problem = str(error) or "it ended"
            raise EpisodeLost(
                f"{self._name}: The process for its tools did not start: {problem}"
            ) from None
        self._process_id = json.loads(greeting)["process"]
        request = {
            "reset": dict(self._row),
            "seed": self._seed_from_row,
            "rehearsed": self.rehearsed,
        }
        (reply,) = self._ask(request, 1, lambda: worker.RESET)
        if "error" in reply:
            self._end()
            raise EpisodeLost(f"{self._name}: reset: {reply['said']}")
        opening = reply["value"]
        self.opening = _replace_surrogates(opening) if opening else opening
        self.changed = reply["changed"]

    def _ask(
        self, request: Mapping[str, Any], n_answers: int, awaited_name: Callable[[], str]
    ) -> Iterator[dict[str, Any]]:
        """Yields the answers to a request.

        Args:
          request: the request.
          n_answers: the number of its answers.
          awaited_name: returns the name of what is waited for, for messages.

        Raises:
          EpisodeLost: an answer took too long, or the process ended.
        """
        channel = self._channel
        seconds = self._host.seconds
        if channel is None or self._closed:
            raise EpisodeLost(self.lost or f"{self._name}: the episode was closed")
        try:
            channel.settimeout(seconds)
            channel.sendall(base64.b64encode(pickle.dumps(request)) + b"\n")
            for _ in range(n_answers):
                yield json.loads(self._line(channel, time.monotonic() + seconds))
            return
        except TimeoutError:
            problem = f"took longer than {seconds:g} seconds. Increase --tool-timeout"
        except (OSError, EOFError):
            problem = "ended its process"
        except (RecursionError, ValueError) as error:  # nested too deep, or no JSON
            problem = f"cannot be asked: {error}"
        self._end()
        raise EpisodeLost(f"{self._name}: {awaited_name()} {problem}")

    def _line(self, channel: socket.socket, deadline: float) -> bytes:
        """Returns the next line; raises a TimeoutError at the deadline, and EOFError at the end.

        Args:
          channel: the socket.
          deadline: in seconds of the monotonic clock.
        """
        while b"\n" not in self._received:
            seconds_left = deadline - time.monotonic()
            if seconds_left <= 0:
                raise TimeoutError
            channel.settimeout(seconds_left)
            content = channel.recv(1 << 16)
            has_ended = not content
            if has_ended or len(self._received) > _MAX_ANSWER_BYTES:
                raise EOFError
            self._received += content
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _end(self) -> None:
        """Ends the process and its child processes."""
        channel = self._channel
        self._channel = None
        if channel is not None:
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)
            channel.close()
        process_id = self._process_id
        self._process_id = None
        if process_id is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it ended
                os.killpg(process_id, signal.SIGKILL)


def _make_answer(name: str, text: str, *, failed: bool = False) -> ToolAnswer:
    return ToolAnswer(_replace_surrogates(name), _replace_surrogates(text), failed)


def _replace_surrogates(text: str) -> str:
    """Replaces unpaired surrogates, which tokenizers refuse."""
    return text.encode("utf-8", "replace").decode()


def _seed_from_row(row: Row) -> int:
    """Returns a seed that depends only on a row's fields."""
    fields = sorted(row.items(), key=lambda item: str(item[0]))
    return zlib.crc32(repr(fields).encode())
