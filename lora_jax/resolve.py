"""Which leaves of a tree the rules select, and what becomes of each."""

import dataclasses
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax.axes import EMBEDDING_NAMES, AxisRoles, default_roles
from lora_jax.paths import has_run, leaf_name, nearest, numbered_layer
from lora_jax.rules import ALL_LINEAR, LoraRule, Rule, Targets, TrainRule

# Modules that "all-linear" leaves alone: embeddings (also by the name of the leaf) and the heads
# that turn the last hidden state into the model's output.
_NOT_LINEAR = re.compile(
    r"embed\w*|\w*embeddings?|wte|wpe|\w*lm_head|head|unembed\w*|classifier|score|logits"
)
# Those of masked language models: the output layer lies in a module that holds other layers, too.
_INNER_OUTPUT = re.compile(r"(.*/)?cls/predictions/decoder/\w+")
_INNER_LINEAR = re.compile(r"(.*/)?lm_head/dense/\w+")
# Leaves with two or more axes that a module owns beside its kernel, once layers are stacked.
_SIDE_LEAVES = frozenset({"bias", "b", "scale", "offset", "mean", "var", "gamma", "beta"})


# By path, the axis roles that a function was seen to give a leaf, or why there are none.
Looked = Mapping[str, AxisRoles | str] | None


@dataclasses.dataclass(frozen=True)
class InFull:
    """What the rules decided for a leaf that trains: all of it, or some rows of its first axis."""

    rows: tuple[int, ...] | None = None
    is_table: bool = False  # whether the rows are those of a table, or the layers of a stack


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What the rules decided for one kernel: its roles, and a rule for each layer of its stack."""

    roles: AxisRoles
    rules: tuple[LoraRule | None, ...]  # one a layer of batch axis 0; a single one where no stack

    @property
    def rule(self) -> LoraRule:
        """The settings that all layers share (of `rules`, the first)."""
        return next(rule for rule in self.rules if rule is not None)

    @property
    def ranks(self) -> tuple[int, ...]:
        """r of each layer: 0 where the layer isn't adapted."""
        return tuple(rule.rank if rule else 0 for rule in self.rules)

    @property
    def scales(self) -> tuple[float, ...]:
        """s of each layer: 0 where the layer isn't adapted."""
        return tuple(rule.scale if rule else 0.0 for rule in self.rules)


Choice = Adapted | InFull


def resolve(
    leaves: Sequence[tuple[str, Any]],
    rules: Sequence[Rule],
    looked: Looked = None,
) -> dict[str, Choice]:
    """Which of `leaves` (path and array, or anything with a shape) gets which rule; first wins.

    Raises ValueError where a rule selects nothing (naming it and the nearest paths), where the
    roles of a selected kernel's axes are unknown, or where layers of one stack disagree.
    """
    if not rules:
        raise ValueError("no rules: give at least one LoraRule or TrainRule")
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"a rule is a LoraRule or a TrainRule, not {rule!r}")
    used: set[int] = set()
    resolved: dict[str, Choice] = {}
    for path, leaf in leaves:
        matching = [index for index, rule in enumerate(rules) if _selects(rule, path, leaf, looked)]
        if not matching:
            continue
        first = rules[matching[0]]
        if isinstance(first, TrainRule):
            trained = _train(first, path, leaf)
            if trained is not None:
                resolved[path] = trained
                used.add(matching[0])
        elif (adapted := _adapt_layers(path, leaf, rules, matching, used, looked)) is not None:
            resolved[path] = adapted
    resolved |= _biases(leaves, resolved)
    for index, rule in enumerate(rules):
        if index not in used:
            raise ValueError(_no_match(rule, rules[:index], leaves, resolved, looked))
    return resolved


def _train(rule: TrainRule, path: str, leaf: Any) -> InFull | None:
    """What a TrainRule makes of a leaf that it selects; None where it has none of the layers."""
    indices = rule.layers if rule.rows is None else rule.rows
    if indices is None:
        return InFull()
    if rule.rows is not None and len(leaf.shape) != 2:
        raise ValueError(
            f"{rule}: {path!r} has the shape {tuple(leaf.shape)}; rows are those of a table [n, d]"
        )
    if rule.layers is not None and (number := numbered_layer(path, stacked=False)) is not None:
        return InFull() if number in rule.layers else None
    n = leaf.shape[0] if leaf.shape else 0
    if wrong := [index for index in indices if index >= n]:
        what = "row" if rule.rows is not None else "layer"
        raise ValueError(f"{rule}: {what} {wrong[0]} of {path!r}, which has {n}")
    return InFull(tuple(indices), is_table=rule.rows is not None)


def _biases(leaves: Sequence[tuple[str, Any]], resolved: Mapping[str, Choice]) -> dict[str, Choice]:
    """The biases beside kernels whose rule trains them."""
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves}
    found: dict[str, Choice] = {}
    for path, choice in resolved.items():
        if isinstance(choice, Adapted) and choice.rule.train_bias:
            bias = beside(path, shapes)
            if bias is None or bias in resolved:
                continue
            on = tuple(layer for layer, rank in enumerate(choice.ranks) if rank)
            whole = len(on) == len(choice.ranks)
            found[bias] = InFull() if whole else InFull(on)
    return found


def beside(path: str, paths: Container[str]) -> str | None:
    """The path of the bias that stands beside a kernel, if there is one."""
    parent, _, _ = path.rpartition("/")
    for name in ("bias", "b"):
        if (bias := f"{parent}/{name}" if parent else name) in paths:
            return bias
    return None


def _adapt_layers(
    path: str,
    leaf: Any,
    rules: Sequence[Rule],
    matching: list[int],
    used: set[int],
    looked: Looked,
) -> Adapted | None:
    """The rule of each layer of the kernel at `path`; marks those as `used` that take part."""
    candidates = {index: rule for index in matching if isinstance(rule := rules[index], LoraRule)}
    roles = _roles(candidates[matching[0]], path, len(leaf.shape), looked)
    batch = roles.sizes(leaf.shape, "batch")
    number = numbered_layer(path, stacked=bool(batch))
    stacked = number is None and bool(batch)
    layers = range(batch[0]) if stacked else [0 if number is None else number]
    chosen: list[LoraRule | None] = []
    for layer in layers:
        index = next((i for i, rule in candidates.items() if _has_layer(rule, layer)), None)
        chosen.append(None if index is None else candidates[index])
        if index is not None:
            used.add(index)
    if not any(chosen):
        return None
    if stacked:
        for rule in candidates.values():
            if wrong := [layer for layer in rule.layers or () if layer >= batch[0]]:
                raise ValueError(f"{rule}: layer {wrong[0]} of {path!r}, which has {batch[0]}")
    distinct = {
        dataclasses.replace(r, **_MAY_DIFFER, targets=".*", exclude=(), dtype=jnp.dtype(r.dtype))
        for r in chosen
        if r is not None
    }
    if len(distinct) > 1:
        raise ValueError(
            f"the layers of the stack {path!r} get rules that differ in more than rank and alpha; "
            "make all other fields of these rules the same"
        )
    if len(set(chosen)) == 1:
        chosen = chosen[:1]
    return Adapted(roles, tuple(chosen))


# What the layers of one stack may have each of its own.
_MAY_DIFFER: dict[str, Any] = {"layers": None, "rank": 2, "alpha": None}


def _has_layer(rule: LoraRule, layer: int) -> bool:
    return rule.layers is None or layer in rule.layers


def _selects(rule: Rule, path: str, leaf: Any, looked: Looked) -> bool:
    """Whether `rule` names the leaf and (a LoraRule) the leaf can be adapted."""
    if _matches(rule.exclude, path) or not _is_named(rule, path, leaf, looked):
        return False
    if isinstance(rule, TrainRule):
        return jnp.issubdtype(leaf.dtype, jnp.inexact)
    return _is_kernel(path, leaf)


def _is_named(rule: Rule, path: str, leaf: Any, looked: Looked) -> bool:
    if rule.targets != ALL_LINEAR:
        return _matches(rule.targets, path)
    if isinstance(rule, TrainRule) or leaf_name(path) in EMBEDDING_NAMES:
        return False
    known = default_roles(leaf_name(path), len(leaf.shape)) is not None
    if looked is not None:
        known = isinstance(looked.get(path), AxisRoles)
    return known and _is_inner(path)


def _is_inner(path: str) -> bool:
    """Whether the module is neither an embedding nor the output head."""
    if _INNER_LINEAR.fullmatch(path):
        return True
    if _INNER_OUTPUT.fullmatch(path):
        return False
    return not any(_NOT_LINEAR.fullmatch(segment) for segment in path.split("/"))


def _matches(targets: Targets, path: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(has_run(path, name) for name in targets)


def _is_kernel(path: str, leaf: Any) -> bool:
    """A kernel has two axes or more and isn't what a module keeps beside its kernel."""
    if len(leaf.shape) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    return leaf_name(path) not in _SIDE_LEAVES


def _roles(rule: LoraRule, path: str, ndim: int, looked: Looked) -> AxisRoles:
    if rule.in_axes is not None and rule.out_axes is not None:
        try:
            return AxisRoles.of(rule.in_axes, rule.out_axes, ndim)
        except ValueError as error:
            raise ValueError(f"{rule}: {path!r}: {error}") from None
    if looked is not None:
        seen = looked.get(path, "it is not among the arguments (leaves are matched by identity)")
        if isinstance(seen, str):
            raise ValueError(
                f"{rule} selects {path!r}, and trace tells no axis roles for it: {seen}. Leave it "
                "out with exclude=…, or say them in a rule for it with in_axes=… and out_axes=…"
            )
        return seen
    roles = default_roles(leaf_name(path), ndim)
    if roles is None:
        raise ValueError(
            f"{rule} selects {path!r}, whose name tells nothing about its {ndim} axes (kernel, w "
            "and embedding have a convention). Say which are contracted with the input and which "
            "come out with LoraRule(in_axes=…, out_axes=…), or let lorafy look at what your "
            "function does with it: lorafy(params, rules, trace=(fn, params, x))"
        )
    return roles


def _no_match(
    rule: Rule,
    earlier: Sequence[Rule],
    leaves: Sequence[tuple[str, Any]],
    resolved: dict[str, Choice],
    looked: Looked,
) -> str:
    """Why `rule` selected nothing: taken already, not a kernel, or no such name."""
    named = [(path, leaf) for path, leaf in leaves if _is_named(rule, path, leaf, looked)]
    if taken := [path for path, _ in named if path in resolved and earlier]:
        return f"{rule} selects nothing: an earlier rule takes {taken[0]!r} (the first rule wins)"
    if excluded := [path for path, _ in named if _matches(rule.exclude, path)]:
        return f"{rule} selects nothing: its exclude takes out {excluded[0]!r}"
    if isinstance(rule, LoraRule) and rule.layers is not None:
        if kernels := [path for path, leaf in named if _is_kernel(path, leaf)]:
            return f"{rule} selects nothing: {kernels[0]!r} has none of the layers {rule.layers}"
    if named:
        path, leaf = named[0]
        return (
            f"{rule} selects nothing: {path!r} has the shape {tuple(leaf.shape)} and the dtype "
            f"{leaf.dtype}, which is no kernel; a TrainRule trains such a leaf in full"
        )
    if not leaves:
        return f"{rule} selects nothing: the tree has no leaves"
    paths = [path for path, _ in leaves]
    names = [rule.targets] if isinstance(rule.targets, str) else rule.targets
    near = "\n  ".join(dict.fromkeys(path for name in names for path in nearest(name, paths)))
    return f"{rule} selects nothing. The nearest paths are:\n  {near}"
