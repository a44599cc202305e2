"""Keeps the sharing of NNX objects as a part of the tree's structure.

An **object** is a module, a stream of keys or a Variable of NNX. It may stand at several key paths
of a tree. JAX's pytrees know no identity: a tree that is flattened and rebuilt has a copy at each
key path. In an adapted tree the first key path holds the object, as in the state of `nnx.split`,
and each other key path an `Alias`, which has no leaves and survives all transforms. Functions see
the object at all of its key paths again.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax.tree_util import keystr

from lora_jax.core.types import Leaf, Tree

KeyPath = tuple[Any, ...]  # keys of `jax.tree_util`
Keyed = list[tuple[KeyPath, Leaf]]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False)
class Alias:
    """Stands for an object of NNX at each of its key paths but the first.

    Attributes:
      alias_keys, object_keys: the key paths of the alias and of the object, without the keys that
        both begin with.
      kind: the object's class.
      path: the object's path in the whole tree, for messages.
    """

    alias_keys: KeyPath
    object_keys: KeyPath
    kind: type
    path: str

    @classmethod
    def from_paths(cls, value: Leaf, alias_path: KeyPath, object_path: KeyPath) -> "Alias":
        """Returns the alias of an object, from the key paths in the whole tree.

        Raises:
          ValueError: the object holds itself.
        """
        if alias_path[: len(object_path)] == object_path:
            raise ValueError(
                f"A {type(value).__name__} contains itself, at {_shown(alias_path)!r}, and a "
                "pytree cannot contain a cycle. Call flax.nnx.split(module) and pass the "
                "state that it returns, which has no cycle."
            )
        n_shared = 0  # keys that both paths begin with
        while alias_path[n_shared] == object_path[n_shared]:
            n_shared += 1
        return cls(
            alias_keys=alias_path[n_shared:],
            object_keys=object_path[n_shared:],
            kind=type(value),
            path=_shown(object_path),
        )

    def object_path(self, alias_path: KeyPath) -> KeyPath:
        """Returns the key path of the object in a tree that holds this alias at a key path."""
        n_shared = len(alias_path) - len(self.alias_keys)
        if n_shared < 0 or alias_path[n_shared:] != self.alias_keys:
            self.raise_missing(alias_path)
        return (*alias_path[:n_shared], *self.object_keys)

    def raise_missing(self, alias_path: KeyPath) -> NoReturn:
        """Raises the ValueError for an alias without its object."""
        raise ValueError(
            f"{_shown(alias_path)!r} is a reference to the {self.kind.__name__} at "
            f"{self.path!r} of an adapted module, but this tree does not contain that "
            f"{self.kind.__name__}. Pass the whole module, or a part that contains both."
        )

    @property
    def _how_to_use(self) -> str:
        return (
            f"This is a reference to the {self.kind.__name__} at {self.path!r}, which an "
            "adapted module contains at several places. Call the function that uses it "
            "through lora_jax.adapt, with the module that lorafy returned. Or pass the "
            "state of flax.nnx.split(module) to lorafy."
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
    visited: dict[int, object] = {}  # objects by id; holding them keeps their ids unique

    def is_leaf_or_repeated(value: Leaf) -> bool:
        if is_leaf is not None and is_leaf(value):
            return True
        if not is_object(value):
            return False
        is_repeated = id(value) in visited
        visited[id(value)] = value
        return is_repeated

    treedef: jax.tree_util.PyTreeDef
    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf_or_repeated)
    has_repeated = any(id(leaf) in visited for _, leaf in keyed)
    if not has_repeated:
        return keyed, treedef
    object_paths = {id(value): path for path, value in objects(tree)}

    def alias_or_leaf(path: KeyPath, leaf: Leaf) -> Leaf:
        is_repeated = id(leaf) in visited and path != object_paths[id(leaf)]
        return Alias.from_paths(leaf, path, object_paths[id(leaf)]) if is_repeated else leaf

    leaves = [alias_or_leaf(path, leaf) for path, leaf in keyed]
    return jax.tree_util.tree_flatten_with_path(treedef.unflatten(leaves), is_leaf=is_leaf)


def resolved(tree: Tree) -> Tree:
    """Returns a tree with objects in place of aliases; the tree itself where it has no aliases.

    Raises:
      ValueError: the tree lacks an object that an alias stands for.
    """
    originals = _originals(tree)
    if not originals:
        return tree
    original_ids = {id(original) for original in originals.values()}
    rebuilt: dict[int, Leaf] = {}  # by the id of the original

    def rebuild(value: Tree, value_path: KeyPath) -> Tree:
        """Returns a value whose aliases are replaced by rebuilt objects."""

        def is_alias_or_original(child: object) -> bool:
            return isinstance(child, Alias) or (id(child) in original_ids and child is not value)

        def rebuild_leaf(path: KeyPath, leaf: Leaf) -> Leaf:
            if isinstance(leaf, Alias):
                if id(originals[path]) not in rebuilt:
                    leaf.raise_missing(path)
                return rebuilt[id(originals[path])]
            if id(leaf) in original_ids and leaf is not value:
                rebuilt[id(leaf)] = rebuild(leaf, path)
                return rebuilt[id(leaf)]
            return leaf

        treedef: jax.tree_util.PyTreeDef
        keyed, treedef = jax.tree_util.tree_flatten_with_path(value, is_leaf=is_alias_or_original)
        return treedef.unflatten([rebuild_leaf((*value_path, *path), leaf) for path, leaf in keyed])

    return rebuild(tree, ())


def _originals(tree: Tree) -> dict[KeyPath, Leaf]:
    """Returns the object that each alias of a tree stands for, by the alias's key path.

    Raises:
      ValueError: the tree lacks an object that an alias stands for.
    """
    aliases = _aliases(tree)
    if not aliases:
        return {}
    object_of_path = dict(objects(tree))
    originals: dict[KeyPath, Leaf] = {}
    for path, alias in aliases:
        original = object_of_path.get(alias.object_path(path))
        if type(original) is not alias.kind:
            alias.raise_missing(path)
        originals[path] = original
    return originals


def aliased(tree: Tree) -> Tree:
    """Returns a tree with aliases for repeated objects; the tree itself if it has none."""
    keyed, treedef = flatten(tree)
    with_aliases = treedef.unflatten(leaf for _, leaf in keyed)
    return with_aliases if _aliases(with_aliases) else tree


def restore_form(tree: Tree, result: Tree) -> Tree:
    """Returns a result with aliases if the tree that it was computed from has aliases.

    Args:
      tree: the tree whose leaves the result was computed from.
      result: a tree of the same structure, with aliases.
    """
    return result if _aliases(tree) else resolved(result)


def aliases(tree: Tree) -> dict[str, str]:
    """Returns the path of the object of each alias in a tree, by the alias's path."""
    return {_shown(path): _shown(alias.object_path(path)) for path, alias in _aliases(tree)}


def _aliases(tree: Tree) -> list[tuple[KeyPath, Alias]]:
    """Returns the aliases of a tree with their key paths."""
    if "flax.nnx" not in sys.modules:
        return []
    keyed, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, Alias))
    return [(path, leaf) for path, leaf in keyed if isinstance(leaf, Alias)]


def is_object(value: Leaf) -> bool:
    """Returns True if a value is an object of NNX: a module, a stream, a Variable."""
    # Before NNX is imported, which is slow, there are no objects.
    return "flax.nnx" in sys.modules and _is_class(type(value))  # type: ignore[arg-type]


@functools.cache
def _is_class(kind: type) -> bool:
    nnx = sys.modules["flax.nnx"]
    return issubclass(kind, (nnx.Pytree, nnx.Variable))


def objects(tree: Tree, seen: dict[int, object] | None = None) -> Iterator[tuple[KeyPath, Leaf]]:
    """Yields each object of NNX in a tree, with its first key path.

    Args:
      tree: any tree.
      seen: objects that are not yielded, by id; objects that are yielded are added.
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
                for child_path, descendant in objects(child, seen):
                    yield (*path, *key, *child_path), descendant


def _children(value: Leaf) -> Keyed:
    """Returns the children of an object, with a key each."""
    # The first call asks about the object itself, which is no leaf.
    answers = iter([False])
    keyed, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda _: next(answers, True))
    return keyed


def _shown(path: KeyPath) -> str:
    return keystr(path, simple=True, separator="/")
