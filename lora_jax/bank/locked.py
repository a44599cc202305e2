"""Methods of objects that threads share: one runs at a time."""

import functools
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar


class _HasLock(Protocol):
    _lock: threading.RLock


_Self = TypeVar("_Self", bound=_HasLock)
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def locked(
    method: Callable[Concatenate[_Self, _Args], _Result],
) -> Callable[Concatenate[_Self, _Args], _Result]:
    """Returns a method that runs while no other thread runs one of the same object."""

    @functools.wraps(method)
    def alone(self: _Self, /, *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        with self._lock:
            return method(self, *args, **kwargs)

    return alone
