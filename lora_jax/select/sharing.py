"""Weights that share one A: whose it is, and how a tree keeps it in one."""

from collections.abc import Mapping

from lora_jax.core.types import Leaf, Tree
from lora_jax.core.weight import LoraWeight, leaves_of, map_leaves
from lora_jax.select.resolve import Adapted, Choice


def owners(chosen: Mapping[str, Choice], leaves: Mapping[str, Leaf]) -> dict[str, str]:
    """Returns the path of the weight whose A each of the others has, by their paths.

    Weights share an A where one rule with `share_a` selects them, and the modules that they are
    the kernels of stand side by side.

    Args:
      chosen: the decision for each selected leaf, by path.
      leaves: the arrays of the tree, by path.

    Raises:
      ValueError: the A's have different shapes.
    """
    first: dict[object, str] = {}
    found: dict[str, str] = {}
    for path, choice in chosen.items():
        if not isinstance(choice, Adapted) or not choice.rule.share_a:
            continue
        beside = path.split("/")[:-2]
        owner = first.setdefault((choice.rule, *beside), path)
        if owner == path:
            continue
        shapes = [_shape_of_a(leaves[each], chosen[each]) for each in (owner, path)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"share_a=True: {owner!r} and {path!r} stand side by side, and their A's differ in "
                f"shape or ranks ({shapes[0]} and {shapes[1]}): give each a rule of its own"
            )
        found[path] = owner
    return found


def _shape_of_a(leaf: Leaf, choice: Choice) -> tuple[object, ...]:
    assert isinstance(choice, Adapted)
    sizes = (choice.roles.sizes(leaf.shape, role) for role in ("batch", "in"))
    return (*sizes, choice.ranks)


def with_shared_a(tree: Tree) -> Tree:
    """Returns a tree in which each weight that shares another's A has the very array."""
    nodes = {path: leaf for path, leaf in leaves_of(tree)[0] if isinstance(leaf, LoraWeight)}
    if all(node.a_of is None for node in nodes.values()):
        return tree

    def shared(path: str, leaf: Leaf) -> Leaf:
        owner = nodes[path].a_of if path in nodes else None
        return leaf if owner is None else leaf.replace(a=nodes[owner].a)

    return map_leaves(shared, tree)
