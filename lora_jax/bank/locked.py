"""Methods of objects that threads share: one runs at a time."""

import functools
from typing import Any, TypeVar, cast

from lora_jax.core.types import Forward

_Method = TypeVar("_Method", bound=Forward)


def locked(method: _Method) -> _Method:
    """Returns a method that holds the object's ``_lock``: no other thread runs one meanwhile."""

    @functools.wraps(method)
    def alone(self: Any, /, *args: object, **kwargs: object) -> object:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(_Method, alone)
