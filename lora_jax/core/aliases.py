"""Keeps the sharing of NNX objects as part of a tree's structure.

An **object** is a module, a stream of keys or a Variable of NNX. A tree may contain it at several
key paths. JAX's pytrees know no identity: a tree that is flattened and rebuilt has a copy at each
key path. In an adapted tree the first key path holds the object, as in the state of `nnx.split`.
Each other key path holds an `Alias`, which has no leaves and survives all transforms. Functions see
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
KeyedLeaves = list[tuple[KeyPath, Leaf]]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False)
class Alias:
    """Stands for a shared NNX object at each of its key paths but the first.

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
                f"A {type(value).__name__} contains itself, at {_path_text(alias_path)!r}, and a "
                "pytree cannot contain a cycle. Call flax.nnx.split(module), and pass the state "
                "that it returns."
            )
        n_shared = 0  # keys that both paths begin with
        while alias_path[n_shared] == object_path[n_shared]:
            n_shared += 1
        return cls(
            alias_keys=alias_path[n_shared:],
            object_keys=object_path[n_shared:],
            kind=type(value),
            path=_path_text(object_path),
        )

    def object_path(self, alias_path: KeyPath) -> KeyPath:
        """Returns the key path of the object in a tree, given the key path of this alias in it."""
        n_shared = len(alias_path) - len(self.alias_keys)
        if n_shared < 0 or alias_path[n_shared:] != self.alias_keys:
            self.raise_missing(alias_path)
        return (*alias_path[:n_shared], *self.object_keys)

    def raise_missing(self, alias_path: KeyPath) -> NoReturn:
        """Raises the ValueError for an alias without its object."""
        raise ValueError(
            f"{_path_text(alias_path)!r} is a reference to the {self.kind.__name__} at "
            f"{self.path!r} of an adapted module, but this tree does not contain that "
            f"{self.kind.__name__}. Pass the whole module, or a part that contains both."
        )

    @property
    def _usage_message(self) -> str:
        """Returns the message for an alias that is used as the object."""
        return (
            f"This is only a reference to the {self.kind.__name__} at {self.path!r}, which an "
            "adapted module contains several times. Call your function through lora_jax.adapt, "
            "with the module that lorafy returned. Or pass the state of flax.nnx.split(module) to "
            "lorafy."
        )

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Raises a TypeError with a remedy."""
        raise TypeError(self._usage_message)

    def __getattr__(self, name: str) -> NoReturn:
        """Raises an AttributeError with a remedy."""
        raise AttributeError(name if name.startswith("_") else self._usage_message)

    def __repr__(self) -> str:
        return f"Alias({self.path!r})"


def flatten_with_aliases(
    tree: Tree, is_leaf: Callable[[Leaf], bool] | None = None
) -> tuple[KeyedLeaves, jax.tree_util.PyTreeDef]:
    """Returns the leaves with their key paths, and the structure, of a tree with aliases.

    Raises:
      ValueError: an object contains itself.
    """
    # Before NNX is imported, there are no objects.
    if "flax.nnx" not in sys.modules:
        return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    visited: dict[int, object] = {}  # objects by id; holding them keeps their ids unique

    def is_leaf_or_repeated(value: Leaf) -> bool:
        """Returns True for a leaf, and for an object that was visited before."""
        if is_leaf is not None and is_leaf(value):
            return True
        if not is_nnx_object(value):
            return False
        is_repeated = id(value) in visited
        visited[id(value)] = value
        return is_repeated

    treedef: jax.tree_util.PyTreeDef
    keyed_leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf_or_repeated)
    has_repeated = any(id(leaf) in visited for _, leaf in keyed_leaves)
    if not has_repeated:
        return keyed_leaves, treedef
    # Put an alias in place of each object at a key path other than its first.
    object_paths = {id(value): path for path, value in nnx_objects(tree)}

    def alias_or_leaf(path: KeyPath, leaf: Leaf) -> Leaf:
        is_repeated = id(leaf) in visited and path != object_paths[id(leaf)]
        return Alias.from_paths(leaf, path, object_paths[id(leaf)]) if is_repeated else leaf

    leaves = [alias_or_leaf(path, leaf) for path, leaf in keyed_leaves]
    return jax.tree_util.tree_flatten_with_path(treedef.unflatten(leaves), is_leaf=is_leaf)


def resolve_aliases(tree: Tree) -> Tree:
    """Returns a tree with objects in place of aliases, or the tree itself if it has none.

    Raises:
      ValueError: the tree lacks an object that an alias stands for.
    """
    original_of_alias = _object_of_each_alias(tree)
    if not original_of_alias:
        return tree
    # Every object that an alias stands for is rebuilt once, because it may contain aliases itself.
    original_ids = {id(original) for original in original_of_alias.values()}
    rebuilt_objects: dict[int, Leaf] = {}  # by the id of the original

    def rebuild(subtree: Tree, subtree_path: KeyPath) -> Tree:
        """Returns a subtree in which rebuilt objects replace aliases."""

        def is_alias_or_original(child: object) -> bool:
            is_original = id(child) in original_ids and child is not subtree
            return is_original or isinstance(child, Alias)

        def rebuild_leaf(path: KeyPath, leaf: Leaf) -> Leaf:
            """Returns the object of an alias, a rebuilt object, or the leaf itself."""
            if isinstance(leaf, Alias):
                # The original comes before its aliases in the tree, so that it is rebuilt already.
                original_id = id(original_of_alias[path])
                if original_id not in rebuilt_objects:
                    leaf.raise_missing(path)
                return rebuilt_objects[original_id]
            if id(leaf) in original_ids and leaf is not subtree:
                rebuilt_objects[id(leaf)] = rebuild(leaf, path)
                return rebuilt_objects[id(leaf)]
            return leaf

        treedef: jax.tree_util.PyTreeDef
        keyed_leaves, treedef = jax.tree_util.tree_flatten_with_path(
            subtree, is_leaf=is_alias_or_original
        )
        leaves = [rebuild_leaf((*subtree_path, *path), leaf) for path, leaf in keyed_leaves]
        return treedef.unflatten(leaves)

    return rebuild(tree, ())


def _object_of_each_alias(tree: Tree) -> dict[KeyPath, Leaf]:
    """Returns the object that each alias of a tree stands for, by the alias's key path.

    Raises:
      ValueError: the tree lacks an object that an alias stands for.
    """
    aliases = _aliases_with_paths(tree)
    if not aliases:
        return {}
    object_of_path = dict(nnx_objects(tree))
    originals: dict[KeyPath, Leaf] = {}
    for path, alias in aliases:
        original = object_of_path.get(alias.object_path(path))
        if type(original) is not alias.kind:
            alias.raise_missing(path)
        originals[path] = original
    return originals


def alias_repeated_objects(tree: Tree) -> Tree:
    """Returns a tree with aliases for repeated objects, or the tree itself."""
    keyed_leaves, treedef = flatten_with_aliases(tree)
    tree_with_aliases = treedef.unflatten(leaf for _, leaf in keyed_leaves)
    return tree_with_aliases if _aliases_with_paths(tree_with_aliases) else tree


def restore_alias_form(tree: Tree, result: Tree) -> Tree:
    """Returns a result with aliases if its source tree has aliases, else with objects.

    Args:
      tree: the tree whose leaves the result was computed from.
      result: a tree of the same structure, with aliases.
    """
    return result if _aliases_with_paths(tree) else resolve_aliases(result)


def aliases(tree: Tree) -> dict[str, str]:
    """Returns the path of the object of each alias in a tree, by the alias's path."""
    return {
        _path_text(path): _path_text(alias.object_path(path))
        for path, alias in _aliases_with_paths(tree)
    }


def _aliases_with_paths(tree: Tree) -> list[tuple[KeyPath, Alias]]:
    """Returns the aliases of a tree with their key paths."""
    if "flax.nnx" not in sys.modules:
        return []
    keyed_leaves, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda value: isinstance(value, Alias)
    )
    return [(path, leaf) for path, leaf in keyed_leaves if isinstance(leaf, Alias)]


def is_nnx_object(value: Leaf) -> bool:
    """Returns True if a value is an NNX object: a module, a stream, a Variable."""
    # Before NNX is imported, which is slow, there are no objects.
    return "flax.nnx" in sys.modules and _is_nnx_class(type(value))  # type: ignore[arg-type]


@functools.cache
def _is_nnx_class(kind: type) -> bool:
    nnx = sys.modules["flax.nnx"]
    return issubclass(kind, (nnx.Pytree, nnx.Variable))


def nnx_objects(
    tree: Tree, visited: dict[int, object] | None = None
) -> Iterator[tuple[KeyPath, Leaf]]:
    """Yields each NNX object of a tree, with its first key path.

    Args:
      tree: any tree.
      visited: objects that are not yielded, by id; objects that are yielded are added.
    """
    if "flax.nnx" not in sys.modules:
        return
    visited = {} if visited is None else visited
    for path, value in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_nnx_object):
        if not is_nnx_object(value) or id(value) in visited:
            continue
        visited[id(value)] = value
        yield path, value
        if isinstance(value, sys.modules["flax.nnx"].Pytree):
            for key, child in _keyed_children(value):
                for child_path, descendant in nnx_objects(child, visited):
                    yield (*path, *key, *child_path), descendant


def _keyed_children(value: Leaf) -> KeyedLeaves:
    """Returns the children of an object, each with its key."""
    # JAX asks first about the object itself, which is no leaf, and then about its children. (An
    # object that contains itself is its own child, so identities cannot tell the two apart.)
    answers = iter([False])
    keyed_children, _ = jax.tree_util.tree_flatten_with_path(
        value, is_leaf=lambda _: next(answers, True)
    )
    return keyed_children


def _path_text(path: KeyPath) -> str:
    """Returns a key path joined by ``/``, for messages."""
    return keystr(path, simple=True, separator="/")
