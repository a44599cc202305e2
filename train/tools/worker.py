"""The program that runs a user's tools and environments; `host.py` starts it.

It imports the files once, and forks a process for each episode, which answers over a socket of its
own: what a tool does to its process ends that episode alone. Arguments: ``describe`` or ``serve``,
the number of environments (0 or 1), and ``file.py:name`` of each, the environment last: its tools
come after the functions, as in TRL.
"""

import asyncio
import contextlib
import importlib.util
import inspect
import json
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.processes import user_files
else:
    _PATH = Path(__file__).parents[1] / "processes" / "user_files.py"
    _SPEC = importlib.util.spec_from_file_location("_user_files", _PATH)
    user_files = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(user_files)
user_files.PROGRAMS.add(__file__)

RESET, REWARD = "reset", "get_reward"  # TRL's names
MAX_RESULT_CHARS = 1_000_000  # characters of what a tool returns; the rest is cut off
Tool = Callable[..., Any]


class SpecError(Exception):
    """The error for a tool specification that cannot be used, with the reason."""


def find_methods(environment: Any) -> dict[str, Tool]:
    """Returns an environment's tools by name: its public methods, as in TRL.

    Raises:
      NoFunction: it has no `reset`.
    """
    names = [name for name, _ in inspect.getmembers(type(environment), inspect.isfunction)]
    if RESET not in names:
        raise user_files.NoFunction(
            f"{type(environment).__name__} has no method `{RESET}`. Add it."
        )
    tools = {}
    for name in names:
        is_private = name.startswith("_")
        if not is_private and name not in (RESET, REWARD):
            tools[name] = getattr(environment, name)
    return tools


def make_environment(spec: str, make: Tool) -> Any:
    """Returns an environment.

    Raises:
      NoFunction: it cannot be made without arguments.
    """
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        name = spec.rpartition(":")[2]
        raise user_files.NoFunction(
            f"{name}() must be callable without arguments ({error}). Give each argument a default."
        ) from None
    return make()


def describe(targets: Mapping[str, Tool], n_environments: int) -> dict[str, Any]:
    """Returns the JSON schemas of all tools, and facts about environments.

    These are whether they have a reward, the fields that `reset` cannot do without, and the names
    of asynchronous tools and of the random generators in the modules.

    Raises:
      SpecError: a tool has no name of its own, no docstring, or arguments without types.
    """
    schemas: dict[str, Any] = {}
    has_reward = False
    reset_fields: list[str] = []
    async_names: list[str] = []
    n_functions = len(targets) - n_environments
    for index, (spec, target) in enumerate(targets.items()):
        is_environment = index >= n_functions
        try:
            if is_environment:
                environment = make_environment(spec, target)
                tools = find_methods(environment)
                has_reward = callable(getattr(environment, REWARD, None))
                _, reset_fields = user_files.find_keywords(environment.reset)
            else:
                tools = {_find_function_name(spec, target): target}
        except Exception as error:
            raise SpecError(spec, user_files.describe_error(error)) from error
        for name, tool in tools.items():
            if name in schemas:
                raise SpecError(spec, f"Two tools are called {name}. Rename one of them.")
            schemas[name] = _describe_tool(spec, name, tool)
            if inspect.iscoroutinefunction(tool):
                async_names.append(name)
    return {
        "tools": [*schemas.values()],
        "rewards": has_reward,
        "needs": reset_fields,
        "later": async_names,
        "generators": [*user_files.generators([*sys.modules])],
    }


def _describe_tool(spec: str, name: str, tool: Tool) -> dict[str, Any]:
    """Returns the JSON schema of a tool.

    Raises:
      SpecError: it has no docstring, or arguments without types.
    """
    from transformers.utils import get_json_schema

    try:
        return get_json_schema(tool)
    except Exception as error:
        problem = " ".join(str(error).split())
        raise SpecError(
            spec,
            f"{name} cannot be described ({problem}). Give it a docstring with a line for each "
            "argument under `Args:`, and annotate each argument with a type.",
        ) from error


def _find_function_name(spec: str, tool: Tool) -> str:
    """Returns the name of a function; raises NoFunction for a class, or an object without name."""
    name = getattr(tool, "__name__", None)
    if inspect.isclass(tool) or not isinstance(name, str):
        raise user_files.NoFunction(
            f"{spec.rpartition(':')[2]} is not a function. Name a function of the file."
        )
    return name


class EpisodeProgram:
    """Serves an episode in its own process."""

    def __init__(self, targets: Mapping[str, Tool], n_environments: int) -> None:
        """Stores the tools and environments. The environment is created by the first reset."""
        n_functions = len(targets) - n_environments
        specs_and_targets = [*targets.items()]
        self._factories = specs_and_targets[n_functions:]
        self._tools: dict[str, Tool] = {}
        for spec, tool in specs_and_targets[:n_functions]:
            self._tools[_find_function_name(spec, tool)] = tool
        self._environment: Any = None
        self._loop = asyncio.new_event_loop()

    def answers(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the answer to a request, or one answer for each call."""
        if "calls" in request:
            yield from self._call(request["calls"])
        elif "reset" in request:
            yield self._reset(request)
        else:
            yield self._attempt(self._reward)

    def _reward(self) -> float | None:
        """Returns the environment's reward; None if it has no opinion."""
        reward = self._finish(self._environment.get_reward())
        return None if reward is None else float(reward)

    def _reset(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Begins an episode. In a rehearsal, the answer lists the changed module values."""
        is_rehearsed = request["rehearsed"]
        modules = [*sys.modules] if is_rehearsed else []
        hashes_at_start = user_files.fingerprints(modules)
        user_files.EpisodeSeeds(request["seed"])
        answer = self._attempt(partial(self._begin, request["reset"]))
        if is_rehearsed and hasattr(self._environment, REWARD):
            self._attempt(self._reward)
        hashes = user_files.fingerprints(modules)
        changed = [name for name in hashes if hashes[name] != hashes_at_start.get(name)]
        return answer | {"changed": changed}

    def _begin(self, row: Mapping[str, Any]) -> str | None:
        """Creates the environment, resets it with a row's fields, and returns its opening text."""
        for spec, make in self._factories:
            self._environment = make_environment(spec, make)
            self._tools |= find_methods(self._environment)
        if self._environment is None:
            return None
        reset = self._environment.reset
        keywords, _ = user_files.find_keywords(reset)
        opening = self._finish(reset(**user_files.select_keywords(row, keywords)))
        return _join_text_blocks(opening, RESET)

    def _call(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        """Runs calls in order, and then all asynchronous ones concurrently."""
        async_calls = []
        for index, (name, arguments) in enumerate(calls):
            tool = self._tools[name]
            if inspect.iscoroutinefunction(tool):
                async_calls.append((index, tool, arguments))
            else:
                yield {"index": index, **self._attempt(partial(_run_tool, tool, arguments))}
        if async_calls:
            yield from self._loop.run_until_complete(self._gather(async_calls))

    async def _gather(self, calls: Sequence[tuple[int, Tool, Any]]) -> list[dict[str, Any]]:
        """Returns the answers to asynchronous calls, which run concurrently."""

        async def run(tool: Tool, arguments: Any) -> Any:
            return await tool(**arguments)

        coroutines = [run(tool, arguments) for _, tool, arguments in calls]
        results = await asyncio.gather(*coroutines, return_exceptions=True)
        answers = []
        for (index, _, _), result in zip(calls, results, strict=True):
            answer = self._attempt(partial(_text_or_raise, result))
            answers.append({"index": index, **answer})
        return answers

    def _attempt(self, function: Callable[[], Any]) -> dict[str, Any]:
        """Calls a function; returns its value or its error as the fields of an answer."""
        try:
            return {"value": function()}
        except (Exception, SystemExit) as error:
            return {
                "error": str(error)[:MAX_RESULT_CHARS],
                "said": user_files.describe_error(error),
            }

    def _finish(self, result: Any) -> Any:
        return self._loop.run_until_complete(result) if inspect.iscoroutine(result) else result


def _run_tool(tool: Tool, arguments: Mapping[str, Any]) -> str:
    return _result_as_text(tool(**arguments))


def _text_or_raise(result: Any) -> str:
    """Returns a result as text; raises a result that is an exception."""
    if isinstance(result, BaseException):
        raise result
    return _result_as_text(result)


def _join_text_blocks(value: Any, name: str) -> str | None:
    """Returns text unchanged, and joins a list of text blocks; None stays None.

    Args:
      value: what a method returned.
      name: the method's name, for messages.
    """
    if value is None or isinstance(value, str):
        return value
    is_list_of_texts = isinstance(value, list) and all(
        isinstance(block, dict) and block.get("type") == "text" for block in value
    )
    if not is_list_of_texts:
        raise TypeError(f"{name} returned {repr(value)[:80]}. Return a text or None.")
    return "".join(str(block["text"]) for block in value)


def _result_as_text(value: Any) -> str:
    """Returns a tool's result as text, as TRL does."""
    text: str | None = None
    if isinstance(value, list) and value:
        with contextlib.suppress(TypeError):  # no list of texts
            text = _join_text_blocks(value, "") or ""
    if text is None:
        text = str(value)
    return text[:MAX_RESULT_CHARS]


def serve_episode(channel: socket.socket, program: EpisodeProgram) -> None:
    """Answers the requests of one episode, in a forked process, until the requests end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)  # what tools print nobody reads
    process_id = os.getpid()
    answers = channel.makefile("w")

    def send(answer: dict[str, Any]) -> None:
        is_fork_of_tool = os.getpid() != process_id
        if is_fork_of_tool:
            os._exit(0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    send({"process": process_id})
    try:
        for request in user_files.requests(channel.makefile("r")):
            for answer in program.answers(request):
                send(answer)
    finally:
        if os.getpid() == process_id:
            os.killpg(0, signal.SIGKILL)  # and what tools have started


def main() -> None:
    """Describes the tools, or forks a process for each socket on stdin, until stdin ends."""
    mode, n_environments, *specs = sys.argv[1:]
    source, answers = user_files.take_pipes()
    targets: dict[str, Tool] = {}
    spec = ""
    answer: dict[str, Any] = {}
    try:
        for spec in specs:
            targets[spec] = user_files.load(spec)
        if mode == "describe":
            answer = describe(targets, int(n_environments))
    except SpecError as error:
        spec, problem = error.args
        answer = {"spec": spec, "error": problem}
    except BaseException as error:
        answer = {"spec": spec, "error": user_files.describe_error(error)}
    if mode == "describe" or answer:
        print(json.dumps(answer), file=answers, flush=True)
        return
    # Threads of what was imported stay behind, and newer Pythons warn of that.
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # what has ended leaves nothing behind
    control = socket.socket(fileno=os.dup(source.fileno()))
    while True:
        message, sockets, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            control.close()
            source.close()  # or the program's end would not be noticed while an episode goes on
            try:
                program = EpisodeProgram(targets, int(n_environments))
                serve_episode(socket.socket(fileno=sockets[0]), program)
            finally:
                os._exit(1)
        os.close(sockets[0])


if __name__ in ("__main__", "__mp_main__"):  # the second is its name in processes that are started
    sys.meta_path.append(user_files.FileFinder)
if __name__ == "__main__":
    main()
