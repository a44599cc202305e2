"""Weights that share a trained array, one A or one vector, and how a tree holds it once."""

from collections.abc import Mapping

from lora_jax.core.types import Leaf, Tree
from lora_jax.core.weight import LoraWeight, leaves_of, map_leaves
from lora_jax.rules import LoraRule
from lora_jax.select.resolve import Adaptation, Decision
from lora_jax.select.ties import tied_nodes, with_ties


def owners(chosen: Mapping[str, Decision], leaves: Mapping[str, Leaf]) -> dict[str, str]:
    """Returns `LoraWeight.a_of` of each weight that shares another's A, by path.

    Weights share an A where one rule with `share_a` selects them, and the modules that they are
    the kernels of stand side by side. What is returned begins at the owner's module, so that it
    holds wherever in a larger tree, or in a part of the tree, the two stand; see `owner_of`.

    Args:
      chosen: the decision for each selected leaf, by path.
      leaves: the arrays of the tree, by path.

    Raises:
      ValueError: the A's have different shapes, or a rule with `share_a` shares none.
    """
    groups: dict[tuple[LoraRule, object], list[str]] = {}
    for path, choice in chosen.items():
        if isinstance(choice, Adaptation) and choice.rule.share_a:
            groups.setdefault((choice.rule, _place(path)), []).append(path)
    _check_effect(groups)
    shared: dict[str, str] = {}
    for owner, *others in groups.values():
        for path in others:
            shapes = [_shape_of_a(leaves[each], chosen[each]) for each in (owner, path)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"share_a=True: {owner!r} and {path!r} stand side by side, and their A's "
                    f"differ in shape or ranks ({shapes[0]} and {shapes[1]}): give each a rule of "
                    "its own"
                )
            shared[path] = "/".join(owner.split("/")[-2:])
    return shared


def _place(path: str) -> object:
    """Returns the common part of the paths of kernels whose modules stand side by side."""
    segments = path.split("/")
    return (len(segments) > 1, *segments[:-2])  # a leaf without a module stands beside its like


def _check_effect(groups: Mapping[tuple[LoraRule, object], list[str]]) -> None:
    """Raises a ValueError for a rule with `share_a` no two of whose kernels share one."""
    effective = {rule for (rule, _), paths in groups.items() if len(paths) > 1}
    for (rule, _), paths in groups.items():
        if rule not in effective:
            raise ValueError(
                f"{rule}: share_a=True has no effect, since no two kernels of this rule stand side "
                f"by side ({paths[0]!r} stands alone): name both in targets, or leave out share_a"
            )


def _shape_of_a(leaf: Leaf, choice: Decision) -> tuple[object, ...]:
    assert isinstance(choice, Adaptation)
    sizes = (choice.roles.sizes(leaf.shape, role) for role in ("batch", "in"))
    return (*sizes, choice.ranks)


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
            f"{path!r} shares the A of {owner!r} (share_a=True), which this tree does not adapt: "
            "give the part of the tree that holds both, or a rule without share_a"
        )
    return owner


def check_owners(nodes: Mapping[str, Leaf]) -> None:
    """Raises a ValueError where a weight shares the A of one that is not among the nodes."""
    for path in nodes:
        owner_of(path, nodes)


def sharers(nodes: Mapping[str, Leaf]) -> list[str]:
    """Returns the paths of the weights that train an A or a vector together with others."""
    tied = tied_nodes(nodes)
    return [path for path, node in nodes.items() if path in tied or getattr(node, "a_of", None)]


def with_shared(tree: Tree) -> Tree:
    """Returns a tree in which each weight that shares another's A or vector has it.

    Raises:
      ValueError: the tree lacks a weight whose A another one shares.
    """
    nodes = {path: leaf for path, leaf in leaves_of(tree)[0] if isinstance(leaf, LoraWeight)}
    if tied_nodes(nodes):
        tree = with_ties(tree)
    if all(node.a_of is None for node in nodes.values()):
        return tree

    def shared(path: str, leaf: Leaf) -> Leaf:
        owner = owner_of(path, nodes) if path in nodes else None
        return leaf if owner is None else leaf.replace(a=nodes[owner].a)

    return map_leaves(shared, tree)
