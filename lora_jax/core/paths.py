"""Key paths of pytree leaves as plain strings: ``"model/layers/q_proj/kernel"``."""

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, keystr

from lora_jax.core.aliases import flatten
from lora_jax.core.types import Leaf, Tree

# A box (a Flax NNX Variable, `nn.Partitioned`) holds its array under one of these attributes.
# They say nothing to a reader, so a path ends at the box.
_BOX_ATTRIBUTES = frozenset({"value", "raw_value"})


def path_string(key_path: tuple[object, ...]) -> str:
    """Returns a key path of `jax.tree_util` joined by ``/``, without a box's attribute."""
    if key_path and isinstance(key_path[-1], GetAttrKey) and key_path[-1].name in _BOX_ATTRIBUTES:
        key_path = key_path[:-1]
    return keystr(key_path, simple=True, separator="/")


def flatten_with_paths(
    tree: Tree, is_leaf: Callable[[Leaf], bool] | None = None
) -> tuple[list[tuple[str, Leaf]], jax.tree_util.PyTreeDef]:
    """Returns the leaves of a tree with their paths, and its treedef.

    What an NNX module shares has one path, its first; see `lora_jax.core.aliases`.

    Args:
      tree: any pytree.
      is_leaf: as in `jax.tree.flatten`.

    Raises:
      ValueError: two leaves share a path (a key that itself contains ``/``).
    """
    keyed, treedef = flatten(tree, is_leaf)
    leaves = [(path_string(key_path), leaf) for key_path, leaf in keyed]
    times = Counter(path for path, _ in leaves)
    if repeated := [path for path, n in times.items() if n > 1]:
        raise ValueError(
            f"two leaves of the tree have the same path {repeated[0]!r}; rename one of the keys, "
            "so that a rule and an adapter file can tell them apart"
        )
    return leaves, treedef


def fold_in_path(key: jax.Array, path: str) -> jax.Array:
    """Returns a key for one path: the same in every process, whatever other paths there are."""
    digest = hashlib.sha256(path.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "little"))


def checked_key(what: str, key: Leaf) -> jax.Array:
    """Returns a PRNG key, typed or raw.

    Raises:
      TypeError: it is none.
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", ())
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or shape):
        raise TypeError(f"{what}={key!r} is no PRNG key: write jax.random.key({key!r})")
    checked: jax.Array = key
    return checked


def has_run(path: str, name: str) -> bool:
    """Returns True if `name` ("q_proj", "mlp/up_proj") is a run of whole segments of `path`."""
    return f"/{name}/" in f"/{path}/"


def leaf_name(path: str) -> str:
    """Returns the last segment of `path`."""
    return path.rsplit("/", 1)[-1]


def numbered_layer(path: str, *, stacked: bool) -> int | None:
    """Returns the layer of a path, its first numbered segment ("layers/3/…", "h_3/…"), or None.

    In the path of a stack of kernels, the numbers of Linen's automatic names ("ScanBlock_0",
    "Dense_0") count modules, not layers, and are passed over.
    """
    pattern = r"(?:[a-z]\w*_)?(\d+)" if stacked else r"(?:\w*_)?(\d+)"
    matches = (re.fullmatch(pattern, segment) for segment in path.split("/"))
    return next((int(match[1]) for match in matches if match), None)


def nearest(name: str, paths: Iterable[str], n: int = 5) -> list[str]:
    """Returns the `n` paths that most resemble `name`, best first, for error messages."""

    def likeness(path: str) -> float:
        forms = (form.lower() for form in (path, *path.split("/")))
        return max(difflib.SequenceMatcher(None, name.lower(), form).ratio() for form in forms)

    return sorted(paths, key=likeness, reverse=True)[:n]


def check_same_paths(what: str, adapter: Collection[str], nodes: Collection[str]) -> None:
    """Raises ValueError unless an adapter has something for each node of a tree, and no more.

    Args:
      what: the caller's name, for the message.
      adapter: the paths that the adapter has.
      nodes: the paths of the tree's nodes.
    """
    if unknown := [path for path in adapter if path not in nodes]:
        near = nearest(unknown[0], nodes, n=3)
        raise ValueError(
            f"{what}: the adapter has {unknown[0]!r} (and {len(unknown) - 1} more) that the tree "
            f"does not adapt; the nearest paths there are {near}"
        )
    if missing := sorted(set(nodes) - set(adapter)):
        raise ValueError(
            f"{what}: the adapter has nothing for {missing[0]!r} (and {len(missing) - 1} more)"
        )
