"""Key paths of pytree leaves as plain strings: ``"model/layers/q_proj/kernel"``."""

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, keystr

from lora_jax.core.aliases import flatten_with_aliases
from lora_jax.core.types import Leaf, Tree

# A box (a Flax NNX Variable, `nn.Partitioned`) holds its array under one of these attributes. A
# path ends at the box, because the attribute tells a reader nothing.
_BOX_ATTRIBUTES = frozenset({"value", "raw_value"})


def path_string(key_path: tuple[object, ...]) -> str:
    """Returns a key path of `jax.tree_util` joined by ``/``, without the attribute of a box."""
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
    keyed, treedef = flatten_with_aliases(tree, is_leaf)
    leaves = [(path_string(key_path), leaf) for key_path, leaf in keyed]
    n_leaves_of_path = Counter(path for path, _ in leaves)
    for path, n_leaves in n_leaves_of_path.items():
        if n_leaves > 1:
            raise ValueError(
                f"Two leaves of the tree have the same path, {path!r}, so rules and adapter files "
                "cannot distinguish them. Rename one of their keys."
            )
    return leaves, treedef


def fold_in_path(key: jax.Array, path: str) -> jax.Array:
    """Returns a key derived from a path, equal in every process."""
    digest = hashlib.sha256(path.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "little"))


def check_prng_key(argument: str, key: Leaf) -> jax.Array:
    """Checks the type of a PRNG key, typed or raw, and returns it.

    Args:
      argument: the name of the argument, for the message.
      key: the value that was passed.

    Raises:
      TypeError: the value is no PRNG key.
    """
    dtype = getattr(key, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    is_raw = dtype is not None and bool(getattr(key, "shape", ()))
    if not is_typed and not is_raw:
        raise TypeError(f"{argument}={key!r} is not a PRNG key. Write jax.random.key({key!r}).")
    prng_key: jax.Array = key
    return prng_key


def has_segments(path: str, name: str) -> bool:
    """Returns True if `name` ("q_proj", "mlp/up_proj") is a run of whole segments of `path`."""
    return f"/{name}/" in f"/{path}/"


def leaf_name(path: str) -> str:
    """Returns the last segment of `path`."""
    return path.rsplit("/", 1)[-1]


def numbered_layer(path: str, *, stacked: bool) -> int | None:
    """Returns the first numbered segment of a path ("layers/3/…", "h_3/…"), or None.

    In the path of a stack of kernels, the numbers of Linen's automatic names ("ScanBlock_0",
    "Dense_0") count modules, not layers, and are ignored.
    """
    pattern = r"(?:[a-z]\w*_)?(\d+)" if stacked else r"(?:\w*_)?(\d+)"
    for segment in path.split("/"):
        match = re.fullmatch(pattern, segment)
        if match:
            return int(match[1])
    return None


def most_similar(name: str, paths: Iterable[str], n: int = 5) -> list[str]:
    """Returns the `n` paths that are most similar to `name`, best first, for error messages."""

    def similarity(path: str) -> float:
        """Returns the similarity of `name` to the path or to its most similar segment."""
        candidates = [path, *path.split("/")]
        return max(
            difflib.SequenceMatcher(None, name.lower(), candidate.lower()).ratio()
            for candidate in candidates
        )

    return sorted(paths, key=similarity, reverse=True)[:n]


def check_same_paths(
    caller: str, adapter_paths: Collection[str], node_paths: Collection[str]
) -> None:
    """Raises ValueError unless an adapter's paths are exactly the paths of a tree's nodes.

    Args:
      caller: the caller's name, for the message.
      adapter_paths: the paths that the adapter has.
      node_paths: the paths of the tree's nodes.
    """
    unknown_paths = [path for path in adapter_paths if path not in node_paths]
    if unknown_paths:
        similar_paths = most_similar(unknown_paths[0], node_paths, n=3)
        raise ValueError(
            f"{caller}: the adapter has arrays for {unknown_paths[0]!r} (and "
            f"{len(unknown_paths) - 1} more paths), but the tree has no adapted weight there. The "
            f"most similar paths of adapted weights are {similar_paths}. Adapt the base with the "
            "rules of the adapter."
        )
    missing_paths = sorted(set(node_paths) - set(adapter_paths))
    if missing_paths:
        raise ValueError(
            f"{caller}: the adapter has no arrays for the adapted weight {missing_paths[0]!r} (and "
            f"{len(missing_paths) - 1} more). Adapt the base with the rules of the adapter."
        )
