"""The base that several adapted trees share, checked before any work."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.core.base import is_abstract
from lora_jax.core.types import BaseLike, Leaf, Tree
from lora_jax.core.weight import Trained, is_node, leaves_of
from lora_jax.saving.fingerprint import base_fingerprint, differing


def shared_base(what: str, trees: Mapping[str, Tree]) -> dict[str, Leaf]:
    """Returns the frozen leaves of trees over one base by path: W, or the leaf itself.

    A leaf that trains in full has its earlier value from a tree that leaves it frozen; where there
    is none, it is left out.

    Args:
      what: the function that asks, for messages.
      trees: adapted or plain, by a name for messages.

    Raises:
      ValueError: the trees have different paths, shapes or frozen values.
    """
    first, *others = trees
    found = {name: leaves_of(tree)[0] for name, tree in trees.items()}
    paths = [path for path, _ in found[first]]
    base: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for name, leaves in found.items():
        if [path for path, _ in leaves] != paths:
            only = sorted(set(paths) ^ {path for path, _ in leaves})
            raise ValueError(
                f"{what}: {first} and {name} have different leaves, {only[:3]} among them: the "
                "trees are to be adapted trees of one base"
            )
        for path, leaf in leaves:
            if not isinstance(leaf, Trained):
                owner.setdefault(path, name)
                base.setdefault(path, leaf.base if is_node(leaf) else leaf)
    shapes = {path: getattr(leaf, "shape", None) for path, leaf in found[first]}
    for name in others:
        unlike = {}
        for path, leaf in found[name]:
            here = leaf.base if is_node(leaf) else leaf
            if getattr(here, "shape", None) != shapes[path]:
                raise ValueError(
                    f"{what}: {path!r} has the shape {shapes[path]} in {first} and "
                    f"{getattr(here, 'shape', None)} in {name}: the trees have different bases"
                )
            if not isinstance(leaf, Trained) and here is not base[path]:
                unlike[path] = here
        _check_equal(what, name, unlike, base, owner)
    return base


def _check_equal(
    what: str,
    name: str,
    theirs: Mapping[str, BaseLike],
    base: Mapping[str, BaseLike],
    owner: Mapping[str, str],
) -> None:
    """Raises a ValueError where leaves that are not the same objects have other values."""
    seen = [p for p, leaf in theirs.items() if not is_abstract(leaf) and not is_abstract(base[p])]
    mine, others = ({p: leaves[p] for p in seen} for leaves in (base, theirs))
    if wrong := differing(base_fingerprint(mine), base_fingerprint(others)):
        raise ValueError(
            f"{what}: {owner[wrong[0]]} and {name} have different bases: {len(wrong)} frozen "
            f"leaves differ, {', '.join(wrong[:3])} among them. Load all adapters onto one base, "
            "load_adapter(folder, params)"
        )


def names_of(trees: Sequence[Tree]) -> dict[str, Tree]:
    """Returns the trees by their names in messages: "trees[0]", "trees[1]", …"""
    return {f"trees[{index}]": tree for index, tree in enumerate(trees)}
