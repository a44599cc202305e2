"""Holds the adapters of a batch of samples in slots of arrays on the device."""

from collections import Counter

from lora_jax.bank.slots import map_slots, slots_of
from lora_jax.bank.writing import add_slots, write
from lora_jax.core.types import Tree
from train.serve.engine.adapter import Adapter
from train.serve.engine.base import ServedBase


class AdapterPool:
    """Slots for the adapters that samples currently use. Slot 0 is the base."""

    def __init__(self, base: ServedBase, slots: int) -> None:
        """Creates empty slots for `slots` adapters, without arrays of the base."""
        tree = add_slots(base.params, base.rules, slots)
        self._tree = map_slots(lambda _, weight_slots: weight_slots.replace(has_base=False), tree)
        # By slot, the least recently used first.
        self._adapters: dict[int, Adapter | None] = dict.fromkeys(range(1, slots + 1))
        self._users: Counter[int] = Counter()
        self._write(1, base.zero_adapter)  # so the arrays lie where all later writes leave them

    @property
    def tree(self) -> Tree:
        """The base with slots in place of adapted weights."""
        return self._tree

    def acquire(self, adapter: Adapter | None) -> int | None:
        """Reserves the slot of an adapter until `release`; returns None if all slots are in use.

        Args:
          adapter: the adapter; None for the base.
        """
        if adapter is None:
            return 0
        slot = self._find_slot(adapter)
        if slot is None:
            slot = self._find_idle_slot()
            if slot is None:
                return None
            self._write(slot, adapter)
        del self._adapters[slot]
        self._adapters[slot] = adapter  # at the end: the most recently used
        self._users[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """Decrements the number of users of a slot."""
        self._users[slot] -= 1

    def _find_slot(self, adapter: Adapter) -> int | None:
        """Returns the slot that holds an adapter, or None."""
        for slot, slot_adapter in self._adapters.items():
            if slot_adapter is adapter:
                return slot
        return None

    def _find_idle_slot(self) -> int | None:
        """Returns the least recently used slot without users, or None."""
        for slot in self._adapters:
            if not self._users[slot]:
                return slot
        return None

    def _write(self, slot: int, adapter: Adapter) -> None:
        """Writes the arrays of an adapter into a slot."""
        arrays = {path: slots.arrays for path, slots in slots_of(self._tree).items()}
        values = {
            path: {**factors, "scale": adapter.scales[path]}
            for path, factors in adapter.factors.items()
        }
        self._tree = write(self._tree, arrays, slot - 1, values)
