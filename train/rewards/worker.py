"""The program that calls a user's reward functions; `functions.py` starts it.

Its arguments are ``file.py:function``. It says what it found, then answers requests, a line each.
It imports the standard library alone: a user's file is the only one to import more. A process that
a user's function starts by "spawn" or "forkserver" imports it, too, to find the user's files.
"""

import asyncio
import base64
import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import math
import os
import pickle
import queue
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TextIO

# What each function may take, beside columns; the last three are TRL's.
OURS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
EXCEPTION, NUMBER_OF_RESULTS = "exception", "wrong number of results"
NO_LIST, NO_NUMBER, NOT_FINITE = "not a list", "not a number", "not finite"
_MODULE = re.compile(r"_rewards_(\d+)")
_LARGEST = 3.4e38  # of fp32
FAILED = math.inf  # in the place of a value


class NoFunction(Exception):
    """A file has no such function, or one that cannot be used as it is."""


class RewardFinder:
    """Imports the files of the command line as `_rewards_0`, …, in order: a finder of modules.

    A file is a package, with the files beside it as its modules: relative imports find them.
    """

    @staticmethod
    def find_spec(name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        """Returns the spec of one of the files; None for other modules."""
        if (match := _MODULE.fullmatch(name)) is None:
            return None
        path = _paths()[int(match[1])]
        beside = [str(Path(path).absolute().parent)]
        return importlib.util.spec_from_file_location(name, path, submodule_search_locations=beside)


def _paths() -> list[str]:
    return [*dict.fromkeys(spec.rpartition(":")[0] for spec in sys.argv[1:])]


class Function(NamedTuple):
    """A user's function.

    Attributes:
      call: the function.
      takes: the keywords that it takes; None for all.
      needs: keywords without a default, but for `OURS`.
    """

    call: Callable[..., Any]
    takes: frozenset[str] | None
    needs: list[str]


def find(spec: str) -> Function:
    """Returns the function that ``file.py:function`` names, an object of a class that it names.

    Raises:
      NoFunction: the file has no such function.
      BaseException: whatever the file raises.
    """
    path, _, name = spec.rpartition(":")
    module = _import(path)
    target = getattr(module, name, None)
    if not callable(target):
        functions = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise NoFunction(f"it has no function {name!r}, but: {', '.join(functions) or 'none'}")
    if inspect.isclass(target):
        target = _instantiate(target, name)
    taken = inspect.signature(target).parameters.values()
    named = [p for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Function(
        target,
        None if any(p.kind is p.VAR_KEYWORD for p in taken) else frozenset(p.name for p in named),
        [p.name for p in named if p.default is p.empty and p.name not in OURS],
    )


def _import(path: str) -> Any:
    """Returns the module of a file, imported once; its folder is where it finds others."""
    name, folder = f"_rewards_{_paths().index(path)}", Path(path).absolute().parent
    if name in sys.modules:
        return sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        own = _own_frames(error)
        match = own and re.match(r"from (\.\.+)\s*(.*)", own[-1].line or "")
        if not match or "relative import" not in str(error):
            raise
        dots, rest = match.groups()
        absolute = rest if rest.startswith("import ") else f"from {rest}"
        above = Path(own[-1].filename).absolute().parents[len(dots) - 1]
        raise NoFunction(
            f"{said(error)}: relative imports reach the files beside it alone; write `{absolute}`, "
            f"and set PYTHONPATH={above}"
        ) from error


def _instantiate(given: type[Any], name: str) -> Callable[..., Any]:
    """Returns an object of a class, to be called."""
    if not any("__call__" in vars(base) for base in given.__mro__):
        raise NoFunction(f"{name} is a class, and its objects cannot be called: give it __call__")
    wanted = [
        p.name
        for p in inspect.signature(given).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if wanted:
        raise NoFunction(
            f"{name} is a class whose objects need {', '.join(wanted)}: make one in the file, such "
            f"as `judge = {name}(…)`, and name that"
        )
    made: Callable[..., Any] = given()
    return made


def _own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Returns the frames of a traceback that are of files of others, not of this one."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f for f in frames if f.filename != __file__ and not f.filename.startswith("<")]


def said(error: BaseException) -> str:
    """Returns the last line of a traceback, with the file and the line that it is about."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    own = _own_frames(error)
    if not own or isinstance(error, SyntaxError):  # which says itself where it is
        return text
    return f"{text} ({Path(own[-1].filename).name}, line {own[-1].lineno})"


class RewardLog:
    """Collects the values that a function logs by TRL's ``log_metric`` and ``log_extra``.

    Attributes:
      metrics: numbers by name, one of each call.
      extra: facts about the completions by name: [n] each.
    """

    def __init__(self, n: int) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.extra: dict[str, list[Any]] = {}
        self._n = n

    def metric(self, name: str, value: Any) -> None:
        """Takes a number; one that is not finite is not known."""
        if math.isfinite(number := float(value)):
            self.metrics.setdefault(str(name), []).append(number)

    def column(self, name: str, values: Iterable[Any]) -> None:
        """Takes a fact about each completion."""
        facts = [v if isinstance(v, str | int | float | None) else repr(v) for v in values]
        if len(facts) != self._n:
            raise ValueError(f"log_extra({name!r}): {len(facts)} values, {self._n} completions")
        self.extra[str(name)] = facts


def judge(
    function: Function, keywords: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, Any]:
    """Calls a function; returns its values, and its failures: by kind, how many and the first.

    Args:
      function: the function.
      keywords: prompts, completions, their tokens, and columns.
      state: where training stands: the attributes of ``trainer_state``.

    Returns:
      Values, failures, and what it has logged, as JSON.
    """
    logged = RewardLog(len(keywords["completions"]))
    given: dict[str, Any] = {"trainer_state": SimpleNamespace(**state)}
    given |= {"log_metric": logged.metric, "log_extra": logged.column, **keywords}
    taken = {k: v for k, v in given.items() if function.takes is None or k in function.takes}
    answer = _call(function, taken, len(keywords["completions"]))
    return answer | {"metrics": logged.metrics, "extra": logged.extra}


def _call(function: Function, keywords: Mapping[str, Any], n: int) -> dict[str, Any]:
    try:
        returned = function.call(**keywords)
        if inspect.iscoroutine(returned):
            returned = asyncio.run(returned)
        if wrong := _no_list(returned):
            return {"values": [FAILED] * n, "failures": {NO_LIST: [n, wrong]}}
        results = list(returned)
    except (Exception, SystemExit) as error:
        return {"values": [FAILED] * n, "failures": {EXCEPTION: [n, said(error)]}}
    if len(results) != n:
        text = f"{len(results)} results for {n} completions"
        return {"values": [FAILED] * n, "failures": {NUMBER_OF_RESULTS: [n, text]}}
    failures: dict[str, list[Any]] = {}
    values: list[float | None] = []
    for result in results:
        value, kind = None, ""
        if result is not None:
            try:
                value = None if isinstance(result, str | bytes) else float(result)
                kind = NO_NUMBER if value is None else "" if abs(value) < _LARGEST else NOT_FINITE
            except Exception:  # __float__ of any type
                kind = NO_NUMBER
        if kind:
            failures.setdefault(kind, [0, repr(result)[:80]])[0] += 1
        values.append(FAILED if kind else value)
    return {"values": values, "failures": failures}


def _no_list(result: Any) -> str | None:
    """Names the result of a function that is no list of numbers; None for a list."""
    if isinstance(result, Mapping):
        keys = ", ".join(map(repr, list(result)[:8]))
        what = f"a {type(result).__name__} with the keys {keys}" if result else "an empty dict"
    elif result is None or isinstance(result, str | bytes | int | float | Set):
        what = repr(result)[:80]
    else:
        return None
    return f"it returned {what}; a list with a number, or None, for each completion is needed"


def _requests(source: TextIO) -> "queue.SimpleQueue[str]":
    """Returns a queue of the lines; when they end, ends this process, whatever it does."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in source:
            lines.put(line)
        if sys.platform != "win32":
            os.killpg(0, signal.SIGKILL)  # and what the functions have started
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def main() -> None:
    """Answers requests until the input ends."""
    # A function that prints or reads must not meddle with requests and answers.
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    lines = _requests(requests)
    functions = []
    for spec in sys.argv[1:]:
        try:
            functions.append(find(spec))
        except BaseException as error:
            known = isinstance(error, NoFunction)
            answer({"spec": spec, "error": str(error) if known else said(error)})
            return
    answer({"needs": [function.needs for function in functions]})
    while True:
        index, keywords, state = pickle.loads(base64.b64decode(lines.get()))
        answer(judge(functions[index], keywords, state))


if __name__ in ("__main__", "__mp_main__"):  # the second is its name in processes that are started
    sys.meta_path.append(RewardFinder)
if __name__ == "__main__":
    main()
