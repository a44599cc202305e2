"""A bank: one base in memory, and many adapters over it, whose arrays are shared without a copy."""

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
from lora_jax.core.aliases import aliased
from lora_jax.core.base import is_abstract
from lora_jax.core.opaque import sealed
from lora_jax.core.types import Adapter as AdapterArrays
from lora_jax.core.types import Forward, Leaf, Model, Tree
from lora_jax.core.weight import LoraWeight, Trained, is_node, leaves_of, map_leaves
from lora_jax.folders import local_path
from lora_jax.peft.config import FILE as PEFT_CONFIG
from lora_jax.rules import Rule
from lora_jax.saving.checkpoint import load_adapter
from lora_jax.saving.fingerprint import base_fingerprint, differing

BASE = "base"  # the name of slot 0
_Method = TypeVar("_Method", bound=Forward)


class OneBase:
    """The base of all adapters of a bank, or of those that train side by side.

    Attributes:
      leaves: the base's arrays, by path.
    """

    def __init__(self, params: Tree) -> None:
        self.leaves = _arrays_of(params)
        self._sums: dict[str, dict[str, str]] = {}

    def check(self, what: str, tree: Tree) -> None:
        """Checks that the frozen leaves of an adapted tree are the base's.

        Leaves that are the same objects are equal; of others, checksums are compared (see
        `lora_jax.saving.fingerprint`). Those of the base are computed once.

        Args:
          what: the call and the adapter, for messages.
          tree: an adapted tree.

        Raises:
          BankError: the paths or the values differ.
        """
        theirs = _arrays_of(tree)
        if only := sorted(theirs.keys() ^ self.leaves.keys()):
            who = "its tree" if only[0] in theirs else "the base here"
            raise BankError(
                f"{what} is over another base: only {who} has {only[0]!r}, among {len(only)} such "
                f"leaves. {_BASE_REMEDY}"
            )
        others = {}
        for path, leaf in theirs.items():
            here = leaf.base if is_node(leaf) and not isinstance(leaf, Trained) else leaf
            mine = self.leaves[path]
            if not (isinstance(leaf, Trained) or is_abstract((here, mine)) or _is_same(here, mine)):
                others[path] = here
        fingerprint = base_fingerprint(others)
        for path in others.keys() - self._sums.keys():
            self._sums[path] = base_fingerprint({path: self.leaves[path]})
        expected = {k: v for path in others for k, v in self._sums[path].items()}
        if wrong := differing(expected, fingerprint):
            raise BankError(
                f"{what} is over another base: {len(wrong)} frozen leaves have other values, "
                f"{', '.join(wrong[:3])} among them. {_BASE_REMEDY}"
            )


def _arrays_of(tree: Tree) -> dict[str, Leaf]:
    """Returns the arrays and nodes of a tree, by path."""
    return {path: leaf for path, leaf in leaves_of(tree)[0] if is_node(leaf) or _is_array(leaf)}


def _is_array(leaf: object) -> bool:
    return hasattr(leaf, "shape")


def _is_same(here: Leaf, mine: Leaf) -> bool:
    """Returns True if two leaves are the same object, or hold the same arrays (codes, say)."""
    forms: list[jax.tree_util.PyTreeDef] = [jax.tree.structure(leaf) for leaf in (here, mine)]
    if here is mine or forms[0] != forms[1]:
        return here is mine
    pairs = zip(jax.tree.leaves(here), jax.tree.leaves(mine), strict=True)
    return all(a is b for a, b in pairs)


_BASE_REMEDY = (
    "Adapt the base that is here, or load the adapter onto it (lora_jax.load_adapter(folder, "
    "params)); or give allow_base_mismatch=True to use its factors over this base"
)


class HeldNodes:
    """Knows whether nodes of a bank's tree that were handed out are still held by someone.

    Whoever keeps a choice, its tree or a node of it holds them; an array alone does not.
    """

    def __init__(self) -> None:
        self._nodes: weakref.WeakSet[Slots] = weakref.WeakSet()

    def watch(self, tree: Tree) -> None:
        """Begins to watch the nodes of a tree that is handed out, and kept nowhere else."""
        self._nodes.update(slots_of(tree).values())

    def writable(self, arrays: AdapterArrays) -> AdapterArrays:
        """Returns the arrays of those nodes where no one holds these, else a copy, to be donated.

        The holders keep the arrays that they have, so the nodes are watched no longer.
        """
        if not len(self._nodes):
            return arrays
        self._nodes = weakref.WeakSet()
        # The copy lies as the arrays do, and nothing is compiled for it.
        copy: AdapterArrays = jax.device_put(arrays, may_alias=False)
        return copy


def locked(method: _Method) -> _Method:
    """Returns a method that holds the object's ``_lock``: no other thread runs one meanwhile."""

    @functools.wraps(method)
    def alone(self: Any, /, *args: object, **kwargs: object) -> object:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(_Method, alone)


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
            raise ValueError(f"Bank: {slots} slots: at least 1 is needed")
        params = aliased(params)
        self._model, self._params, self._base = model, params, OneBase(params)
        self._tree = sealed(add_slots(params, rules, slots + 1, trace=trace, kinds=kinds))
        self._slots, self._held = slots_of(self._tree), HeldNodes()
        self._lock = threading.RLock()  # held by all that reads or changes what follows
        self._kept: dict[str, Adapter] = {}
        # Names by slot, the least recently used first.
        self._resident: dict[int, str | None] = dict.fromkeys(range(1, slots + 1))

    @property
    @locked
    def tree(self) -> Tree:
        """The base with slots in place of each adapted leaf: an argument for `choose`.

        It holds the base's own arrays, and the slots' as they are now: while it is held, adapters
        that come or go do not change it.
        """
        tree = map_slots(lambda _, slots: slots.replace(), self._tree)
        self._held.watch(tree)
        return tree

    @property
    @locked
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, the base's not among them."""
        return tuple(self._kept)

    @property
    @locked
    def resident(self) -> tuple[str, ...]:
        """The names of the adapters that have a slot, the least recently used first."""
        return tuple(name for name in self._resident.values() if name is not None)

    @property
    def n_slots(self) -> int:
        """The number of slots for adapters."""
        return len(self._resident)

    def __contains__(self, name: object) -> bool:
        return name in self._kept

    def __len__(self) -> int:
        """Returns the number of adapters."""
        return len(self._kept)

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
        self._take_in(name, adapter, allow_base_mismatch, self._check_free)

    def replace(self, name: str, adapter: Tree, *, allow_base_mismatch: bool = False) -> None:
        """Replaces an adapter, in its slot; the arguments are those of `add`.

        Raises:
          BankError: there is no adapter of that name, or the new one does not fit, or is over
            another base.
        """
        self._take_in(name, adapter, allow_base_mismatch, self._check_there)

    @locked
    def remove(self, name: str) -> None:
        """Removes an adapter; its slot is free.

        Raises:
          BankError: there is no adapter of that name.
        """
        self._check_there(name)
        del self._kept[name]
        if (slot := self._slot_of(name)) is not None:
            self._touch(slot, None)

    def get(self, name: str) -> Tree:
        """Returns an adapter as an adapted tree over the bank's base, as it was added.

        Raises:
          BankError: there is no adapter of that name.
        """
        with self._lock:
            self._check_there(name)
            adapter = self._kept[name]

        def node(path: str, leaf: Leaf) -> Leaf:
            if path not in adapter:
                return leaf
            mine = jax.tree.map(jnp.asarray, adapter[path])
            return mine.replace(base=leaf) if isinstance(mine, LoraWeight) else mine

        return map_leaves(node, self._params)

    @locked
    def ids(self, names: Iterable[str]) -> jax.Array:
        """Returns the slot of each name, [names] int32; gives slots to those that have none.

        Names of adapters that were moved out of their slots since are no longer right: call it for
        each batch.

        Args:
          names: names of adapters; "base" is the base alone.

        Raises:
          BankError: there is no adapter of a name, or more different ones than slots.
        """
        names = list(names)
        wanted = [name for name in dict.fromkeys(names) if name != BASE]
        for name in wanted:
            self._check_there(name)
        if len(wanted) > self.n_slots:
            raise BankError(
                f"bank: {len(wanted)} different adapters at once, and {self.n_slots} slots: make "
                "a bank with more slots, or smaller batches"
            )
        for name in wanted:  # those that have a slot keep it, so that no other takes it below
            if (slot := self._slot_of(name)) is not None:
                self._touch(slot, name)
        for name in wanted:
            if self._slot_of(name) is None:
                self._load(name)
        by_name = {name: slot for slot, name in self._resident.items()} | {BASE: 0}
        ids: jax.Array = jax.device_put(np.array([by_name[name] for name in names], np.int32))
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
        with self._lock:  # names have these slots in this tree
            ids = names if isinstance(names, (jax.Array, np.ndarray)) else self.ids(names)
            tree = self.tree
        return choose(tree, ids)

    def _take_in(
        self, name: str, adapter: Tree, allow_base_mismatch: bool, check: Callable[[str], None]
    ) -> None:
        """Keeps an adapter from a tree or a folder, once it fits; checks its name before and after.

        Reading takes long, and other threads go on meanwhile.
        """
        with self._lock:
            check(name)
        tree = adapter
        if isinstance(adapter, (str, os.PathLike)):
            tree = self._loaded(local_path(adapter), allow_base_mismatch)
        values = adapter_values(name, tree, self._slots)
        if not allow_base_mismatch:
            self._base.check(f"bank: {name!r}", tree)
        with self._lock:
            check(name)
            self._put(name, values)

    def _loaded(self, folder: Path, allow_base_mismatch: bool) -> Tree:
        if not (folder / PEFT_CONFIG).exists():
            return load_adapter(folder, self._params, allow_base_mismatch=allow_base_mismatch)
        if self._model is None:
            raise BankError(
                f"bank: {folder} is PEFT's, whose names are those of a model: give the bank its "
                "model, Bank(…, model=model)"
            )
        return peft.load(folder, self._model, self._params)

    def _put(self, name: str, adapter: Adapter) -> None:
        self._kept[name] = adapter
        slot = self._slot_of(name)
        if slot is not None:
            self._write(slot, name)
        elif None in self._resident.values():
            self._load(name)

    def _load(self, name: str) -> None:
        """Writes an adapter into a free slot, or the one that was not used for the longest."""
        free = (slot for slot, there in self._resident.items() if there is None)
        slot = next(free, next(iter(self._resident)))
        self._write(slot, name)

    def _write(self, slot: int, name: str) -> None:
        values = values_of(self._kept[name], self._slots, self._base.leaves)
        arrays = {path: slots.arrays for path, slots in self._slots.items()}
        self._tree = write(self._tree, self._held.writable(arrays), slot, values)
        self._slots = slots_of(self._tree)
        self._touch(slot, name)

    def _touch(self, slot: int, name: str | None) -> None:
        """Makes a slot the one that was used last, by an adapter or, being free, by none."""
        del self._resident[slot]
        self._resident[slot] = name

    def _slot_of(self, name: str) -> int | None:
        return next((slot for slot, there in self._resident.items() if there == name), None)

    def _check_free(self, name: str) -> None:
        if name in self._kept or name == BASE:
            what = "is the base" if name == BASE else "is taken; see Bank.replace"
            raise BankError(f"bank: the name {name!r} {what}")

    def _check_there(self, name: str) -> None:
        if name not in self._kept:
            there = ", ".join(map(repr, self._kept)) or "none"
            raise BankError(f"bank: there is no adapter {name!r}; there are {there}")
