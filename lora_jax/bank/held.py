"""Arrays that are handed out without a copy, and stay as they are while someone holds them."""

import weakref
from typing import Any

import jax

from lora_jax.bank.slots import Slots, slots_of


class Held:
    """Knows whether nodes of a bank's tree that were handed out are still held by someone.

    Whoever keeps a choice, its tree or a node of it holds them; an array alone does not.
    """

    def __init__(self) -> None:
        self._nodes: weakref.WeakSet[Slots] = weakref.WeakSet()

    def watch(self, tree: Any) -> None:
        """Begins to watch the nodes of a tree that is handed out, and kept nowhere else."""
        self._nodes.update(slots_of(tree).values())

    def writable(self, arrays: Any) -> Any:
        """Returns the arrays of those nodes where no one holds these, else a copy, to be donated.

        The holders keep the arrays that they have, so the nodes are watched no longer.
        """
        if not len(self._nodes):
            return arrays
        self._nodes = weakref.WeakSet()
        return jax.device_put(arrays, may_alias=False)  # as it lies, and without a compilation
