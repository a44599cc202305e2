"""Copies the changes that a function makes in copies of NNX objects to the caller's objects.

A function under `adapt` is traced with copies of its arguments. NNX modules have reference
semantics: batch statistics, counters of random streams, caches and plain attributes that it
changes must change in the objects that were passed.
"""

import dataclasses
import sys

from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from lora_jax.core.aliases import KeyPath, nnx_objects
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
        return cls(
            [
                (path, nnx_object, _attributes_of_object(nnx_object))
                for path, nnx_object in nnx_objects(tree)
            ]
        )

    def writes(self) -> Writes:
        """Returns the changes since the snapshot."""
        writes: Writes = []
        for path, nnx_object, old_attributes in self.objects:
            attributes = _attributes_of_object(nnx_object)
            changed_attributes = {
                name: value
                for name, value in attributes.items()
                if name not in old_attributes or old_attributes[name] is not value
            }
            deleted_names = old_attributes.keys() - attributes.keys()
            changed_attributes |= dict.fromkeys(deleted_names, _DELETED)
            if changed_attributes:
                writes.append((path, changed_attributes))
        return writes


@dataclasses.dataclass(frozen=True)
class Argument:
    """Stands for a leaf of the arguments, by its index among them."""

    index: int


@dataclasses.dataclass(frozen=True)
class Output:
    """Stands for an output of a jaxpr.

    Attributes:
      number: index among the outputs.
      origin: index of the argument that is this output. None for a computed output.
    """

    number: int
    origin: int | None


def effective_writes(tree: Tree, writes: Writes) -> tuple[Writes, dict[int, Leaf]]:
    """Returns the writes that change something, and the values that they assign to leaves.

    NNX's transforms write all that they are given back, mostly as it was.

    Args:
      tree: the arguments, each of their leaves an `Argument`.
      writes: what a function wrote in them; traced arrays are `Output`\\ s.

    Returns:
      The writes, and the values written, by the index of the leaf whose place each takes.
    """
    changing_writes: Writes = []
    assigned: dict[int, Leaf] = {}
    for path, attributes in writes:
        old_attributes = _attributes_of_object(_object_at_path(tree, path))
        changed_attributes: Attributes = {}
        for name, value in attributes.items():
            argument = old_attributes.get(name)
            if isinstance(argument, Argument):
                is_unchanged = isinstance(value, Output) and value.origin == argument.index
                if is_unchanged:
                    continue
                assigned[argument.index] = value
            changed_attributes[name] = value
        if changed_attributes:
            changing_writes.append((path, changed_attributes))
    return changing_writes, assigned


def write_back(tree: Tree, writes: Writes) -> None:
    """Applies the writes to the objects in a tree of arguments."""
    for path, attributes in writes:
        nnx_object = _object_at_path(tree, path)
        old_attributes = _attributes_of_object(nnx_object)
        for name, value in attributes.items():
            if value is _DELETED:
                delattr(nnx_object, name)
                continue
            old_value = old_attributes.get(name)
            if isinstance(old_value, Trained) and not is_node(value):
                value = old_value.replace(value=value)
            if name is _VALUE:
                nnx_object.set_raw_value(value)
            else:
                setattr(nnx_object, name, value)


def _attributes_of_object(nnx_object: Leaf) -> Attributes:
    """Returns the attributes of an NNX object, or the value of a Variable."""
    if isinstance(nnx_object, sys.modules["flax.nnx"].Variable):
        return {_VALUE: nnx_object.get_raw_value()}
    attributes = vars(nnx_object)
    return {name: attributes[name] for name in attributes if not name.startswith("_pytree__")}


def _object_at_path(tree: Tree, path: KeyPath) -> Tree:
    """Returns the NNX object at a key path of a tree."""
    for key in path:
        match key:
            case GetAttrKey(name):
                tree = getattr(tree, name)
            case SequenceKey(index):
                tree = tree[index]
            case DictKey(name) | FlattenedIndexKey(name):
                tree = tree[name]
    return tree
