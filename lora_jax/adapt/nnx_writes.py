"""Writes back to a caller's NNX objects what a function changes in its copies of them.

A function under `adapt` is traced with copies of its arguments. NNX modules have reference
semantics: batch statistics, counters of random streams, caches and plain attributes that it
changes must change in the objects that were passed.
"""

import dataclasses
import sys

from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from lora_jax.core.aliases import KeyPath, objects
from lora_jax.core.types import Leaf, Tree
from lora_jax.core.weight import Trained, is_node

_VALUE = "value of the Variable"  # in the place of an attribute's name
_DELETED = object()  # in the place of a value
# The path of each object, and its attributes' new values: a pytree.
Attributes = dict[str, Leaf]
Writes = list[tuple[KeyPath, Attributes]]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The NNX objects in a tree of arguments, each with its path and its attributes."""

    objects: list[tuple[KeyPath, object, Attributes]]

    @classmethod
    def take(cls, tree: Tree) -> "Snapshot":
        """Returns the snapshot of a tree, before a function changes the objects in it."""
        return cls([(path, each, _attributes(each)) for path, each in objects(tree)])

    def writes(self) -> Writes:
        """Returns the changes since the snapshot."""
        changed_objects: Writes = []
        for path, each, before in self.objects:
            after = _attributes(each)
            changed = {n: v for n, v in after.items() if n not in before or before[n] is not v}
            changed |= dict.fromkeys(before.keys() - after.keys(), _DELETED)
            if changed:
                changed_objects.append((path, changed))
        return changed_objects


@dataclasses.dataclass(frozen=True)
class Argument:
    """Stands for a leaf of the arguments, by its place among them."""

    place: int


@dataclasses.dataclass(frozen=True)
class Output:
    """Stands for an output of a jaxpr.

    Attributes:
      number: among the outputs.
      origin: the place of the argument that it is; None of one that is computed.
    """

    number: int
    origin: int | None


def changes(tree: Tree, writes: Writes) -> tuple[Writes, dict[int, Leaf]]:
    """Returns the writes that change something, and what they put in the place of leaves.

    NNX's transforms write all that they are given back, mostly as it was.

    Args:
      tree: the arguments, each of their leaves an `Argument`.
      writes: what a function wrote in them; traced arrays are `Output`\\ s.

    Returns:
      The writes, and the values written, by the place of the leaf that each takes.
    """
    kept: Writes = []
    assigned: dict[int, Leaf] = {}
    for path, attributes in writes:
        before, changed = _attributes(_find(tree, path)), {}
        for name, value in attributes.items():
            leaf = before.get(name)
            if isinstance(leaf, Argument):
                if isinstance(value, Output) and value.origin == leaf.place:
                    continue
                assigned[leaf.place] = value
            changed[name] = value
        if changed:
            kept.append((path, changed))
    return kept, assigned


def write(tree: Tree, writes: Writes) -> None:
    """Makes the changes in the objects of a tree of arguments."""
    for path, attributes in writes:
        each = _find(tree, path)
        before = _attributes(each)
        for name, value in attributes.items():
            held = before.get(name)
            if isinstance(held, Trained) and not is_node(value) and value is not _DELETED:
                value = held.replace(value=value)
            if value is _DELETED:
                delattr(each, name)
            elif name is not _VALUE:
                setattr(each, name, value)
            else:
                each.set_raw_value(value)


def _attributes(each: Leaf) -> Attributes:
    if isinstance(each, sys.modules["flax.nnx"].Variable):
        return {_VALUE: each.get_raw_value()}
    return {name: value for name, value in vars(each).items() if not name.startswith("_pytree__")}


def _find(tree: Tree, path: KeyPath) -> Tree:
    for key in path:
        match key:
            case GetAttrKey(name):
                tree = getattr(tree, name)
            case SequenceKey(index):
                tree = tree[index]
            case DictKey(name) | FlattenedIndexKey(name):
                tree = tree[name]
    return tree
