"""Finds the leaves that a rule selects, or the reason why it selects none."""

import dataclasses
import re
from collections.abc import Container, Mapping, Sequence

import jax.numpy as jnp

from lora_jax.core.axes import EMBEDDING_NAMES, ObservedRoles, default_roles
from lora_jax.core.paths import has_run, leaf_name, nearest
from lora_jax.core.types import JsonObject, Leaf
from lora_jax.rules import ALL_LINEAR, PRESETS, AnyOf, LoraRule, Rule, Targets, TrainRule

# Without kinds, "all-linear" leaves these modules alone: embeddings (also by the name of the leaf)
# and the heads that turn the last hidden state into the model's output. In masked language models
# the output layer lies in a module that holds other layers, too.
_NOT_LINEAR = re.compile(
    r"(?!(.*/)?lm_head/dense/\w+$)(.*/)?(cls/predictions/decoder/\w+|(embed\w*|\w*embeddings?|wte|"
    r"wpe|\w*lm_head|head|unembed\w*|classifier|score|logits)(/.*)?)"
)
# Leaves with two or more axes that a module owns beside its kernel, once layers are stacked.
BIASES = ("bias", "b")
_OF_NORMS = ("scale", "offset", "mean", "var", "gamma", "beta")
_OF_MIXERS = ("sinks", "conv1d", "A_log", "dt_bias")
_SIDE_LEAVES = frozenset({*BIASES, *_OF_NORMS, *_OF_MIXERS, "e_score_correction_bias"})

NO_ARGUMENT = "it is no argument (leaves are matched by identity)"


@dataclasses.dataclass(frozen=True)
class LeafFacts:
    """Facts about the leaves, by path.

    Attributes:
      roles: what a function was seen to do with a leaf, or why that tells no axis roles. None: axis
        roles follow from the names of leaves.
      kinds: the part of the model that a leaf belongs to; presets select by it. None: "all-linear"
        goes by names, and no other preset can be used.
      shared: the path of the object that stands at a path, too; see `lora_jax.core.aliases`.
    """

    roles: Mapping[str, ObservedRoles | str] | None = None
    kinds: Mapping[str, str] | None = None
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)


def selects(rule: Rule, path: str, tree: Mapping[str, Leaf], known: LeafFacts) -> bool:
    """Returns True if a rule names a leaf that it can adapt (a LoraRule) or train."""
    leaf = tree[path]
    if matches(rule.exclude, path) or not _is_named(rule, path, leaf, known):
        return False
    if isinstance(rule, TrainRule):
        return jnp.issubdtype(leaf.dtype, jnp.inexact)
    return _is_matrix(leaf) and not _is_side_leaf(rule, path, tree, known)


def _is_named(rule: Rule, path: str, leaf: Leaf, known: LeafFacts) -> bool:
    if isinstance(rule.targets, str) and rule.targets not in PRESETS:
        return matches(rule.targets, path)
    names = [rule.targets] if isinstance(rule.targets, str) else rule.targets
    presets = [name for name in names if name in PRESETS]
    if known.kinds is not None:
        if any(known.kinds.get(path) in PRESETS[preset] for preset in presets):
            return True
    elif ALL_LINEAR in presets and isinstance(rule, LoraRule) and not is_table_or_head(path):
        if _is_linear(path, leaf, known):
            return True
    return names is rule.targets and matches(names, path)


def is_table_or_head(path: str) -> bool:
    """Returns True if a leaf is an embedding or an output head, by its name."""
    return leaf_name(path) in EMBEDDING_NAMES or _NOT_LINEAR.fullmatch(path) is not None


def _is_linear(path: str, leaf: Leaf, known: LeafFacts) -> bool:
    """Returns True if a leaf is known as a kernel: by what was seen of it, or else by its name."""
    if known.roles is None:
        return default_roles(leaf_name(path), len(leaf.shape)) is not None
    seen = known.roles.get(path)
    return isinstance(seen, ObservedRoles) and not seen.not_kernel_reason


def matches(targets: Targets, path: str) -> bool:
    """Returns True if targets that are no preset select a path."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(has_run(path, name) for name in targets)


def _is_matrix(leaf: Leaf) -> bool:
    return len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _is_side_leaf(rule: LoraRule, path: str, tree: Mapping[str, Leaf], known: LeafFacts) -> bool:
    """Returns True if the name of a leaf says that it is a bias or a part of a norm.

    The name does not count where the leaf was seen to be a kernel. Nor does it where the rule gives
    axis roles and either names the leaf, or nothing about it looks like a bias: no axis is a batch
    axis, none has size one, and no leaf of its module has more axes.
    """
    parent, name = path.removesuffix(leaf_name(path)), leaf_name(path)
    if name not in _SIDE_LEAVES:
        return False
    leaf = tree[path]
    if known.roles is not None and _is_linear(path, leaf, known):
        return False
    if rule.in_axes is None or rule.out_axes is None:
        return True
    if not isinstance(rule.targets, str) and name in map(leaf_name, rule.targets):
        return False
    beside = [len(t.shape) for p, t in tree.items() if p.removesuffix(leaf_name(p)) == parent]
    is_whole = len(rule.in_axes) + len(rule.out_axes) == len(leaf.shape) and 1 not in leaf.shape
    return name not in BIASES or not is_whole or max(beside) > len(leaf.shape)


def check_names(rules: Sequence[Rule], tree: Mapping[str, Leaf], known: LeafFacts) -> None:
    """Raises a ValueError for a name in a rule's list that selects nothing beside others that do.

    Names count whose leaves an earlier rule takes, or the rule's own exclude or layers leave out.
    """
    for rule in rules:
        if isinstance(rule.targets, (str, AnyOf)):
            continue
        everywhere: JsonObject = {"exclude": (), "layers": None}
        for name in rule.targets:
            alone = dataclasses.replace(rule, targets=(name,), **everywhere)
            if not any(selects(alone, path, tree, known) for path in tree):
                why = no_match_reason(alone, tree, (), known)
                raise ValueError(f"{rule}: the target {name!r} selects nothing: {why}")


def no_match_reason(
    rule: Rule, tree: Mapping[str, Leaf], taken: Container[str], known: LeafFacts
) -> str:
    """Returns the reason why a rule selects nothing.

    Args:
      rule: the rule.
      tree: the leaves by path.
      taken: paths of the leaves that other rules select; none where the rule is the first.
      known: see `resolve`.
    """
    named = {path: leaf for path, leaf in tree.items() if _is_named(rule, path, leaf, known)}
    if gone := [path for path in named if path in taken]:
        return f"an earlier rule takes {gone[0]!r} (the first rule wins)"
    if excluded := [path for path in named if matches(rule.exclude, path)]:
        return f"its exclude takes out {excluded[0]!r}"
    if isinstance(rule, LoraRule):
        matrices = [path for path, leaf in named.items() if _is_matrix(leaf)]
        side = [path for path in matrices if _is_side_leaf(rule, path, tree, known)]
        if rule.layers is not None and (kernels := [path for path in matrices if path not in side]):
            return f"{kernels[0]!r} has none of the layers {rule.layers}"
        if side:
            return _side_leaf_reason(side[0], known)
    for path, leaf in named.items():
        if len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.integer):
            return (
                f"{path!r} holds whole numbers ({leaf.dtype}), which do not train: give floats and "
                'have lora_jax.quantized.quantize(params, "int8") make codes that lorafy adapts'
            )
    if named:
        path, leaf = next(iter(named.items()))
        return (
            f"{path!r} has the shape {tuple(leaf.shape)} and the dtype {leaf.dtype}, which is no "
            "kernel; a TrainRule trains such a leaf in full"
        )
    if not tree:
        return "the tree has no leaves"
    if shared := _shared_reason(rule, tree, known):
        return shared
    if isinstance(rule.targets, str) and (names := _names_in(rule.targets, tree)):
        return (
            "a string is a pattern for whole paths (of re.fullmatch). A list holds names: write "
            f"targets={names}"
        )
    names = [rule.targets] if isinstance(rule.targets, str) else [*rule.targets]
    if ALL_LINEAR in names and isinstance(rule, LoraRule) and known.kinds is None:
        return _not_linear_reason({p: leaf for p, leaf in tree.items() if _is_matrix(leaf)}, known)
    near = dict.fromkeys(path for name in names for path in nearest(name, tree))
    return "\n  ".join(["the nearest paths are:", *near])


def _names_in(pattern: str, tree: Mapping[str, Leaf]) -> list[str]:
    """Returns the names of modules that a string holds, if it holds nothing else."""
    names = [name for name in re.split(r"[\s,|()]+", pattern) if name]
    return names if all(any(has_run(path, name) for path in tree) for name in names) else []


def _shared_reason(rule: Rule, tree: Mapping[str, Leaf], known: LeafFacts) -> str:
    """Returns the reason why a rule for a later place of a shared object selects nothing, or ""."""
    for place, first in known.shared.items():
        for path in tree:
            rest = path.removeprefix(first)
            is_inside = path == first or path.startswith(f"{first}/")
            if is_inside and matches(rule.targets, f"{place}{rest}"):
                return f"what stands at {place!r} is {first!r} itself: name that path"
    return ""


def _side_leaf_reason(path: str, known: LeafFacts) -> str:
    """Returns the reason why a rule leaves a leaf alone that is named as a bias, and a remedy."""
    look = "or let lorafy look at what your function does: lorafy(params, rules, trace=(fn, …))"
    if known.roles is not None:
        look = f"since trace shows none: {_not_kernel_reason(path, known.roles)}"
    return (
        f"{path!r} is taken for a bias or a part of a norm, by its name, so for no kernel; a "
        "TrainRule trains such a leaf in full. If it is a kernel, give its axes in a rule that "
        f"names it, LoraRule(targets=[{leaf_name(path)!r}], in_axes=…, out_axes=…), {look}"
    )


def _not_kernel_reason(path: str, roles: Mapping[str, ObservedRoles | str]) -> str:
    """Returns the reason why a leaf was not seen to be used as a kernel; "" where it was."""
    seen = roles.get(path, NO_ARGUMENT)
    return seen if isinstance(seen, str) else seen.not_kernel_reason


def _not_linear_reason(matrices: Mapping[str, Leaf], known: LeafFacts) -> str:
    """Returns the reason why "all-linear" takes no leaf with two axes or more, and a remedy."""
    if not matrices:
        return "no leaf is an array of floats with two axes or more"
    some = list(matrices)[:5]
    if known.roles is not None:
        reasons = []
        for path in some:
            reason = _not_kernel_reason(path, known.roles)
            reasons.append(f"{path!r}: {reason or 'an embedding or a head, by its name'}")
        return "\n  ".join(["trace shows no kernel:", *reasons])
    if kernels := [p for p, leaf in matrices.items() if _is_linear(p, leaf, known)]:
        what = "all kernels are embeddings or heads, by their names. Name those to adapt:"
        return "\n  ".join([what, *kernels[:5]])
    what = (
        "it goes by names, and no leaf is called kernel or w. Let lorafy look at what your "
        "function does with each: lorafy(params, rules, trace=(fn, params, x)). Or name the "
        "kernels, and say their axes with in_axes=… and out_axes=…; arrays of two axes or more are:"
    )
    return "\n  ".join([what, *map(repr, some)])
