"""Keeps the sharing of NNX objects as a part of the tree's structure.

A module, a stream of keys or a Variable of NNX may stand at several places of a tree. JAX's pytrees
know no identity: flattened and rebuilt, each place holds a copy. In an adapted tree the first of
the places holds the object, as in the state of `nnx.split`, and each other one an `Alias`, which
has no leaves and survives all transforms. Functions see the object at all of its places again.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax.tree_util import keystr

from lora_jax.core.types import Leaf, Tree

KeyPath = tuple[Any, ...]  # of keys, as `jax.tree_util` has them
Keyed = list[tuple[KeyPath, Leaf]]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False)
class Alias:
    """Stands for an object of NNX at each of its places but the first.

    Attributes:
      at, first: key paths of this place and of the object, from where they part.
      kind: the object's class.
      path: the object's whole path, for messages.
    """

    at: KeyPath
    first: KeyPath
    kind: type
    path: str

    @classmethod
    def from_paths(cls, value: Leaf, at: KeyPath, first: KeyPath) -> "Alias":
        """Returns the alias of an object, from the key paths in the whole tree.

        Raises:
          ValueError: the object holds itself.
        """
        if at[: len(first)] == first:
            raise ValueError(
                f"a {type(value).__name__} holds itself, at {_shown(at)!r}, which no pytree can: "
                "flax.nnx.split(module) returns a state without the circle, to be given in its "
                "place"
            )
        parted = next(n for n, (a, b) in enumerate(zip(at, first, strict=False)) if a != b)
        return cls(at[parted:], first[parted:], type(value), _shown(first))

    def place(self, at: KeyPath) -> KeyPath:
        """Returns the key path of the object in a tree that holds this alias at a key path."""
        n = len(at) - len(self.at)
        if n < 0 or at[n:] != self.at:
            self.refuse_apart(at)
        return (*at[:n], *self.first)

    def refuse_apart(self, at: KeyPath) -> NoReturn:
        """Raises the ValueError for an alias without its object."""
        raise ValueError(
            f"{_shown(at)!r} stands for the {self.kind.__name__} at {self.path!r} of an adapted "
            "module, which is not in this tree: pass the module whole, or what holds both"
        )

    @property
    def _how_to_use(self) -> str:
        return (
            f"this stands for the {self.kind.__name__} at {self.path!r}, which an adapted module "
            "has at several places. Call the function that uses it through lora_jax.adapt, on the "
            "module as lorafy returned it; or give lorafy the state of flax.nnx.split(module)"
        )

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Raises a TypeError that says what to do."""
        raise TypeError(self._how_to_use)

    def __getattr__(self, name: str) -> NoReturn:
        """Raises an AttributeError that says what to do."""
        raise AttributeError(name if name.startswith("_") else self._how_to_use)

    def __repr__(self) -> str:
        return f"Alias({self.path!r})"


def flatten(
    tree: Tree, is_leaf: Callable[[Leaf], bool] | None = None
) -> tuple[Keyed, jax.tree_util.PyTreeDef]:
    """Returns the leaves with their paths, and the structure, of the tree with aliases.

    Raises:
      ValueError: an object holds itself.
    """
    if "flax.nnx" not in sys.modules:
        return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    met: dict[int, object] = {}  # held, so that no identity is given twice

    def stops(value: Leaf) -> bool:
        if is_leaf is not None and is_leaf(value):
            return True
        if not is_object(value):
            return False
        is_met = id(value) in met
        met[id(value)] = value
        return is_met

    treedef: jax.tree_util.PyTreeDef
    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stops)
    if not any(id(leaf) in met for _, leaf in keyed):
        return keyed, treedef
    first = {id(value): path for path, value in objects(tree)}
    leaves = [
        Alias.from_paths(leaf, path, first[id(leaf)])
        if id(leaf) in met and path != first[id(leaf)]
        else leaf
        for path, leaf in keyed
    ]
    return jax.tree_util.tree_flatten_with_path(treedef.unflatten(leaves), is_leaf=is_leaf)


def resolved(tree: Tree) -> Tree:
    """Returns a tree with objects in the place of aliases; the tree itself where it has none.

    Raises:
      ValueError: the tree lacks an object that an alias stands for.
    """
    places = {path: alias for path, alias in _aliases(tree)}
    if not places:
        return tree
    objects_at = dict(objects(tree))
    originals: dict[KeyPath, Leaf] = {}
    for path, alias in places.items():
        original = objects_at.get(alias.place(path))
        if type(original) is not alias.kind:
            alias.refuse_apart(path)
        originals[path] = original
    shared = {id(original) for original in originals.values()}
    made: dict[int, Leaf] = {}

    def rebuilt(value: Tree, at: KeyPath) -> Tree:
        def stops(child: object) -> bool:
            return isinstance(child, Alias) or (id(child) in shared and child is not value)

        def put(path: KeyPath, leaf: Leaf) -> Leaf:
            if isinstance(leaf, Alias):
                if id(originals[path]) not in made:
                    leaf.refuse_apart(path)
                return made[id(originals[path])]
            if id(leaf) in shared and leaf is not value:
                made[id(leaf)] = rebuilt(leaf, path)
                return made[id(leaf)]
            return leaf

        treedef: jax.tree_util.PyTreeDef
        keyed, treedef = jax.tree_util.tree_flatten_with_path(value, is_leaf=stops)
        return treedef.unflatten([put((*at, *path), leaf) for path, leaf in keyed])

    return rebuilt(tree, ())


def aliased(tree: Tree) -> Tree:
    """Returns a tree with aliases; the tree itself where it needs none."""
    keyed, treedef = flatten(tree)
    made = treedef.unflatten(leaf for _, leaf in keyed)
    return made if _aliases(made) else tree


def restore_form(tree: Tree, made: Tree) -> Tree:
    """Returns a tree that was made from another's leaves, with aliases where the other has them."""
    return made if _aliases(tree) else resolved(made)


def aliases(tree: Tree) -> dict[str, str]:
    """Returns the path of each alias in a tree, with that of the object."""
    return {_shown(path): _shown(alias.place(path)) for path, alias in _aliases(tree)}


def _aliases(tree: Tree) -> list[tuple[KeyPath, Alias]]:
    if "flax.nnx" not in sys.modules:
        return []
    keyed, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, Alias))
    return [(path, leaf) for path, leaf in keyed if isinstance(leaf, Alias)]


def is_object(value: Leaf) -> bool:
    """Returns True if a value is an object of NNX: a module, a stream, a Variable."""
    # Without NNX there are none, and it is slow to import.
    return "flax.nnx" in sys.modules and _is_class(type(value))  # type: ignore[arg-type]


@functools.cache
def _is_class(kind: type) -> bool:
    nnx = sys.modules["flax.nnx"]
    return issubclass(kind, (nnx.Pytree, nnx.Variable))


def objects(tree: Tree, seen: dict[int, object] | None = None) -> Iterator[tuple[KeyPath, Leaf]]:
    """Returns each object of NNX in a tree, with its first key path.

    Args:
      tree: any tree.
      seen: by identity, objects that are left out.
    """
    if "flax.nnx" not in sys.modules:
        return
    seen = {} if seen is None else seen
    for path, value in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_object):
        if not is_object(value) or id(value) in seen:
            continue
        seen[id(value)] = value
        yield path, value
        if isinstance(value, sys.modules["flax.nnx"].Pytree):
            for key, child in _children(value):
                for below, each in objects(child, seen):
                    yield (*path, *key, *below), each


def _children(value: Leaf) -> Keyed:
    """Returns the children of an object, with a key each."""
    calls = iter([False])  # for the object itself
    keyed, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda _: next(calls, True))
    return keyed


def _shown(path: KeyPath) -> str:
    return keystr(path, simple=True, separator="/")
