"""Finds the leaves that a rule selects, or the reason why it selects none.

A rule **names** the leaves whose paths its targets match, and **selects** those of them that it can
adapt or train and that its `exclude` does not match. A **side leaf** is a bias or a part of a norm.
"""

import dataclasses
import re
from collections.abc import Container, Mapping, Sequence

import jax.numpy as jnp

from lora_jax.core.axes import ObservedRoles, default_roles
from lora_jax.core.paths import has_segments, leaf_name, most_similar
from lora_jax.core.types import JsonObject, Leaf
from lora_jax.rules import ALL_LINEAR, PRESETS, AnyOf, LoraRule, Rule, Targets, TrainRule
from lora_jax.select.named_heads import head_reason

# Leaves with two or more axes that a module owns beside its kernel, once layers are stacked.
BIAS_NAMES = ("bias", "b")
_NORM_LEAVES = ("scale", "offset", "mean", "var", "gamma", "beta")
_MIXER_LEAVES = ("sinks", "conv1d", "A_log", "dt_bias")
SIDE_LEAVES = frozenset({*BIAS_NAMES, *_NORM_LEAVES, *_MIXER_LEAVES, "e_score_correction_bias"})

NOT_AN_ARGUMENT = "it is no argument of the function (leaves are matched by identity)"


@dataclasses.dataclass(frozen=True)
class LeafFacts:
    """Facts about the leaves of a tree, by path.

    Attributes:
      roles: the roles that a traced function shows for a leaf, or the reason why it shows none.
        None: axis roles follow from the names of leaves.
      kinds: the part of the model that a leaf belongs to; presets select by it. None: "all-linear"
        selects by names, and no other preset can be used.
      object_of_alias: the path of the object that each alias stands for; see
        `lora_jax.core.aliases`.
    """

    roles: Mapping[str, ObservedRoles | str] | None = None
    kinds: Mapping[str, str] | None = None
    object_of_alias: Mapping[str, str] = dataclasses.field(default_factory=dict)


def selects(rule: Rule, path: str, tree: Mapping[str, Leaf], facts: LeafFacts) -> bool:
    """Returns True if a rule names a leaf, and can adapt or train it."""
    leaf = tree[path]
    if matches(rule.exclude, path) or not _is_named(rule, path, leaf, facts):
        return False
    if isinstance(rule, TrainRule):
        return jnp.issubdtype(leaf.dtype, jnp.inexact)
    return is_matrix(leaf) and not _is_side_leaf(rule, path, tree, facts)


def _is_named(rule: Rule, path: str, leaf: Leaf, facts: LeafFacts) -> bool:
    """Returns True if a rule's targets match a leaf: by a pattern, a preset or a name."""
    targets = rule.targets
    if isinstance(targets, str):
        if targets in PRESETS:
            return _is_in_presets([targets], rule, path, leaf, facts)
        return matches(targets, path)
    # A list may hold names and presets.
    return _is_in_presets(targets, rule, path, leaf, facts) or matches(targets, path)


def _is_in_presets(
    names: Sequence[str], rule: Rule, path: str, leaf: Leaf, facts: LeafFacts
) -> bool:
    """Returns True if a leaf belongs to one of the presets among these names."""
    presets = [name for name in names if name in PRESETS]
    if facts.kinds is not None:
        return any(facts.kinds.get(path) in PRESETS[preset] for preset in presets)
    # Without kinds, only "all-linear" can be used.
    if ALL_LINEAR not in presets or not isinstance(rule, LoraRule):
        return False
    return is_linear(path, leaf, facts) and not head_reason(path, facts.roles)


def is_linear(path: str, leaf: Leaf, facts: LeafFacts) -> bool:
    """Returns True if a leaf is a kernel, by a traced function or else by its name."""
    if facts.roles is None:
        return default_roles(leaf_name(path), len(leaf.shape)) is not None
    observed = facts.roles.get(path)
    return isinstance(observed, ObservedRoles) and not observed.not_kernel_reason


def matches(targets: Targets, path: str) -> bool:
    """Returns True if a pattern or a list of names matches a path."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(has_segments(path, name) for name in targets)


def is_matrix(leaf: Leaf) -> bool:
    return len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _is_side_leaf(rule: LoraRule, path: str, tree: Mapping[str, Leaf], facts: LeafFacts) -> bool:
    """Returns True if a leaf's name marks it as a bias or a part of a norm.

    The name does not count if a traced function shows that the leaf is a kernel. It does not count
    either if the rule gives axis roles, and names the leaf, or the leaf does not look like a bias:
    it has no batch axis and no axis of size one, and no leaf of its module has more axes.
    """
    name = leaf_name(path)
    leaf = tree[path]
    if name not in SIDE_LEAVES:
        return False
    is_traced_kernel = facts.roles is not None and is_linear(path, leaf, facts)
    if is_traced_kernel:
        return False
    if rule.in_axes is None or rule.out_axes is None:
        return True
    rule_names_leaf = not isinstance(rule.targets, str) and name in map(leaf_name, rule.targets)
    if rule_names_leaf:
        return False
    if name not in BIAS_NAMES:
        return True
    ndim = len(leaf.shape)
    has_batch_axis = len(rule.in_axes) + len(rule.out_axes) != ndim
    module = _module_prefix(path)
    ndims_in_module = [
        len(other_leaf.shape)
        for other_path, other_leaf in tree.items()
        if _module_prefix(other_path) == module
    ]
    return has_batch_axis or 1 in leaf.shape or max(ndims_in_module) > ndim


def _module_prefix(path: str) -> str:
    """Returns the path of a leaf's module, with a trailing slash."""
    return path.removesuffix(leaf_name(path))


def check_target_names(rules: Sequence[Rule], tree: Mapping[str, Leaf], facts: LeafFacts) -> None:
    """Raises a ValueError for a name in a rule's list of targets that selects no leaf.

    A leaf counts even if an earlier rule selects it first, or if the rule's `exclude` or `layers`
    rules it out.
    """
    for rule in rules:
        if isinstance(rule.targets, (str, AnyOf)):
            continue
        no_limits: JsonObject = {"exclude": (), "layers": None}
        for name in rule.targets:
            rule_of_name = dataclasses.replace(rule, targets=(name,), **no_limits)
            if not any(selects(rule_of_name, path, tree, facts) for path in tree):
                reason = no_match_reason(rule_of_name, tree, (), facts)
                raise ValueError(f"{rule}: the target {name!r} selects no leaf. {reason}")


def no_match_reason(
    rule: Rule, tree: Mapping[str, Leaf], selected_paths: Container[str], facts: LeafFacts
) -> str:
    """Returns the reason why a rule selects nothing.

    Args:
      rule: the rule.
      tree: the leaves by path.
      selected_paths: paths of the leaves that other rules select; none for the first rule.
      facts: see `resolve`.
    """
    named_leaves = {path: leaf for path, leaf in tree.items() if _is_named(rule, path, leaf, facts)}
    if named_leaves:
        return _no_selection_reason(rule, named_leaves, tree, selected_paths, facts)
    if not tree:
        return "The tree has no leaves. Pass the parameters of your model."
    alias_reason = _alias_reason(rule, tree, facts)
    if alias_reason:
        return alias_reason
    # A string in place of a list of names.
    names = [rule.targets] if isinstance(rule.targets, str) else [*rule.targets]
    names_in_pattern = (
        _module_names_in_pattern(rule.targets, tree) if isinstance(rule.targets, str) else []
    )
    if names_in_pattern:
        return (
            "A string in targets is a pattern for whole paths (re.fullmatch), and names "
            f"belong in a list. Write targets={names_in_pattern}."
        )
    if ALL_LINEAR in names and isinstance(rule, LoraRule) and facts.kinds is None:
        matrices = {path: leaf for path, leaf in tree.items() if is_matrix(leaf)}
        return _not_linear_reason(matrices, facts)
    # The names may be misspelled.
    similar_paths = dict.fromkeys(path for name in names for path in most_similar(name, tree))
    return "\n  ".join(["Name a path of the tree. The most similar paths are:", *similar_paths])


def _no_selection_reason(
    rule: Rule,
    named_leaves: Mapping[str, Leaf],
    tree: Mapping[str, Leaf],
    selected_paths: Container[str],
    facts: LeafFacts,
) -> str:
    """Returns the reason why a rule selects none of the leaves that it names.

    Args:
      rule: the rule.
      named_leaves: the leaves that the rule names, by path: at least one.
      tree, selected_paths, facts: see `no_match_reason`.
    """
    for path in named_leaves:
        if path in selected_paths:
            return (
                f"An earlier rule selects {path!r}, and the first rule wins. Remove one of the two "
                "rules, or exclude the leaf from the earlier one."
            )
    for path in named_leaves:
        if matches(rule.exclude, path):
            return f"Its exclude= contains {path!r}. Change targets or exclude."
    if isinstance(rule, LoraRule):
        matrices = [path for path, leaf in named_leaves.items() if is_matrix(leaf)]
        side_leaves = [path for path in matrices if _is_side_leaf(rule, path, tree, facts)]
        kernels = [path for path in matrices if path not in side_leaves]
        if rule.layers is not None and kernels:
            return f"{kernels[0]!r} has none of the layers {rule.layers}. Change layers or targets."
        if side_leaves:
            return _side_leaf_reason(side_leaves[0], facts)
    for path, leaf in named_leaves.items():
        if len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.integer):
            return (
                f"{path!r} contains integers ({leaf.dtype}), which cannot be trained. Pass "
                "floating-point weights. If you need a quantized base, quantize them with "
                'lora_jax.quantized.quantize(params, "int8"), whose result lorafy can adapt.'
            )
    path, leaf = next(iter(named_leaves.items()))
    return (
        f"{path!r} has the shape {tuple(leaf.shape)} and the dtype {leaf.dtype}, so it is "
        "not a kernel. Use a TrainRule to train such a leaf in full."
    )


def _module_names_in_pattern(pattern: str, tree: Mapping[str, Leaf]) -> list[str]:
    """Returns the module names in a string that contains nothing else."""
    names = [name for name in re.split(r"[\s,|()]+", pattern) if name]
    are_modules = all(any(has_segments(path, name) for path in tree) for name in names)
    return names if are_modules else []


def _alias_reason(rule: Rule, tree: Mapping[str, Leaf], facts: LeafFacts) -> str:
    """Returns the reason why a rule for an alias selects nothing, or ""."""
    for alias_path, object_path in facts.object_of_alias.items():
        for path in tree:
            is_in_object = path == object_path or path.startswith(f"{object_path}/")
            path_through_alias = f"{alias_path}{path.removeprefix(object_path)}"
            if is_in_object and matches(rule.targets, path_through_alias):
                return (
                    f"{alias_path!r} is the same object as {object_path!r}. Use the path "
                    f"{object_path!r} in targets."
                )
    return ""


def _side_leaf_reason(path: str, facts: LeafFacts) -> str:
    """Returns the reason why a rule selects no leaf named as a bias, and a remedy."""
    advice = " Or let lorafy trace your function with lorafy(params, rules, trace=(fn, …))."
    if facts.roles is not None:
        reason = _not_kernel_reason(path, facts.roles)
        advice = f" The traced function does not show these axes: {reason}"
    return (
        f"By its name, {path!r} is a bias or a part of a norm, not a kernel. Use a TrainRule "
        "to train such a leaf in full. If it is a kernel, give its axes in a rule that names "
        f"it, LoraRule(targets=[{leaf_name(path)!r}], in_axes=…, out_axes=…).{advice}"
    )


def _not_kernel_reason(path: str, roles: Mapping[str, ObservedRoles | str]) -> str:
    """Returns the reason why a traced function shows that a leaf is no kernel, or ""."""
    observed = roles.get(path, NOT_AN_ARGUMENT)
    return observed if isinstance(observed, str) else observed.not_kernel_reason


def _not_linear_reason(matrices: Mapping[str, Leaf], facts: LeafFacts) -> str:
    """Returns the reason why "all-linear" selects no leaf with two or more axes."""
    if not matrices:
        return (
            "No leaf is a floating-point array with two axes or more. Pass the parameters of your "
            "model."
        )
    examples = list(matrices)[:5]
    if facts.roles is not None:
        lines = []
        for path in examples:
            reason = _not_kernel_reason(path, facts.roles)
            lines.append(f"{path!r}: {reason or head_reason(path, facts.roles)}")
        problem = (
            "The traced function shows no kernel. Name the kernels in targets, and give their "
            "in_axes=… and out_axes=…. These are the reasons:"
        )
        return "\n  ".join([problem, *lines])
    kernels = [path for path, leaf in matrices.items() if is_linear(path, leaf, facts)]
    if kernels:
        problem = (
            "By their names, all kernels are embeddings or heads. Name those that you want to "
            "adapt in targets:"
        )
        return "\n  ".join([problem, *kernels[:5]])
    problem = (
        'Without a trace, "all-linear" selects kernels by name, and no leaf is named kernel or w. '
        "Let lorafy trace your function with lorafy(params, rules, trace=(fn, params, x)). Or "
        "name the kernels, and give their in_axes=… and out_axes=…. The arrays of two axes or "
        "more are:"
    )
    return "\n  ".join([problem, *map(repr, examples)])
