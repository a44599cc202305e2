"""The transform of a parameter tree to an adapted tree, its split into halves, and its inverses."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax

from lora_jax.adapt.observed import traced_roles
from lora_jax.core.aliases import aliases, flatten_with_aliases, resolve_aliases
from lora_jax.core.magnitude import accumulation_dtype
from lora_jax.core.paths import check_prng_key, check_same_paths
from lora_jax.core.types import Adapter, Leaf, Tree
from lora_jax.core.weight import (
    LoraWeight,
    Node,
    Trained,
    is_leaf,
    is_node,
    leaves_of,
    map_leaves,
    refuse_bytes,
)
from lora_jax.rules import Rule
from lora_jax.select.build import make_nodes
from lora_jax.select.left_out import left_out_reasons, warn_of_left_out
from lora_jax.select.matching import LeafFacts, check_target_names
from lora_jax.select.resolve import Decision, bias_path, check_rules, resolve
from lora_jax.select.sharing import (
    check_owners_exist,
    fill_in_shared_arrays,
    owner_of_a,
    owner_suffixes,
    paths_with_shared_arrays,
)
from lora_jax.select.ties import fill_in_tied_vectors, n_copied_elements, tied_nodes, ties_of


def lorafy(
    params: Tree,
    rules: Iterable[Rule],
    *,
    key: jax.Array | None = None,
    trace: Sequence[object] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> Tree:
    """Returns `params` with each selected kernel as a `LoraWeight`, each trained leaf as `Trained`.

    Pure: containers keep their types, and every other leaf is the same object. A `LoraWeight` holds
    the kernel itself; a `Trained` (`TrainedRows` where only some rows train) holds a copy of what
    trains, so that donating it spares `params`.

    Args:
      params: any pytree; its leaves may be `jax.ShapeDtypeStruct`\\ s, which cost nothing.
      rules: the first rule that selects a leaf wins.
      key: a PRNG key, `jax.random.key(0)` by default. Each weight's draws depend on it and on the
        weight's path only, so that adapting one more weight changes no other.
      trace: ``(fn, *args)``, as `fn` is called, `params` among the arguments (arrays may be
        `jax.ShapeDtypeStruct`\\ s). The axis roles of each kernel are then read from what `fn`
        does with it rather than from Flax's convention, and "all-linear" selects each array that
        `fn` multiplies by: no table that is looked up, no gain, nothing that is added to an
        activation, and no kernel that `adapt` would merge at every use. A leaf whose path names an
        embedding or a head stays out only where `fn` uses it, or a kernel of that module, as one.
        A rule's own in_axes and out_axes come first. A kernel that a rule names, and whose roles
        cannot be read, gets those of Flax's convention, with a `RoleWarning`; without a
        conventional name that is an error. Bind keyword arguments with a lambda or
        `functools.partial`.
      kinds: the part of the model that each leaf belongs to ("attention", "mlp", "experts",
        "head", …), by path; presets of targets select by it. For a model of `lora_jax.models`,
        ``lora_jax.models.kinds(model.config)``.

    Warns with a `LeftOutWarning` where "all-linear" leaves out a kernel by name; see `left_out`.

    Raises:
      ValueError: a rule, or a name in its list of targets, selects nothing; a kernel's axis roles
        are unknown; a rule with `share_a` shares nothing; or the tree is adapted already.
      TypeError: a rule is no rule, `key` is no PRNG key, or `trace` is no tuple of a function and
        its arguments.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> tree["dense"]["kernel"]
    LoraWeight(shape=(4, 3), ranks=2, in axes (-2,), out axes (-1,), the rest batch)
    """
    refuse_bytes()
    key = jax.random.key(0) if key is None else check_prng_key("lorafy: key", key)
    # Decide what happens to each leaf, and which weights share an A or a vector.
    leaves, treedef = leaves_of(params)
    selection = _select("lorafy", params, rules, trace, kinds)
    arrays, decisions = selection.arrays, selection.decisions
    warn_of_left_out(selection.left_out, selection.facts)
    nodes = make_nodes(arrays, decisions, key)
    owner_suffix_of_path = owner_suffixes(decisions, arrays)
    ties_of_path = ties_of(decisions, arrays, list(kinds or ()))

    def node_or_leaf(path: str, leaf: Leaf) -> Leaf:
        """Returns the node of a leaf that a rule selects, or the leaf."""
        if path not in nodes:
            return leaf
        node = nodes[path]
        if path in owner_suffix_of_path:
            return node.replace(a_of=owner_suffix_of_path[path])
        if path in ties_of_path:
            return node.replace(ties=ties_of_path[path])
        return node

    # Put the nodes in place, and give weights that share an array the same array.
    adapted_tree = treedef.unflatten(node_or_leaf(path, leaf) for path, leaf in leaves)
    return fill_in_shared_arrays(adapted_tree)


class _Selection(NamedTuple):
    """The decisions of rules for the leaves of a tree.

    Attributes:
      arrays: the leaves by path.
      facts: facts about the leaves beyond their names.
      decisions: the decision for each leaf that a rule selects, by path.
      left_out: the reason for each kernel that "all-linear" leaves out, by path.
    """

    arrays: dict[str, Leaf]
    facts: LeafFacts
    decisions: dict[str, Decision]
    left_out: dict[str, str]


def _select(
    function: str,
    params: Tree,
    rules: Iterable[Rule],
    trace: Sequence[object] | None,
    kinds: Mapping[str, str] | None,
) -> _Selection:
    """Returns the decisions of rules for a plain tree; see `lorafy` for arguments and errors.

    Args:
      function: the name of the public function, for messages.
      params, rules, trace, kinds: see `lorafy`.
    """
    leaves, treedef = leaves_of(params)
    for path, leaf in leaves:
        if is_node(leaf):
            raise ValueError(
                f"The tree is already adapted (at {path!r}). Pass the plain tree to {function}, "
                "which lora_jax.strip(params) returns. To train a new adapter on top of this one, "
                "pass lora_jax.merge(params)."
            )
    arrays = {path: leaf for path, leaf in leaves if hasattr(leaf, "shape")}
    facts = LeafFacts(
        roles=traced_roles(trace, [*arrays.items()]),
        kinds=kinds,
        object_of_alias=aliases(treedef.unflatten(leaf for _, leaf in leaves)),
    )
    checked_rules = check_rules(rules)
    decisions = resolve([*arrays.items()], checked_rules, facts)
    check_target_names(checked_rules, arrays, facts)
    reasons = left_out_reasons(arrays, checked_rules, facts, decisions)
    return _Selection(arrays, facts, decisions, reasons)


def left_out(
    params: Tree,
    rules: Iterable[Rule],
    *,
    trace: Sequence[object] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Returns the reason for each kernel that "all-linear" excludes, by path.

    A reason begins with its kind. With `trace`, the kinds are "looked up", "added", "head",
    "one-hot" and "every use would merge". Without `trace`, they are "head", "embedding" and
    "unnamed": the name of the array does not say that it is a kernel. With `kinds`, it is the kind
    of the leaf. Biases, parts of norms and leaves that a rule excludes are not listed.

    Args:
      params, rules, trace, kinds: as for `lorafy`.

    Raises:
      ValueError, TypeError: in the cases in which `lorafy` raises them.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3))}, "head": {"kernel": jnp.ones((3, 2))}}
    >>> lj.left_out(params, [lj.LoraRule(targets="all-linear", rank=2)])
    {'head/kernel': "head: without a trace, the name 'head' in its path decides"}
    """
    return _select("left_out", params, rules, trace, kinds).left_out


def nodes_of(tree: Tree) -> dict[str, Node]:
    """Returns the nodes of a tree by path; none for a plain tree."""
    return {path: leaf for path, leaf in leaves_of(tree)[0] if is_node(leaf)}


def _nodes_of_adapted_tree(function: str, params: Tree) -> dict[str, Node]:
    """Returns the nodes of an adapted tree by path; raises a ValueError if the tree is plain."""
    nodes = nodes_of(params)
    if nodes:
        return nodes
    raise ValueError(
        f"{function} needs an adapted tree, but this tree has no adapter. Call lorafy first, and "
        "pass its result."
    )


def map_nodes(visit: Callable[[str, Leaf], Leaf], tree: Tree) -> Tree:
    """Returns a tree with ``visit(path, node)`` in place of each node."""
    return map_leaves(lambda path, leaf: visit(path, leaf) if is_node(leaf) else leaf, tree)


def map_parts(visit: Callable[[str, str, Leaf], Leaf], tree: Tree) -> Tree:
    """Returns the tree with ``visit(path, name, array)`` in place of each part of a node.

    `tree` is an adapter, or a whole adapted tree, of which only the nodes' parts are visited.
    """

    def visit_parts(path: str, part_arrays: Mapping[str, Leaf]) -> dict[str, Leaf]:
        return {name: visit(path, name, array) for name, array in part_arrays.items()}

    # The tree is an adapter: a dictionary of the parts of each node, by path.
    if isinstance(tree, Mapping) and all(_is_parts_of_node(value) for value in tree.values()):
        return {path: visit_parts(path, part_arrays) for path, part_arrays in tree.items()}

    # The tree is an adapted tree.

    def visit_node(path: str, node: Leaf) -> Leaf:
        return node.with_parts(visit_parts(path, node.parts()))

    return fill_in_shared_arrays(map_nodes(visit_node, tree))


def _is_parts_of_node(value: object) -> bool:
    """Returns True if a value is the dictionary of one node's arrays."""
    if not isinstance(value, Mapping) or not value:
        return False
    return not any(isinstance(array, Mapping) or is_node(array) for array in value.values())


def split(params: Tree) -> tuple[Adapter, Tree]:
    """Returns the two halves of an adapted tree, (adapter, base); `join` is the exact inverse.

    Args:
      params: an adapted tree.

    Returns:
      adapter: a flat dict ``{path: {"a": …, "b": …}}`` (or ``{"value": …}``; with DoRA "magnitude",
        with a bias on B "bias" as well) of plain arrays, which trains.
      base: the tree with the rest, frozen; where the adapter's arrays were, there is None.

    Raises:
      ValueError: the tree is plain, or a part that lacks a weight whose A another one shares.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> adapter, base = lj.split(tree)
    >>> jax.tree.map(jnp.shape, adapter)
    {'dense/kernel': {'a': (2, 4), 'b': (2, 3)}}
    """
    nodes = _nodes_of_adapted_tree("split", params)
    check_owners_exist(nodes)
    adapter = {path: node.parts() for path, node in nodes.items()}
    return adapter, map_nodes(lambda _, node: node.with_parts({}), params)


def join(adapter: Tree, base: Tree) -> Tree:
    """Returns the inverse of `split`. ``join({}, base)`` is the base alone.

    Args:
      adapter: the arrays that train, by path and name. Adapters may be stacked: all arrays then
        have the same leading axes, along which `jax.vmap` maps over the joined tree.
      base: the frozen half of the tree, or an adapted tree, whose adapter is replaced.

    Raises:
      ValueError: the adapter and the base do not belong together.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> adapter, base = lj.split(tree)
    >>> trained = lj.join(jax.tree.map(lambda array: array + 1, adapter), base)
    >>> float(trained["dense"]["kernel"].b[0, 0])
    1.0
    """
    if not adapter:
        return base
    nodes = nodes_of(base)
    check_same_paths("join", adapter, nodes)
    _check_parts_fit_nodes(adapter, nodes)

    def join_node(path: str, node: Node) -> Node:
        owner_path = owner_of_a(path, nodes)
        if owner_path is None:
            return node.with_parts(adapter[path])
        return node.with_parts({**adapter[path], "a": adapter[owner_path]["a"]})

    joined = map_nodes(join_node, base)
    return fill_in_tied_vectors(joined) if tied_nodes(nodes) else joined


def _check_parts_fit_nodes(adapter: Tree, nodes: Mapping[str, Node]) -> None:
    """Raises a ValueError unless an adapter's parts have the names and shapes of the nodes' parts.

    All arrays may have further leading axes, if these are the same for all of them.
    """
    leading_axes: tuple[int, ...] | None = None
    for path, node in nodes.items():
        names, node_names = sorted(adapter[path]), sorted(node.part_names())
        if names != node_names:
            raise ValueError(
                f"join: the adapter has the arrays {names} for {path!r}, but the tree trains the "
                f"arrays {node_names} there. Adapt the base with the rules of the adapter, or load "
                "the adapter from its folder with lora_jax.load_adapter."
            )
        for name, array in adapter[path].items():
            shape, node_shape = getattr(array, "shape", None), node.part_shape(name)
            if shape is None or node_shape is None:
                continue
            # The first array tells the leading axes, which all others must have, too.
            if leading_axes is None:
                leading_axes = shape[: max(0, len(shape) - len(node_shape))]
            if shape != (*leading_axes, *node_shape):
                raise ValueError(
                    f"join: {name!r} of {path!r} has the shape {shape} in the adapter, but "
                    f"{node_shape} in the tree. Adapt the base with the rules of the adapter "
                    "(rank, layers), or load the adapter from its folder with "
                    "lora_jax.load_adapter."
                )


def strip(params: Tree) -> Tree:
    """Returns the tree as it was before `lorafy`, with the very same leaves.

    A leaf that trains in full has its present value: no copy of its first value is kept.

    Args:
      params: an adapted tree.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> lj.strip(tree)["dense"]["kernel"] is params["dense"]["kernel"]
    True
    """
    return resolve_aliases(map_nodes(lambda _, node: node.base, params))


def merge(params: Tree) -> Tree:
    """Returns the tree with merged weights W + s·AB, which cost nothing extra at inference.

    Each sum is taken in fp32 (or wider) and rounded once to W's dtype. A bias on B is added to the
    bias that stands beside the kernel.

    Args:
      params: an adapted tree.

    Raises:
      ValueError: a weight is adapted for one of its uses or for some tokens only, or has a bias on
        B and beside it no bias of that shape.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> lj.merge(tree)["dense"]["kernel"].shape
    (4, 3)
    """
    leaves, treedef = leaves_of(params)
    weights = {path: leaf for path, leaf in leaves if isinstance(leaf, LoraWeight) and leaf.is_on}
    for path, weight in weights.items():
        _check_mergeable(path, weight)
    factored_weights = {path: weight.factored() for path, weight in weights.items()}
    merged_leaves: dict[str, Leaf] = {}
    for path, leaf in leaves:
        if path in factored_weights:
            merged_leaves[path] = factored_weights[path].merged()
        else:
            merged_leaves[path] = _merge_unadapted_leaf(leaf)
    # The biases are leaves, too: change them after all leaves are merged.
    for path, factored_weight in factored_weights.items():
        if factored_weight.shift is not None:
            _add_shift_to_bias(merged_leaves, path, factored_weight.shift)
    return resolve_aliases(treedef.unflatten(merged_leaves[path] for path, _ in leaves))


def _check_mergeable(path: str, weight: LoraWeight) -> None:
    """Raises a ValueError for a weight that is adapted only for some uses or tokens."""
    if weight.uses != "all":
        limit = "for each of its uses" if weight.uses == "each" else "for one use of it only"
        raise ValueError(
            f"merge: {path!r} has an adapter {limit} (uses={weight.uses!r}), and a merged "
            "weight would apply it to all uses. Run the adapted tree through lora_jax.adapt "
            "instead."
        )
    if weight.invocation is not None:
        raise ValueError(
            f"merge: {path!r} belongs to an activated LoRA, which acts only from its "
            f"invocation {list(weight.invocation)} on, and a merged weight would act on all "
            "tokens. Run the adapted tree through lora_jax.adapt instead."
        )


def _merge_unadapted_leaf(leaf: Leaf) -> Leaf:
    """Returns the array of a leaf that has no active LoRA factors."""
    if not is_node(leaf):
        return leaf
    return leaf.merged() if leaf.is_on else leaf.base


def _add_shift_to_bias(merged_leaves: dict[str, Leaf], path: str, shift: jax.Array) -> None:
    """Adds a weight's shift to the bias beside its kernel.

    Args:
      merged_leaves: the merged leaves by path; the bias is replaced.
      path: path of the weight.
      shift: s times the bias on B.

    Raises:
      ValueError: no bias of the shift's shape stands beside the kernel.
    """
    bias = bias_path(path, merged_leaves)
    shape = None if bias is None else merged_leaves[bias].shape
    if bias is None or shape != shift.shape:
        problem = f"{bias!r} has the shape {shape}" if bias else "no bias stands beside it"
        raise ValueError(
            f"merge: {path!r} cannot be merged, because it has a bias on B of shape "
            f"{shift.shape}, and {problem}. Run the adapted tree through lora_jax.adapt "
            "instead."
        )
    # Add in fp32 or wider, and round once.
    dtype = merged_leaves[bias].dtype
    total = merged_leaves[bias].astype(accumulation_dtype(dtype)) + shift.astype(
        accumulation_dtype(dtype)
    )
    merged_leaves[bias] = total.astype(dtype)


def swap(params: Tree, other: Tree) -> Tree:
    """Returns `params` with the adapter of another tree: factors, scales, trained values.

    Where the two have the same ranks and variants, a function compiled for `params` runs on the
    result without compiling again, whatever the alphas.

    Args:
      params: an adapted tree; its frozen leaves and its dropout are kept.
      other: an adapted tree of the same structure; the values of its frozen leaves do not matter.

    Raises:
      ValueError: the trees do not adapt the same weights in the same way.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> other = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2, alpha=16)])
    >>> float(lj.swap(tree, other)["dense"]["kernel"].scale)
    8.0
    """
    nodes = nodes_of(params)
    other_nodes = _nodes_of_adapted_tree("swap", other)
    check_same_paths("swap", other_nodes, nodes)
    for path, node in nodes.items():
        kind, other_kind = _describe_node(node), _describe_node(other_nodes[path])
        if kind != other_kind:
            raise ValueError(
                f"swap: {path!r} is {kind} in one tree, but {other_kind} in the other. Adapt both "
                "trees with the same rules."
            )

    def swap_node(path: str, node: Node) -> Leaf:
        if isinstance(node, Trained):
            return other_nodes[path]
        swapped = other_nodes[path].replace(base=node.base)
        return swapped.replace(dropout=node.dropout) if isinstance(node, LoraWeight) else swapped

    return map_nodes(swap_node, params)


def _describe_node(node: Node) -> str:
    """Returns a text with the kind, shape and roles of a node, for messages."""
    if isinstance(node, LoraWeight):
        return f"adapted with the shape {node.shape} and {node.roles}"
    return "trained in full" if isinstance(node, Trained) else "trained in some rows"


def trainable_mask(params: Tree) -> Tree:
    """Returns `params` with True for each array that trains (a, b, value), False for all others.

    For an optimiser of the whole tree; see `lora_jax.optim.freeze_base`.

    Args:
      params: an adapted tree.

    Raises:
      ValueError: two weights share an A or a vector; an optimiser over the whole tree would update
        it twice.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> mask = lj.trainable_mask(tree)
    >>> mask["dense"]["bias"], mask["dense"]["kernel"].a, mask["dense"]["kernel"].base
    (False, True, False)
    """

    sharing_paths = paths_with_shared_arrays(nodes_of(params))
    if sharing_paths:
        raise ValueError(
            f"trainable_mask: {sharing_paths[0]!r} shares the A or the vector of another "
            "weight, and an optimizer of the whole tree would train two copies of it. "
            "Optimize the adapter instead, lora_jax.split(params)[0]."
        )

    def leaf_mask(leaf: Leaf) -> Leaf:
        if not is_node(leaf):
            return False
        frozen: Node = jax.tree.map(lambda _: False, leaf)
        return frozen.with_parts(dict.fromkeys(leaf.parts(), True))

    return jax.tree.map(leaf_mask, params, is_leaf=is_node)


def count_params(params: Tree) -> tuple[int, int]:
    """Returns the numbers of (trained, all) parameters, without padding and scales.

    Args:
      params: a tree, adapted or plain; `jax.ShapeDtypeStruct` leaves will do.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> lj.count_params(tree)
    (14, 29)
    """
    keyed_leaves, _ = flatten_with_aliases(params, is_leaf)
    leaves = [leaf for _, leaf in keyed_leaves]
    nodes = [leaf for leaf in leaves if is_node(leaf)]
    bases = [leaf for leaf in leaves if hasattr(leaf, "shape") and not isinstance(leaf, Trained)]
    # Paths do not matter here, so the nodes are numbered.
    training_nodes = {str(index): node for index, node in enumerate(nodes) if node.is_on}
    n_trained = sum(node.n_trainable for node in training_nodes.values())
    n_trained -= n_copied_elements(training_nodes)
    n_frozen = sum(node.n_frozen for node in nodes)
    n_frozen += sum(math.prod(base.shape) for base in bases)
    return n_trained, n_trained + n_frozen


def summary(params: Tree, *, in_training: bool = False) -> str:
    """Returns the line that PEFT's ``print_trainable_parameters`` prints, for an adapted tree.

    Where the rules have dropout, its probability is added: it takes place in calls with a
    `dropout_key` only.

    Args:
      params: as in `count_params`.
      in_training: whether a loop gives that key to each step, as those of `lora_jax.training` do.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> print(lj.summary(tree))
    trainable params: 14 || all params: 29 || trainable%: 48.2759
    """
    n_trained, n_all = count_params(params)
    percentage = 100 * n_trained / n_all if n_all else 0.0
    fields = [
        f"trainable params: {n_trained:,d}",
        f"all params: {n_all:,d}",
        f"trainable%: {percentage:.4f}",
    ]
    weights = [node for node in nodes_of(params).values() if isinstance(node, LoraWeight)]
    rates = sorted({weight.dropout for weight in weights if weight.dropout})
    if rates:
        hint = "" if in_training else " (needs dropout_key)"
        fields.append(f"dropout {', '.join(map(str, rates))}{hint}")
    return " || ".join(fields)
