"""A bank: one base in memory and many adapters over it, none of which copies the base's arrays.

A slot is the place of one adapter in the arrays on the device. An adapter that has a slot is
resident; the copies of all adapters are on the host.
"""

import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import peft
from lora_jax.bank.mixing import Choice, choose
from lora_jax.bank.slots import Slots, map_slots, slots_of
from lora_jax.bank.stored import Adapter, BankError, adapter_values, values_of
from lora_jax.bank.writing import add_slots, write
from lora_jax.core.aliases import alias_repeated_objects
from lora_jax.core.base import is_abstract
from lora_jax.core.opaque import wrap_opaque_leaves
from lora_jax.core.types import Adapter as AdapterArrays
from lora_jax.core.types import Forward, Leaf, Model, Tree
from lora_jax.core.weight import LoraWeight, Trained, is_node, leaves_of, map_leaves
from lora_jax.folders import local_path
from lora_jax.peft.config import CONFIG_FILE as PEFT_CONFIG
from lora_jax.rules import Rule
from lora_jax.saving.checkpoint import load_adapter
from lora_jax.saving.fingerprint import base_fingerprint, keys_that_differ

BASE = "base"  # the name of slot 0
_Method = TypeVar("_Method", bound=Forward)


class OneBase:
    """The base that all adapters of a bank, or of side-by-side training, share.

    Attributes:
      leaves: the base's arrays, by path.
    """

    def __init__(self, params: Tree) -> None:
        self.leaves = _arrays_of(params)
        self._checksums_by_path: dict[str, dict[str, str]] = {}

    def check(self, context: str, tree: Tree) -> None:
        """Checks that the frozen leaves of an adapted tree are the leaves of the base.

        Leaves that are the same objects are equal; of others, checksums are compared (see
        `lora_jax.saving.fingerprint`). Those of the base are computed once.

        Args:
          context: the call and the adapter, for messages.
          tree: an adapted tree.

        Raises:
          BankError: the paths or the values differ.
        """
        leaf_by_path = _arrays_of(tree)
        unshared_paths = sorted(leaf_by_path.keys() ^ self.leaves.keys())
        if unshared_paths:
            owner = "its tree" if unshared_paths[0] in leaf_by_path else "the base here"
            raise BankError(
                f"{context} belongs to another base: only {owner} has {unshared_paths[0]!r} "
                f"(and {len(unshared_paths) - 1} more leaves). {_BASE_REMEDY}"
            )
        unproved_leaves = {}
        for path, leaf in leaf_by_path.items():
            if isinstance(leaf, Trained):
                continue  # it trains in full and has no frozen value
            frozen_leaf = leaf.base if is_node(leaf) else leaf
            base_leaf = self.leaves[path]
            if not is_abstract((frozen_leaf, base_leaf)) and not _is_same(frozen_leaf, base_leaf):
                unproved_leaves[path] = frozen_leaf
        expected: dict[str, str] = {}
        for path in unproved_leaves:
            if path not in self._checksums_by_path:
                self._checksums_by_path[path] = base_fingerprint({path: self.leaves[path]})
            expected |= self._checksums_by_path[path]
        different_paths = keys_that_differ(expected, base_fingerprint(unproved_leaves))
        if different_paths:
            raise BankError(
                f"{context} belongs to another base: {len(different_paths)} frozen leaves "
                f"have other values, such as {', '.join(different_paths[:3])}. {_BASE_REMEDY}"
            )


def _arrays_of(tree: Tree) -> dict[str, Leaf]:
    """Returns the arrays and nodes of a tree, by path."""
    leaves, _ = leaves_of(tree)
    return {path: leaf for path, leaf in leaves if is_node(leaf) or hasattr(leaf, "shape")}


def _is_same(leaf: Leaf, base_leaf: Leaf) -> bool:
    """Returns True if two leaves are the same object, or consist of the same array objects."""
    if leaf is base_leaf:
        return True
    structure: jax.tree_util.PyTreeDef = jax.tree.structure(leaf)
    if structure != jax.tree.structure(base_leaf):
        return False
    pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(base_leaf), strict=True)
    return all(array is base_array for array, base_array in pairs)


_BASE_REMEDY = (
    "Adapt the base of the bank, or load the adapter onto it: lora_jax.load_adapter(folder, "
    "params). To use its factors over this base nevertheless, pass allow_base_mismatch=True."
)


class HeldNodes:
    """Tracks whether callers still hold nodes of a bank's tree that were returned to them.

    Whoever keeps a choice, its tree or a node of it holds them; an array alone does not.
    """

    def __init__(self) -> None:
        self._nodes: weakref.WeakSet[Slots] = weakref.WeakSet()

    def watch(self, tree: Tree) -> None:
        """Tracks the nodes of a tree that is returned to a caller and referenced nowhere else."""
        self._nodes.update(slots_of(tree).values())

    def writable(self, arrays: AdapterArrays) -> AdapterArrays:
        """Returns arrays that may be donated: a copy if a caller still holds the nodes.

        The holders keep the arrays that they have, so the nodes are watched no longer.
        """
        has_holders = len(self._nodes) > 0
        if not has_holders:
            return arrays
        self._nodes = weakref.WeakSet()
        # The copy lies as the arrays do, and nothing is compiled for it.
        copy: AdapterArrays = jax.device_put(arrays, may_alias=False)
        return copy


def locked(method: _Method) -> _Method:
    """Decorates a method so that only one thread at a time runs it, by the object's ``_lock``."""

    @functools.wraps(method)
    def locked_method(self: Any, /, *args: object, **kwargs: object) -> object:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(_Method, locked_method)


class Bank:
    """Many adapters over one base, by name.

    Their factors lie side by side in slots on the device; slot 0 is the base alone. Adding,
    removing and replacing adapters compiles nothing anew, nor does mixing them in a batch. Each
    adapter is kept on the host as well: where there are more of them than slots, the most recently
    used ones have slots. Threads may share a bank.

    >>> from lora_jax.bank import Bank, mixed
    >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
    >>> rule = lj.LoraRule(targets=["dense"], rank=2)
    >>> bank = Bank(params, [rule], slots=2)
    >>> tree = lj.lorafy(params, [rule])
    >>> adapter, base = lj.split(tree)
    >>> bank.add("plus", lj.join(jax.tree.map(jnp.ones_like, adapter), base))
    >>> forward = mixed(lambda params, x: x @ params["dense"]["kernel"])
    >>> forward(bank.choose(["base", "plus"]), jnp.ones((2, 4)))
    Array([[ 4.,  4.,  4.],
           [12., 12., 12.]], dtype=float32)
    """

    def __init__(
        self,
        params: Tree,
        rules: Sequence[Rule],
        *,
        slots: int,
        model: Model | None = None,
        trace: Sequence[object] | None = None,
        kinds: Mapping[str, str] | None = None,
    ) -> None:
        """Makes an empty bank.

        Args:
          params: the base, a plain tree; its arrays are not copied.
          rules: select all weights that an adapter may adapt; as in `lora_jax.lorafy`. Their ranks
            are the largest that a slot holds. `dora=True` and `bias_on_b=True` make room for
            adapters with these parts and without; a `TrainRule` for leaves that adapters train in
            full.
          slots: the number of adapters on the device at once, beside the base.
          model: the model of `params`, for adapters in PEFT's files; see `lora_jax.peft.load`.
          trace, kinds: as in `lora_jax.lorafy`.

        Raises:
          ValueError: see `lora_jax.lorafy`; or there are fewer slots than one.
        """
        if slots < 1:
            raise ValueError(f"Bank: slots={slots} must be at least 1.")
        params = alias_repeated_objects(params)
        self._model = model
        self._params = params
        self._base = OneBase(params)
        self._tree = wrap_opaque_leaves(
            add_slots(params, rules, slots + 1, trace=trace, kinds=kinds)
        )
        self._slots = slots_of(self._tree)
        self._held = HeldNodes()
        self._lock = threading.RLock()  # guards the attributes below, and the tree
        self._adapters: dict[str, Adapter] = {}
        # Names of adapters by slot, None where it is free; the least recently used slot first.
        self._name_of_slot: dict[int, str | None] = dict.fromkeys(range(1, slots + 1))

    @property
    @locked
    def tree(self) -> Tree:
        """The base with slots in place of each adapted leaf, which `choose` takes as an argument.

        It holds the base's own arrays, and the slots' as they are now: while it is held, adapters
        that come or go do not change it.
        """
        tree = map_slots(lambda _, slots: slots.replace(), self._tree)
        self._held.watch(tree)
        return tree

    @property
    @locked
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, without the base."""
        return tuple(self._adapters)

    @property
    @locked
    def resident(self) -> tuple[str, ...]:
        """The names of the adapters that have a slot, from the least recently used one on."""
        return tuple(name for name in self._name_of_slot.values() if name is not None)

    @property
    def n_slots(self) -> int:
        """The number of slots for adapters."""
        return len(self._name_of_slot)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        """Returns the number of adapters."""
        return len(self._adapters)

    def __repr__(self) -> str:
        return f"Bank({len(self)} adapters, {self.n_slots} slots, {len(self._slots)} weights)"

    def add(self, name: str, adapter: Tree, *, allow_base_mismatch: bool = False) -> None:
        """Adds an adapter.

        Args:
          name: to choose it by.
          adapter: an adapted tree over the same base; or a folder that `lora_jax.save_adapter` or
            PEFT wrote.
          allow_base_mismatch: accept an adapter of another base of the same shapes. (PEFT's folders
            do not say what they were trained on.)

        Raises:
          BankError: the name is taken, or the adapter does not fit, or is over another base.
          ValueError: the folder cannot be read; see `lora_jax.load_adapter` and
            `lora_jax.peft.load`.
        """
        self._store(name, adapter, allow_base_mismatch, self._check_name_is_free)

    def replace(self, name: str, adapter: Tree, *, allow_base_mismatch: bool = False) -> None:
        """Replaces an adapter, in its slot; the arguments are those of `add`.

        Raises:
          BankError: there is no adapter of that name, or the new one does not fit, or is over
            another base.
        """
        self._store(name, adapter, allow_base_mismatch, self._check_name_exists)

    @locked
    def remove(self, name: str) -> None:
        """Removes an adapter and frees its slot.

        Raises:
          BankError: there is no adapter of that name.
        """
        self._check_name_exists(name)
        del self._adapters[name]
        slot = self._slot_of(name)
        if slot is not None:
            self._touch(slot, None)

    def get(self, name: str) -> Tree:
        """Returns an adapter as an adapted tree over the bank's base, as it was added.

        Raises:
          BankError: there is no adapter of that name.
        """
        with self._lock:
            self._check_name_exists(name)
            adapter = self._adapters[name]

        def adapt_leaf(path: str, leaf: Leaf) -> Leaf:
            if path not in adapter:
                return leaf
            node = jax.tree.map(jnp.asarray, adapter[path])
            return node.replace(base=leaf) if isinstance(node, LoraWeight) else node

        return map_leaves(adapt_leaf, self._params)

    @locked
    def ids(self, names: Iterable[str]) -> jax.Array:
        """Returns the slot of each name, [names] int32, and loads adapters that have no slot.

        Names of adapters that were moved out of their slots since are no longer right: call it for
        each batch.

        Args:
          names: names of adapters; "base" is the base alone.

        Raises:
          BankError: there is no adapter of a name, or more different ones than slots.
        """
        names = list(names)
        adapter_names = [name for name in dict.fromkeys(names) if name != BASE]
        for name in adapter_names:
            self._check_name_exists(name)
        if len(adapter_names) > self.n_slots:
            raise BankError(
                f"bank: the batch has {len(adapter_names)} different adapters, but the bank "
                f"has {self.n_slots} slots. Make the bank with more slots, or use smaller "
                "batches."
            )
        # Adapters that have a slot count as used now, so that the loop below evicts none of them.
        for name in adapter_names:
            slot = self._slot_of(name)
            if slot is not None:
                self._touch(slot, name)
        for name in adapter_names:
            if self._slot_of(name) is None:
                self._load(name)
        slot_of_name = {name: slot for slot, name in self._name_of_slot.items()} | {BASE: 0}
        slots = np.array([slot_of_name[name] for name in names], np.int32)
        ids: jax.Array = jax.device_put(slots)
        return ids

    def choose(self, names: Iterable[str] | jax.Array) -> Choice:
        """Returns the bank's tree for a batch, to be passed where a function takes parameters.

        Nothing is copied. A choice stays as it is while someone holds it: if adapters are loaded,
        replaced or added meanwhile, the bank goes on with a copy of the slots' arrays.

        Args:
          names: the adapter of each example; or their slots, [examples] int.

        Raises:
          BankError: see `ids`.
          ValueError: see `lora_jax.bank.choose`.

        See the example of `Bank`.
        """
        with self._lock:  # the slots of names belong to the tree of the same moment
            ids = names if isinstance(names, (jax.Array, np.ndarray)) else self.ids(names)
            tree = self.tree
        return choose(tree, ids)

    def _store(
        self, name: str, adapter: Tree, allow_base_mismatch: bool, check_name: Callable[[str], None]
    ) -> None:
        """Stores an adapter from a tree or a folder, after all checks.

        The name is checked before and after the adapter is read: reading takes long, and other
        threads may add and remove adapters meanwhile.
        """
        with self._lock:
            check_name(name)
        tree = adapter
        if isinstance(adapter, (str, os.PathLike)):
            tree = self._read_folder(local_path(adapter), allow_base_mismatch)
        host_adapter = adapter_values(name, tree, self._slots)
        if not allow_base_mismatch:
            self._base.check(f"bank: {name!r}", tree)
        with self._lock:
            check_name(name)
            self._put(name, host_adapter)

    def _read_folder(self, folder: Path, allow_base_mismatch: bool) -> Tree:
        """Returns the adapted tree of a folder, which PEFT or this library wrote."""
        if not (folder / PEFT_CONFIG).exists():
            return load_adapter(folder, self._params, allow_base_mismatch=allow_base_mismatch)
        if self._model is None:
            raise BankError(
                f"bank: {folder} is an adapter of PEFT, which names the modules of a model. "
                "Pass the model to the bank: Bank(…, model=model)."
            )
        return peft.load(folder, self._model, self._params)

    def _put(self, name: str, adapter: Adapter) -> None:
        """Stores an adapter on the host, and writes it to its slot or to a free slot, if any."""
        self._adapters[name] = adapter
        slot = self._slot_of(name)
        if slot is not None:
            self._write(slot, name)
        elif None in self._name_of_slot.values():
            self._load(name)

    def _load(self, name: str) -> None:
        """Writes an adapter into a free slot, or else into the least recently used one."""
        free_slots = [slot for slot, owner in self._name_of_slot.items() if owner is None]
        least_recent_slot = next(iter(self._name_of_slot))
        self._write(free_slots[0] if free_slots else least_recent_slot, name)

    def _write(self, slot: int, name: str) -> None:
        """Writes an adapter into a slot, in place unless someone holds the slots' arrays."""
        values = values_of(self._adapters[name], self._slots, self._base.leaves)
        arrays = {path: slots.arrays for path, slots in self._slots.items()}
        self._tree = write(self._tree, self._held.writable(arrays), slot, values)
        self._slots = slots_of(self._tree)
        self._touch(slot, name)

    def _touch(self, slot: int, name: str | None) -> None:
        """Marks a slot as the most recently used, and assigns it to `name`; None frees the slot."""
        del self._name_of_slot[slot]
        self._name_of_slot[slot] = name

    def _slot_of(self, name: str) -> int | None:
        """Returns the slot of an adapter; None if the adapter is on the host only."""
        for slot, owner in self._name_of_slot.items():
            if owner == name:
                return slot
        return None

    def _check_name_is_free(self, name: str) -> None:
        """Raises a BankError if a name is reserved or taken."""
        if name == BASE:
            raise BankError(f"bank: the name {name!r} is reserved for the base.")
        if name in self._adapters:
            raise BankError(
                f"bank: the name {name!r} is taken. Use Bank.replace to replace that adapter."
            )

    def _check_name_exists(self, name: str) -> None:
        if name not in self._adapters:
            names = ", ".join(map(repr, self._adapters)) or "none"
            raise BankError(f"bank: there is no adapter {name!r}. The adapters are {names}.")
