"""The program that calls a user's reward functions; `functions.py` starts it.

Its arguments are ``file.py:function``. It says what it found, then answers requests, a line each.
It imports the standard library alone: a user's file is the only one to import more. A process that
a user's function starts by "spawn" or "forkserver" imports it, too, to find the user's files.
"""

import asyncio
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from train.processes import user_files
else:
    _PATH = Path(__file__).parents[1] / "processes" / "user_files.py"
    _SPEC = importlib.util.spec_from_file_location("_user_files", _PATH)
    user_files = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(user_files)
user_files.PROGRAMS.add(__file__)

# What each function may take, beside columns; the last three are TRL's.
OURS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
EXCEPTION, NUMBER_OF_RESULTS = "exception", "wrong number of results"
NO_LIST, NO_NUMBER, NOT_FINITE = "not a list", "not a number", "not finite"
_MAX_FP32 = 3.4e38  # of fp32
FAILED = math.inf  # in the place of a value


class Function(NamedTuple):
    """A user's reward function.

    Attributes:
      call: the function.
      takes: the keywords that it takes; None for all.
      needs: keywords without a default, but for `OURS`.
    """

    call: Callable[..., Any]
    takes: frozenset[str] | None
    needs: list[str]


def find(spec: str) -> Function:
    """Returns the function that ``file.py:function`` names, which may be a class with `__call__`.

    Raises:
      NoFunction: the file has no such function.
      BaseException: whatever the file raises.
    """
    name, target = spec.rpartition(":")[2], user_files.load(spec)
    if inspect.isclass(target):
        target = _instantiate(target, name)
    takes, needs = user_files.find_keywords(target)
    return Function(target, takes, [keyword for keyword in needs if keyword not in OURS])


def _instantiate(reward_class: type[Any], name: str) -> Callable[..., Any]:
    """Returns a callable object of a class."""
    if not any("__call__" in vars(base) for base in reward_class.__mro__):
        raise user_files.NoFunction(
            f"{name} is a class whose objects cannot be called. Give it a method __call__."
        )
    required = [
        p.name
        for p in inspect.signature(reward_class).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if required:
        raise user_files.NoFunction(
            f"{name} is a class whose objects need {', '.join(required)}. Create an object in the "
            f"file, such as `judge = {name}(…)`, and name the object."
        )
    return reward_class()


class RewardLog:
    """Collects the values that a function logs through TRL's ``log_metric`` and ``log_extra``.

    Attributes:
      metrics: numbers by name, one of each call.
      extra: facts about the completions by name: [n] each.
    """

    def __init__(self, n: int) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.extra: dict[str, list[Any]] = {}
        self._n = n

    def metric(self, name: str, value: Any) -> None:
        """Adds a number to a metric, unless the number is not finite."""
        number = float(value)
        if math.isfinite(number):
            self.metrics.setdefault(str(name), []).append(number)

    def column(self, name: str, values: Iterable[Any]) -> None:
        """Stores a value for each completion under a name."""
        facts = [v if isinstance(v, str | int | float | None) else repr(v) for v in values]
        if len(facts) != self._n:
            raise ValueError(
                f"log_extra({name!r}) got {len(facts)} values for {self._n} completions. Pass one "
                "value "
                "for each completion."
            )
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
    offered: dict[str, Any] = {"trainer_state": SimpleNamespace(**state)}
    offered |= {"log_metric": logged.metric, "log_extra": logged.column, **keywords}
    arguments = user_files.select_keywords(offered, function.takes)
    answer = _call_function(function, arguments, len(keywords["completions"]))
    return answer | {"metrics": logged.metrics, "extra": logged.extra}


def _call_function(function: Function, arguments: Mapping[str, Any], n: int) -> dict[str, Any]:
    """Calls a function for n completions; returns its values and its failures by kind."""
    try:
        returned = function.call(**arguments)
        if inspect.iscoroutine(returned):
            returned = asyncio.run(returned)
        problem = _describe_if_not_list(returned)
        if problem:
            return _fail_all(n, NO_LIST, problem)
        results = list(returned)
    except (Exception, SystemExit) as error:
        return _fail_all(n, EXCEPTION, user_files.describe_error(error))
    if len(results) != n:
        return _fail_all(
            n, NUMBER_OF_RESULTS, f"It returned {len(results)} results for {n} completions."
        )
    failures: dict[str, list[Any]] = {}
    values: list[float | None] = []
    for result in results:
        value, kind = _read_value(result)
        if kind is not None:
            failures.setdefault(kind, [0, repr(result)[:80]])[0] += 1
        values.append(value)
    return {"values": values, "failures": failures}


def _fail_all(n: int, kind: str, problem: str) -> dict[str, Any]:
    """Returns the answer of a failed call, which has no value for any of n completions."""
    return {"values": [FAILED] * n, "failures": {kind: [n, problem]}}


def _read_value(result: Any) -> tuple[float | None, str | None]:
    """Returns the number in a result (None for no opinion), and the kind of failure or None."""
    if result is None:
        return None, None
    if isinstance(result, str | bytes):
        return FAILED, NO_NUMBER
    try:
        value = float(result)
    except Exception:  # __float__ of any type
        return FAILED, NO_NUMBER
    if not abs(value) < _MAX_FP32:  # a NaN is not less
        return FAILED, NOT_FINITE
    return value, None


def _describe_if_not_list(result: Any) -> str | None:
    """Returns a description of a result that is not a list; None for a list."""
    if isinstance(result, Mapping):
        keys = ", ".join(map(repr, list(result)[:8]))
        what = f"a {type(result).__name__} with the keys {keys}" if result else "an empty dict"
    elif result is None or isinstance(result, str | bytes | int | float | Set):
        what = repr(result)[:80]
    else:
        return None
    return f"It returned {what}. Return a list with a number or None for each completion."


def main() -> None:
    """Answers requests until the input ends."""
    source, answers = user_files.take_pipes()

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    requests = user_files.requests(source)
    functions = []
    for spec in sys.argv[1:]:
        try:
            functions.append(find(spec))
        except BaseException as error:
            answer({"spec": spec, "error": user_files.describe_error(error)})
            return
    answer({"needs": [function.needs for function in functions]})
    for index, keywords, state in requests:
        answer(judge(functions[index], keywords, state))


if __name__ in ("__main__", "__mp_main__"):  # the second is its name in processes that are started
    sys.meta_path.append(user_files.FileFinder)
if __name__ == "__main__":
    main()
