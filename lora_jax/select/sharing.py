"""Weights that share a trained array, such as one A, and how a tree stores that array once.

The **owner** of a shared A is the weight in whose part A trains; the other weights of its group
take A from the owner (`LoraWeight.a_of`).
"""

from collections.abc import Mapping

from lora_jax.core.types import Leaf, Tree
from lora_jax.core.weight import LoraWeight, leaves_of, map_leaves
from lora_jax.rules import LoraRule
from lora_jax.select.resolve import Adaptation, Decision
from lora_jax.select.ties import fill_in_tied_vectors, tied_nodes


def owner_suffixes(decisions: Mapping[str, Decision], leaves: Mapping[str, Leaf]) -> dict[str, str]:
    """Returns `LoraWeight.a_of` of each weight that uses another weight's A, by path.

    Weights share an A if one rule with `share_a` selects them, and they are the kernels of sibling
    modules. The value is the end of the owner's path, from the owner's module on, so that it is
    also valid in a larger tree and in a part of the tree; see `owner_of_a`.

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
    _check_that_rules_share(groups)
    suffix_of_path: dict[str, str] = {}
    for group_paths in groups.values():
        owner = group_paths[0]
        owner_shape = _shape_of_a(leaves[owner], decisions[owner])
        for path in group_paths[1:]:
            shape = _shape_of_a(leaves[path], decisions[path])
            if shape != owner_shape:
                raise ValueError(
                    f"share_a=True: {owner!r} and {path!r} are in sibling modules, but their "
                    f"A would differ in shape or rank ({owner_shape} and {shape}). Write a "
                    "separate rule for each kernel."
                )
            suffix_of_path[path] = "/".join(owner.split("/")[-2:])
    return suffix_of_path


def _parent_of_module(path: str) -> object:
    """Returns a key that is equal for kernels of sibling modules."""
    segments = path.split("/")
    has_module = len(segments) > 1  # leaves without a module are siblings themselves
    return (has_module, *segments[:-2])


def _check_that_rules_share(groups: Mapping[tuple[LoraRule, object], list[str]]) -> None:
    """Raises a ValueError for a rule with `share_a` that lets no weights share an A."""
    effective_rules = {rule for (rule, _), paths in groups.items() if len(paths) > 1}
    for (rule, _), paths in groups.items():
        if rule not in effective_rules:
            raise ValueError(
                f"{rule}: share_a=True has no effect, because no two kernels of this rule "
                f"are in sibling modules ({paths[0]!r} has no sibling). Name both kernels in "
                "targets, or remove share_a."
            )


def _shape_of_a(leaf: Leaf, decision: Decision) -> tuple[object, ...]:
    """Returns the sizes of A's batch axes and in axes, and the rank of each layer."""
    assert isinstance(decision, Adaptation)
    roles = decision.roles
    return roles.sizes(leaf.shape, "batch"), roles.sizes(leaf.shape, "in"), decision.ranks


def owner_of_a(path: str, nodes: Mapping[str, Leaf]) -> str | None:
    """Returns the path of the weight whose A a weight uses; None if it has its own A.

    Args:
      path: the weight's path.
      nodes: the nodes of its tree, by path.

    Raises:
      ValueError: the tree lacks the owner.
    """
    owner_suffix = getattr(nodes[path], "a_of", None)
    if owner_suffix is None:
        return None
    # The suffix takes the place of the last segments of the weight's path.
    segments = path.split("/")
    n_suffix_segments = len(owner_suffix.split("/"))
    owner = "/".join([*segments[:-n_suffix_segments], owner_suffix])
    if owner not in nodes:
        raise ValueError(
            f"{path!r} shares the A of {owner!r} (share_a=True), but {owner!r} is not "
            "adapted in this tree. Pass the part of the tree that contains both, or use a "
            "rule without share_a."
        )
    return owner


def check_owners_exist(nodes: Mapping[str, Leaf]) -> None:
    """Raises a ValueError if a weight uses the A of a weight that is missing."""
    for path in nodes:
        owner_of_a(path, nodes)


def paths_with_shared_arrays(nodes: Mapping[str, Leaf]) -> list[str]:
    """Returns the paths of the weights that share a trained A or vector."""
    tied_paths = tied_nodes(nodes).keys()
    return [
        path
        for path, node in nodes.items()
        if path in tied_paths or getattr(node, "a_of", None) is not None
    ]


def fill_in_shared_arrays(tree: Tree) -> Tree:
    """Returns a tree in which each weight holds the A or vector that it shares.

    Raises:
      ValueError: the tree lacks a weight whose A another one shares.
    """
    nodes = {path: leaf for path, leaf in leaves_of(tree)[0] if isinstance(leaf, LoraWeight)}
    if tied_nodes(nodes):
        tree = fill_in_tied_vectors(tree)
    if all(node.a_of is None for node in nodes.values()):
        return tree

    def take_a(path: str, leaf: Leaf) -> Leaf:
        owner = owner_of_a(path, nodes) if path in nodes else None
        return leaf if owner is None else leaf.replace(a=nodes[owner].a)

    return map_leaves(take_a, tree)
