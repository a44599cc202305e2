"""The base that several adapted trees share, checked before any work."""

from collections.abc import Mapping

from lora_jax.core.base import is_abstract
from lora_jax.core.types import Leaf, Tree
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
    leaves_of_tree = {name: dict(leaves_of(tree)[0]) for name, tree in trees.items()}
    first = next(iter(leaves_of_tree))
    base: dict[str, Leaf] = {}
    owner: dict[str, str] = {}
    for name, leaves in leaves_of_tree.items():
        if list(leaves) != list(leaves_of_tree[first]):
            only = sorted(leaves.keys() ^ leaves_of_tree[first].keys())
            raise ValueError(
                f"{what}: {first} and {name} have different leaves, {only[:3]} among them: the "
                "trees are to be adapted trees of one base"
            )
        unlike: dict[str, Leaf] = {}
        for path, leaf in leaves.items():
            mine, here = (x.base if is_node(x) else x for x in (leaves_of_tree[first][path], leaf))
            shapes = [getattr(x, "shape", None) for x in (mine, here)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{what}: {path!r} has the shape {shapes[0]} in {first} and {shapes[1]} in "
                    f"{name}: the trees have different bases"
                )
            if isinstance(leaf, Trained):
                continue
            owner.setdefault(path, name)
            if base.setdefault(path, here) is not here and not is_abstract((here, base[path])):
                unlike[path] = here
        mine = {path: base[path] for path in unlike}
        if wrong := differing(base_fingerprint(mine), base_fingerprint(unlike)):
            raise ValueError(
                f"{what}: {owner[wrong[0]]} and {name} have different bases: {len(wrong)} frozen "
                f"leaves differ, {', '.join(wrong[:3])} among them. Load all adapters onto one "
                "base, load_adapter(folder, params)"
            )
    return base
