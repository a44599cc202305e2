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

# A box (a Flax NNX Variable, `nn.Partitioned`) holds its array under one of these attributes. A
# path ends at the box, since the attribute tells a reader nothing.
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

    An object that an NNX module shares has its first path alone; see `lora_jax.core.aliases`.

    Args:
      tree: any pytree.
      is_leaf: as in `jax.tree.flatten`.

    Raises:
      ValueError: two leaves share a path (a key that itself contains ``/``).
    """
    keyed, treedef = flatten(tree, is_leaf)
    leaves = [(path_string(key_path), leaf) for key_path, leaf in keyed]
    n_leaves_of_path = Counter(path for path, _ in leaves)
    for path, n_leaves in n_leaves_of_path.items():
        if n_leaves > 1:
            raise ValueError(
                f"Two leaves of the tree have the same path, {path!r}. Rename one of their "
                "keys, so that rules and adapter files can tell the leaves apart."
            )
    return leaves, treedef


def fold_in_path(key: jax.Array, path: str) -> jax.Array:
    """Returns the key of one path, which depends on no other path and on no process."""
    digest = hashlib.sha256(path.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "little"))


def checked_key(what: str, key: Leaf) -> jax.Array:
    """Returns `key`, a PRNG key, typed or raw.

    Args:
      what: the name of the argument, for the message.
      key: the value that was passed.

    Raises:
      TypeError: the value is no PRNG key.
    """
    dtype = getattr(key, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    is_raw = dtype is not None and bool(getattr(key, "shape", ()))
    if not is_typed and not is_raw:
        raise TypeError(f"{what}={key!r} is not a PRNG key. Write jax.random.key({key!r}).")
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
    "Dense_0") count modules, not layers, and are ignored.
    """
    pattern = r"(?:[a-z]\w*_)?(\d+)" if stacked else r"(?:\w*_)?(\d+)"
    matches = (re.fullmatch(pattern, segment) for segment in path.split("/"))
    return next((int(match[1]) for match in matches if match), None)


def nearest(name: str, paths: Iterable[str], n: int = 5) -> list[str]:
    """Returns the `n` paths that most resemble `name`, best first, for error messages."""

    def similarity(path: str) -> float:
        """Returns the greatest ratio of `name` to the path or to one of its segments."""
        texts = [path, *path.split("/")]
        matchers = [difflib.SequenceMatcher(None, name.lower(), text.lower()) for text in texts]
        return max(matcher.ratio() for matcher in matchers)

    return sorted(paths, key=similarity, reverse=True)[:n]


def check_same_paths(what: str, adapter: Collection[str], nodes: Collection[str]) -> None:
    """Raises ValueError unless an adapter has arrays for the nodes of a tree, and no others.

    Args:
      what: the caller's name, for the message.
      adapter: the paths that the adapter has.
      nodes: the paths of the tree's nodes.
    """
    if unknown := [path for path in adapter if path not in nodes]:
        suggestions = nearest(unknown[0], nodes, n=3)
        raise ValueError(
            f"{what}: the adapter has arrays for {unknown[0]!r} (and {len(unknown) - 1} more "
            "paths), but the tree has no adapted weight there. The most similar paths of "
            f"adapted weights are {suggestions}."
        )
    if missing := sorted(set(nodes) - set(adapter)):
        raise ValueError(
            f"{what}: the adapter has no arrays for the adapted weight {missing[0]!r} (and "
            f"{len(missing) - 1} more)."
        )
