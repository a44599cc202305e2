"""The program that calls a user's reward functions; `functions.py` starts it.

Its arguments are ``file.py:function``. It says what it found, then answers requests, a line each.
It imports the standard library alone: a user's file is the only one to import more.
"""

import asyncio
import base64
import importlib.util
import inspect
import json
import math
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

OURS = ("prompts", "completions", "completion_ids")  # what each function may take, beside columns
EXCEPTION, NUMBER_OF_RESULTS = "exception", "wrong number of results"
NO_NUMBER, NOT_FINITE = "not a number", "not finite"
_LARGEST = 3.4e38  # of fp32
FAILED = math.inf  # in the place of a value


class NoFunction(Exception):
    """A file has no such function."""


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


def find(spec: str, modules: dict[str, Any]) -> Function:
    """Returns the function that ``file.py:function`` names; imports each file once.

    Raises:
      NoFunction: the file has no such function.
      BaseException: whatever the file raises.
    """
    path, _, name = spec.rpartition(":")
    if path not in modules:
        module_spec = importlib.util.spec_from_file_location(f"_rewards_{len(modules)}", path)
        assert module_spec is not None and module_spec.loader is not None
        module = modules[path] = importlib.util.module_from_spec(module_spec)
        sys.path.insert(0, str(Path(path).absolute().parent))
        sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
        module_spec.loader.exec_module(module)
    found = getattr(modules[path], name, None)
    if not callable(found):
        functions = [n for n, value in vars(modules[path]).items() if inspect.isfunction(value)]
        raise NoFunction(f"it has no function {name!r}, but: {', '.join(functions) or 'none'}")
    taken = inspect.signature(found).parameters.values()
    named = [p for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Function(
        found,
        None if any(p.kind is p.VAR_KEYWORD for p in taken) else frozenset(p.name for p in named),
        [p.name for p in named if p.default is p.empty and p.name not in OURS],
    )


def said(error: BaseException) -> str:
    """Returns the last line of a traceback, with the file and the line that it is about."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    own = [frame for frame in frames if not frame.filename.startswith("<")]
    if not own or isinstance(error, SyntaxError):  # which says itself where it is
        return text
    return f"{text} ({Path(own[-1].filename).name}, line {own[-1].lineno})"


def judge(function: Function, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Calls a function; returns its values, and its failures: by kind, how many and the first."""
    n = len(keywords["completions"])
    taken = {k: v for k, v in keywords.items() if function.takes is None or k in function.takes}
    try:
        found = function.call(**taken)
        if inspect.iscoroutine(found):
            found = asyncio.run(found)
        results = list(found)
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
    functions, modules = [], dict[str, Any]()
    for spec in sys.argv[1:]:
        try:
            functions.append(find(spec, modules))
        except BaseException as error:
            known = isinstance(error, NoFunction)
            answer({"spec": spec, "error": str(error) if known else said(error)})
            return
    answer({"needs": [function.needs for function in functions]})
    while True:
        index, keywords = pickle.loads(base64.b64decode(lines.get()))
        answer(judge(functions[index], keywords))


if __name__ == "__main__":
    main()
