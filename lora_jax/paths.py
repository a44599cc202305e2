"""Key paths of pytree leaves as plain strings: ``"model/layers/q_proj/kernel"``."""

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

# A box (a Flax NNX Variable, `nn.Partitioned`) holds its array under one of these attributes.
# They say nothing to a reader, so a path ends at the box.
_BOX_ATTRIBUTES = frozenset({"value", "raw_value"})


def _segment(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
        case GetAttrKey(name=name):
            return str(name)
    return str(key)


def path_string(key_path: tuple[Any, ...]) -> str:
    """`key_path`, as `jax.tree_util` gives it, joined by ``/``; a box's attribute is left out."""
    if key_path and isinstance(key_path[-1], GetAttrKey) and key_path[-1].name in _BOX_ATTRIBUTES:
        key_path = key_path[:-1]
    return "/".join(_segment(key) for key in key_path)


def flatten_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of `tree` with their paths, and its treedef.

    Raises ValueError where two leaves share a path (a key that itself contains ``/``).
    """
    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    leaves = [(path_string(key_path), leaf) for key_path, leaf in keyed]
    seen: set[str] = set()
    for path, _ in leaves:
        if path in seen:
            raise ValueError(
                f"two leaves of the tree have the same path {path!r}; rename one of the keys, "
                "so that a rule and an adapter file can tell them apart"
            )
        seen.add(path)
    return leaves, treedef


def fold_in_path(key: jax.Array, path: str) -> jax.Array:
    """A key for one path: the same in every process, whatever other paths there are."""
    digest = hashlib.sha256(path.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "little"))


def has_run(path: str, name: str) -> bool:
    """Whether `name` ("q_proj", "mlp/up_proj") equals a run of whole segments of `path`."""
    return f"/{name}/" in f"/{path}/"


def leaf_name(path: str) -> str:
    """The last segment of `path`."""
    return path.rsplit("/", 1)[-1]


def numbered_layer(path: str, *, stacked: bool) -> int | None:
    """The layer that `path` belongs to: its first numbered segment ("layers/3/…", "h_3/…").

    In the path of a stack of kernels, the numbers of Linen's automatic names ("ScanBlock_0",
    "Dense_0") count modules, not layers, and are passed over.
    """
    pattern = r"(?:[a-z]\w*_)?(\d+)" if stacked else r"(?:\w*_)?(\d+)"
    for segment in path.split("/"):
        if match := re.fullmatch(pattern, segment):
            return int(match[1])
    return None


def nearest(name: str, paths: Iterable[str], n: int = 5) -> list[str]:
    """The `n` paths that most resemble `name`, best first: for error messages."""

    def likeness(path: str) -> float:
        def ratio(other: str) -> float:
            return difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()

        return max([ratio(path), *(ratio(segment) for segment in path.split("/"))])

    return sorted(paths, key=likeness, reverse=True)[:n]
