"""Methods of objects that threads share: one runs at a time."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

_Method = TypeVar("_Method", bound=Callable[..., Any])


def locked(method: _Method) -> _Method:
    """Returns a method that holds the object's ``_lock``: no other thread runs one meanwhile."""

    @functools.wraps(method)
    def alone(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(_Method, alone)
