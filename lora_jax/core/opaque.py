"""Carries leaves that are not arrays through compiled functions: activations, flags, names.

A module of Equinox has functions and Python numbers among its leaves, which `jax.jit` refuses or
traces. `wrap_opaque_leaves` makes them a part of the tree's structure. `unwrap_opaque_leaves` makes
them leaves again.
"""

import dataclasses

import jax

from lora_jax.core.aliases import flatten_with_aliases, restore_alias_form
from lora_jax.core.types import Leaf, Tree
from lora_jax.core.weight import is_leaf


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Opaque:
    """Wraps a leaf that is not an array; equal wrappers have the same or equal values."""

    value: object

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Opaque) or type(self.value) is not type(other.value):
            return False
        if self.value is other.value:
            return True
        try:
            return is_hashable(self.value) and bool(self.value == other.value)
        except Exception:  # the values' own == returns an array, say
            return False

    def __hash__(self) -> int:
        return hash(self.value) if is_hashable(self.value) else id(self.value)


def is_hashable(value: object) -> bool:
    """Returns True if a value and all that it contains can be hashed."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _is_opaque(value: Leaf) -> bool:
    return isinstance(value, Opaque)


def wrap_opaque_leaves(tree: Tree) -> Tree:
    """Wraps each leaf that is not an array in an `Opaque`, which has no leaves."""
    treedef: jax.tree_util.PyTreeDef
    keyed, treedef = flatten_with_aliases(tree, is_leaf)
    if all(hasattr(leaf, "shape") for _, leaf in keyed):
        return tree
    leaves = [leaf if hasattr(leaf, "shape") else Opaque(leaf) for _, leaf in keyed]
    return restore_alias_form(tree, treedef.unflatten(leaves))


def unwrap_opaque_leaves(tree: Tree) -> Tree:
    """Undoes `wrap_opaque_leaves`: returns the tree with its values in place of `Opaque`s."""
    leaves = jax.tree.leaves(tree, is_leaf=_is_opaque)
    if not any(map(_is_opaque, leaves)):
        return tree
    # `jax.tree.map` keeps the aliases that a wrapped module of NNX may have.
    return jax.tree.map(
        lambda leaf: leaf.value if _is_opaque(leaf) else leaf, tree, is_leaf=_is_opaque
    )
