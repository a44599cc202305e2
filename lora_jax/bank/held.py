"""Arrays that are handed out without a copy, and objects that threads share."""

import functools
import weakref
from typing import Any, TypeVar, cast

import jax

from lora_jax.bank.slots import Slots, slots_of
from lora_jax.core.types import Adapter, Forward, Tree

_Method = TypeVar("_Method", bound=Forward)


class HeldNodes:
    """Knows whether nodes of a bank's tree that were handed out are still held by someone.

    Whoever keeps a choice, its tree or a node of it holds them; an array alone does not.
    """

    def __init__(self) -> None:
        self._nodes: weakref.WeakSet[Slots] = weakref.WeakSet()

    def watch(self, tree: Tree) -> None:
        """Begins to watch the nodes of a tree that is handed out, and kept nowhere else."""
        self._nodes.update(slots_of(tree).values())

    def writable(self, arrays: Adapter) -> Adapter:
        """Returns the arrays of those nodes where no one holds these, else a copy, to be donated.

        The holders keep the arrays that they have, so the nodes are watched no longer.
        """
        if not len(self._nodes):
            return arrays
        self._nodes = weakref.WeakSet()
        # The copy lies as the arrays do, and nothing is compiled for it.
        copy: Adapter = jax.device_put(arrays, may_alias=False)
        return copy


def locked(method: _Method) -> _Method:
    """Returns a method that holds the object's ``_lock``: no other thread runs one meanwhile."""

    @functools.wraps(method)
    def alone(self: Any, /, *args: object, **kwargs: object) -> object:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(_Method, alone)
