"""Resolves rules: finds the leaves of a tree that they select, and decides on each."""

import dataclasses
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax.adapt.sides import RoleWarning
from lora_jax.adapt.user_code import place_of_call, warn
from lora_jax.core.axes import EMBEDDING_NAMES, AxisRoles, Seen, default_roles
from lora_jax.core.paths import has_run, leaf_name, nearest, numbered_layer
from lora_jax.core.types import Leaf
from lora_jax.rules import ALL_LINEAR, PRESETS, LoraRule, Rule, Targets, TrainRule

# Without kinds, "all-linear" leaves these modules alone: embeddings (also by the name of the leaf)
# and the heads that turn the last hidden state into the model's output. In masked language models
# the output layer lies in a module that holds other layers, too.
_NOT_LINEAR = re.compile(
    r"(?!(.*/)?lm_head/dense/\w+$)(.*/)?(cls/predictions/decoder/\w+|(embed\w*|\w*embeddings?|wte|"
    r"wpe|\w*lm_head|head|unembed\w*|classifier|score|logits)(/.*)?)"
)
# Leaves with two or more axes that a module owns beside its kernel, once layers are stacked.
_BIASES = ("bias", "b")
_SIDE_LEAVES = frozenset({*_BIASES, "scale", "offset", "mean", "var", "gamma", "beta"})

_REMEDY = "Leave it out with exclude=…, or give its in_axes=… and out_axes=… in a rule for it"
_NO_ARGUMENT = "it is no argument (leaves are matched by identity)"

Leaves = Sequence[tuple[str, Any]]  # path and array, or anything with a shape and a dtype


@dataclasses.dataclass(frozen=True)
class Known:
    """Facts about the leaves, by path.

    Attributes:
      roles: what a function was seen to do with a leaf, or why that tells no axis roles. None: axis
        roles follow from the names of leaves.
      kinds: the part of the model that a leaf belongs to; presets select by it. None: "all-linear"
        goes by names, and no other preset can be used.
    """

    roles: Mapping[str, Seen | str] | None = None
    kinds: Mapping[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class InFull:
    """The rules' decision for a leaf that trains: all of it, or some rows of its first axis.

    Attributes:
      rows: indices of the rows; None: all.
      is_table: whether these are rows of a table, or layers of a stack.
    """

    rows: tuple[int, ...] | None = None
    is_table: bool = False


@dataclasses.dataclass(frozen=True)
class Adapted:
    """The rules' decision for one kernel.

    Attributes:
      roles: axis roles of the weight.
      rules: one for each layer of batch axis 0, None where the layer isn't adapted; a single one
        where all layers have the same, or there is no stack.
    """

    roles: AxisRoles
    rules: tuple[LoraRule | None, ...]

    @property
    def rule(self) -> LoraRule:
        """The settings that all layers share (of `rules`, the first)."""
        return next(rule for rule in self.rules if rule is not None)

    @property
    def ranks(self) -> tuple[int, ...]:
        """r of each layer: 0 where the layer isn't adapted."""
        return tuple(rule.stored_rank if rule else 0 for rule in self.rules)

    @property
    def scales(self) -> tuple[float, ...]:
        """s of each layer: 0 where the layer isn't adapted."""
        return tuple(rule.scale if rule else 0.0 for rule in self.rules)


Choice = Adapted | InFull


def resolve(
    leaves: Leaves,
    rules: Sequence[Rule],
    known: Known = Known(),  # noqa: B008
) -> dict[str, Choice]:
    """Returns the decision for each leaf that a rule selects, by path; the first rule wins.

    Args:
      leaves: leaves of the tree, with their paths.
      rules: in the order in which they apply.
      known: facts about the leaves beyond their names.

    Raises:
      ValueError: a rule selects nothing (the message names it and the nearest paths), the roles of
        a selected kernel's axes are unknown, or layers of one stack disagree.
      TypeError: one of `rules` is no rule.
    """
    if not rules:
        raise ValueError("no rules: give at least one LoraRule or TrainRule")
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"a rule is a LoraRule or a TrainRule, not {rule!r}")
        if known.kinds is None and rule.targets in PRESETS and rule.targets != ALL_LINEAR:
            raise ValueError(
                f"{rule}: a preset needs to be told what each leaf is: lorafy(params, rules, "
                "kinds=lora_jax.models.kinds(model.config)), or kinds={path: kind} of your own"
            )
    used: set[int] = set()
    resolved: dict[str, Choice] = {}
    tree = dict(leaves)
    for path, leaf in leaves:
        matching = {i: rule for i, rule in enumerate(rules) if _selects(rule, path, tree, known)}
        if not matching:
            continue
        index, first = next(iter(matching.items()))
        choice: Choice | None
        if isinstance(first, TrainRule):
            choice, taking_part = _train(first, path, leaf), {index}
        else:
            lora = {i: rule for i, rule in matching.items() if isinstance(rule, LoraRule)}
            choice, taking_part = _adapt(lora, path, leaf, known)
        if choice is not None:
            resolved[path] = choice
            used |= taking_part
    resolved |= _biases(tree, resolved)
    for index, rule in enumerate(rules):
        if index not in used:
            why = _why_nothing(rule, tree, resolved if index else {}, known)
            raise ValueError(f"{rule} selects nothing: {why}")
    return resolved


def _train(rule: TrainRule, path: str, leaf: Leaf) -> InFull | None:
    """Returns the decision for a leaf that a rule selects; None if it is in none of its layers."""
    is_table = rule.rows is not None
    indices = rule.rows if is_table else rule.layers
    if indices is None:
        return InFull()
    if is_table and len(leaf.shape) != 2:
        raise ValueError(
            f"{rule}: {path!r} has the shape {tuple(leaf.shape)}; rows are those of a table [n, d]"
        )
    if not is_table and (number := numbered_layer(path, stacked=False)) is not None:
        return InFull() if number in indices else None
    n = leaf.shape[0] if leaf.shape else 0
    _check_indices(rule, "row" if is_table else "layer", indices, path, n)
    return InFull(tuple(indices), is_table)


def _check_indices(rule: Rule, what: str, indices: Sequence[int], path: str, n: int) -> None:
    if wrong := [index for index in indices if index >= n]:
        raise ValueError(
            f"{rule} asks for {what} {wrong[0]} of {path!r}, which has {n}, counted from 0"
        )


def _biases(paths: Container[str], resolved: Mapping[str, Choice]) -> dict[str, Choice]:
    """Returns the decision for each bias that stands beside a kernel whose rule trains it."""
    found: dict[str, Choice] = {}
    for path, choice in resolved.items():
        if isinstance(choice, Adapted) and choice.rule.train_bias:
            bias = beside(path, paths)
            if bias is not None and bias not in resolved:
                on = tuple(layer for layer, rank in enumerate(choice.ranks) if rank)
                found[bias] = InFull(None if len(on) == len(choice.ranks) else on)
    return found


def beside(path: str, paths: Container[str]) -> str | None:
    """Returns the path of the bias that stands beside a kernel, if there is one."""
    parent = path.removesuffix(leaf_name(path))
    return next((parent + name for name in _BIASES if parent + name in paths), None)


def _adapt(
    rules: Mapping[int, LoraRule], path: str, leaf: Leaf, known: Known
) -> tuple[Adapted | None, set[int]]:
    """Returns the decision for a kernel and the indices of the rules that take part in it.

    Args:
      rules: rules that select the kernel, by their index.
      path, leaf: the kernel.
      known: see `resolve`.
    """
    roles = _roles(next(iter(rules.values())), path, len(leaf.shape), known)
    batch = roles.sizes(leaf.shape, "batch")
    number = numbered_layer(path, stacked=bool(batch))
    stacked = number is None and bool(batch)

    def first(layer: int) -> int | None:
        on = (i for i, rule in rules.items() if rule.layers is None or layer in rule.layers)
        return next(on, None)

    chosen = [first(layer) for layer in (range(batch[0]) if stacked else [number or 0])]
    used = {index for index in chosen if index is not None}
    if not used:
        return None, used
    if stacked:
        for rule in rules.values():
            _check_indices(rule, "layer", rule.layers or (), path, batch[0])
    shared = [
        dataclasses.replace(rules[i], **_MAY_DIFFER, dtype=jnp.dtype(rules[i].dtype)) for i in used
    ]
    if len(set(shared)) > 1:
        raise ValueError(
            f"the layers of the stack {path!r} get rules that differ in more than rank and alpha; "
            "make all other fields of these rules the same"
        )
    layers = chosen[:1] if len(set(chosen)) == 1 else chosen
    if len(layers) > 1 and shared[0].uses == "each":
        raise ValueError(f"uses='each' is for all layers alike, and those of {path!r} differ")
    return Adapted(roles, tuple(None if i is None else rules[i] for i in layers)), used


# Fields that may differ between the layers of one stack, with values that replace theirs.
_MAY_DIFFER: dict[str, Any] = dict(targets=".*", exclude=(), layers=None, rank=2, alpha=None)


def _selects(rule: Rule, path: str, tree: Mapping[str, Any], known: Known) -> bool:
    """Returns whether a rule names a leaf that it can adapt (a LoraRule) or train."""
    leaf = tree[path]
    if matches(rule.exclude, path) or not _is_named(rule, path, leaf, known):
        return False
    if isinstance(rule, TrainRule):
        return jnp.issubdtype(leaf.dtype, jnp.inexact)
    return _is_matrix(leaf) and not _is_side_leaf(rule, path, tree, known)


def _is_named(rule: Rule, path: str, leaf: Leaf, known: Known) -> bool:
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
    """Returns whether a leaf is an embedding or an output head, by its name."""
    return leaf_name(path) in EMBEDDING_NAMES or _NOT_LINEAR.fullmatch(path) is not None


def _is_linear(path: str, leaf: Leaf, known: Known) -> bool:
    """Returns whether a leaf is known as a kernel: by what was seen of it, or else by its name."""
    if known.roles is None:
        return default_roles(leaf_name(path), len(leaf.shape)) is not None
    seen = known.roles.get(path)
    return isinstance(seen, Seen) and not seen.not_kernel_reason


def matches(targets: Targets, path: str) -> bool:
    """Returns whether targets that are no preset select a path."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(has_run(path, name) for name in targets)


def _is_matrix(leaf: Leaf) -> bool:
    return len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _is_side_leaf(rule: LoraRule, path: str, tree: Mapping[str, Any], known: Known) -> bool:
    """Returns whether the name of a leaf says that it is a bias or a part of a norm.

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
    return name not in _BIASES or not is_whole or max(beside) > len(leaf.shape)


def _roles(rule: LoraRule, path: str, ndim: int, known: Known) -> AxisRoles:
    if rule.in_axes is not None and rule.out_axes is not None:
        try:
            return AxisRoles.of(rule.in_axes, rule.out_axes, ndim)
        except ValueError as error:
            raise ValueError(f"{rule}: {path!r}: {error}") from None
    roles = default_roles(leaf_name(path), ndim)
    if known.roles is not None:
        seen = known.roles.get(path, _NO_ARGUMENT)
        if isinstance(seen, Seen):
            return seen.roles
        if roles is None or seen == _NO_ARGUMENT:
            raise ValueError(
                f"{rule} selects {path!r}, and trace tells no axis roles for it: {seen}. {_REMEDY}"
            )
        guessed = f"trace tells no axis roles for {path!r}: {seen}. It gets those of its name"
        warn(f"{guessed}, {roles}. {_REMEDY}", RoleWarning, place_of_call())
    if roles is None:
        raise ValueError(
            f"{rule} selects {path!r}, whose name tells nothing about its {ndim} axes (kernel, w "
            "and embedding have a convention). Say which are contracted with the input and which "
            "come out with LoraRule(in_axes=…, out_axes=…), or let lorafy look at what your "
            "function does with it: lorafy(params, rules, trace=(fn, params, x))"
        )
    return roles


def _why_nothing(
    rule: Rule, tree: Mapping[str, Any], taken: Mapping[str, Choice], known: Known
) -> str:
    """Returns the reason why a rule selects nothing.

    Args:
      rule: the rule.
      tree: the leaves by path.
      taken: the decisions for the leaves that other rules select; none where the rule is the first.
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
            return _why_side_leaf(side[0], known)
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
    names = [rule.targets] if isinstance(rule.targets, str) else rule.targets
    if ALL_LINEAR in names and isinstance(rule, LoraRule) and known.kinds is None:
        return _why_not_linear({p: leaf for p, leaf in tree.items() if _is_matrix(leaf)}, known)
    near = dict.fromkeys(path for name in names for path in nearest(name, tree))
    return "\n  ".join(["the nearest paths are:", *near])


def _why_side_leaf(path: str, known: Known) -> str:
    """Returns why a rule leaves a leaf alone that has the name of a bias, and what to do."""
    look = "or let lorafy look at what your function does: lorafy(params, rules, trace=(fn, …))"
    if known.roles is not None:
        seen = known.roles.get(path, _NO_ARGUMENT)
        look = (
            f"since trace shows none: {seen if isinstance(seen, str) else seen.not_kernel_reason}"
        )
    return (
        f"{path!r} is taken for a bias or a part of a norm, by its name, so for no kernel; a "
        "TrainRule trains such a leaf in full. If it is a kernel, give its axes in a rule that "
        f"names it, LoraRule(targets=[{leaf_name(path)!r}], in_axes=…, out_axes=…), {look}"
    )


def _why_not_linear(matrices: Mapping[str, Any], known: Known) -> str:
    """Returns why "all-linear" takes none of the leaves with two axes or more, and what to do."""
    if not matrices:
        return "no leaf is an array of floats with two axes or more"
    some = list(matrices)[:5]
    if known.roles is not None:
        reasons = []
        for path in some:
            seen = known.roles.get(path, _NO_ARGUMENT)
            reason = seen if isinstance(seen, str) else seen.not_kernel_reason
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
