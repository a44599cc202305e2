"""Weights that share a trained array, one A or one vector, and how a tree holds it once.

The **owner** of a shared A is the weight in whose part A trains; the other weights of its group
take A from the owner (`LoraWeight.a_of`).
"""

from collections.abc import Mapping

from lora_jax.core.types import Leaf, Tree
from lora_jax.core.weight import LoraWeight, leaves_of, map_leaves
from lora_jax.rules import LoraRule
from lora_jax.select.resolve import Adaptation, Decision
from lora_jax.select.ties import tied_nodes, with_ties


def owners(decisions: Mapping[str, Decision], leaves: Mapping[str, Leaf]) -> dict[str, str]:
    """Returns `LoraWeight.a_of` of each weight that shares another's A, by path.

    Weights share an A where one rule with `share_a` selects them, and the modules that they are
    the kernels of stand side by side. The value is the end of the owner's path from its module on,
    so that it also holds in a larger tree, and in a part of the tree; see `owner_of`.

    Args:
      decisions: the decision for each selected leaf, by path.
      leaves: the arrays of the tree, by path.

    Raises:
      ValueError: the A's have different shapes, or a rule with `share_a` shares none.
    """
    groups: dict[tuple[LoraRule, object], list[str]] = {}
    for path, decision in decisions.items():
        if isinstance(decision, Adaptation) and decision.rule.share_a:
            groups.setdefault((decision.rule, _parent_of_module(path)), []).append(path)
    _check_effect(groups)
    a_of: dict[str, str] = {}
    for owner, *sharing in groups.values():
        owner_shape = _shape_of_a(leaves[owner], decisions[owner])
        for path in sharing:
            shape = _shape_of_a(leaves[path], decisions[path])
            if shape != owner_shape:
                raise ValueError(
                    f"share_a=True: {owner!r} and {path!r} are in sibling modules, but their "
                    f"A would differ in shape or rank ({owner_shape} and {shape}). Give each "
                    "kernel a rule of its own."
                )
            a_of[path] = "/".join(owner.split("/")[-2:])
    return a_of


def _parent_of_module(path: str) -> object:
    """Returns a key that is equal for kernels whose modules stand side by side."""
    segments = path.split("/")
    has_module = len(segments) > 1  # leaves without a module stand side by side themselves
    return (has_module, *segments[:-2])


def _check_effect(groups: Mapping[tuple[LoraRule, object], list[str]]) -> None:
    """Raises a ValueError for a rule with `share_a` that shares no A."""
    effective_rules = {rule for (rule, _), paths in groups.items() if len(paths) > 1}
    for (rule, _), paths in groups.items():
        if rule not in effective_rules:
            raise ValueError(
                f"{rule}: share_a=True has no effect, because no two kernels of this rule "
                f"are in sibling modules ({paths[0]!r} has no sibling). Name both kernels in "
                "targets, or remove share_a."
            )


def _shape_of_a(leaf: Leaf, decision: Decision) -> tuple[object, ...]:
    """Returns the batch sizes and the in sizes of A, and the rank of each layer."""
    assert isinstance(decision, Adaptation)
    roles = decision.roles
    return roles.sizes(leaf.shape, "batch"), roles.sizes(leaf.shape, "in"), decision.ranks


def owner_of(path: str, nodes: Mapping[str, Leaf]) -> str | None:
    """Returns the path of the weight whose A another weight shares; None for an A of its own.

    Args:
      path: the weight's path.
      nodes: the nodes of its tree, by path.

    Raises:
      ValueError: the tree lacks the owner.
    """
    a_of = getattr(nodes[path], "a_of", None)
    if a_of is None:
        return None
    owner = "/".join([*path.split("/")[: -len(a_of.split("/"))], a_of])
    if owner not in nodes:
        raise ValueError(
            f"{path!r} shares the A of {owner!r} (share_a=True), but {owner!r} is not "
            "adapted in this tree. Pass the part of the tree that contains both, or use a "
            "rule without share_a."
        )
    return owner


def check_owners(nodes: Mapping[str, Leaf]) -> None:
    """Raises a ValueError for a weight that shares the A of a weight that the nodes lack."""
    for path in nodes:
        owner_of(path, nodes)


def sharers(nodes: Mapping[str, Leaf]) -> list[str]:
    """Returns the paths of the weights that train an A or a vector together with others."""
    tied = tied_nodes(nodes)
    return [path for path, node in nodes.items() if path in tied or getattr(node, "a_of", None)]


def with_shared(tree: Tree) -> Tree:
    """Returns a tree in which each weight that shares an A or a vector holds the trained array.

    Raises:
      ValueError: the tree lacks a weight whose A another one shares.
    """
    nodes = {path: leaf for path, leaf in leaves_of(tree)[0] if isinstance(leaf, LoraWeight)}
    if tied_nodes(nodes):
        tree = with_ties(tree)
    if all(node.a_of is None for node in nodes.values()):
        return tree

    def take_a(path: str, leaf: Leaf) -> Leaf:
        owner = owner_of(path, nodes) if path in nodes else None
        return leaf if owner is None else leaf.replace(a=nodes[owner].a)

    return map_leaves(take_a, tree)
