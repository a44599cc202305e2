"""Resolves rules: finds the leaves of a tree that they select, and decides on each."""

import dataclasses
from collections.abc import Container, Iterable, Mapping, Sequence

import jax.numpy as jnp

from lora_jax.adapt.sides import RoleWarning
from lora_jax.adapt.user_code import place_of_call, warn
from lora_jax.core.axes import AxisRoles, ObservedRoles, default_roles
from lora_jax.core.paths import leaf_name, numbered_layer
from lora_jax.core.types import JsonObject, Leaf
from lora_jax.rules import ALL_LINEAR, PRESETS, LoraRule, Rule, TrainRule
from lora_jax.select.matching import BIASES, NO_ARGUMENT, LeafFacts, no_match_reason, selects

_REMEDY = "Leave it out with exclude=…, or give its in_axes=… and out_axes=… in a rule for it"

Leaves = Sequence[tuple[str, Leaf]]  # path and array, or anything with a shape and a dtype


@dataclasses.dataclass(frozen=True)
class FullTraining:
    """The rules' decision for a leaf that trains: all of it, or some rows of its first axis.

    Attributes:
      rows: indices of the rows; None: all.
      is_table: whether these are rows of a table, or layers of a stack.
    """

    rows: tuple[int, ...] | None = None
    is_table: bool = False


@dataclasses.dataclass(frozen=True)
class Adaptation:
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


Decision = Adaptation | FullTraining


def listed(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Returns the rules of a list or another iterable.

    Raises:
      TypeError: `rules` is no iterable of rules; says what to write.
      ValueError: there are none.
    """
    if isinstance(rules, Rule):
        raise TypeError(f"rules is a list: write [{rules!r}]")
    if isinstance(rules, (str, Mapping)) or not isinstance(rules, Iterable):
        wrong = f"{rules!r}{_peft_hint(rules)}"
        raise TypeError(f"rules is a list, such as [LoraRule(targets=['q_proj'])], not {wrong}")
    rules = tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"a rule is a LoraRule or a TrainRule, not {rule!r}{_peft_hint(rule)}")
    if not rules:
        raise ValueError("no rules: give at least one LoraRule or TrainRule")
    return rules


def resolve(
    leaves: Leaves,
    rules: Iterable[Rule],
    known: LeafFacts = LeafFacts(),  # noqa: B008
) -> dict[str, Decision]:
    """Returns the decision for each leaf that a rule selects, by path; the first rule wins.

    Args:
      leaves: leaves of the tree, with their paths.
      rules: the rules, in the order in which they apply; see `listed`.
      known: facts about the leaves beyond their names.

    Raises:
      ValueError: a rule selects nothing (the message names it and the nearest paths), the roles of
        a selected kernel's axes are unknown, or layers of one stack disagree.
      TypeError: `rules` is no iterable of rules.
    """
    rules = listed(rules)
    for rule in rules:
        if known.kinds is None and rule.targets in PRESETS and rule.targets != ALL_LINEAR:
            raise ValueError(
                f"{rule}: a preset needs to be told what each leaf is: lorafy(params, rules, "
                "kinds=lora_jax.models.kinds(model.config)), or kinds={path: kind} of your own"
            )
    used: set[int] = set()
    resolved: dict[str, Decision] = {}
    tree = dict(leaves)
    for path, leaf in leaves:
        matching = {i: rule for i, rule in enumerate(rules) if selects(rule, path, tree, known)}
        if not matching:
            continue
        index, first = next(iter(matching.items()))
        choice: Decision | None
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
            why = no_match_reason(rule, tree, resolved if index else {}, known)
            raise ValueError(f"{rule} selects nothing: {why}")
    return resolved


def _peft_hint(rules: object) -> str:
    """Returns the remedy for a configuration of PEFT that is given for rules."""
    return ": lora_jax.peft.rules(config) makes rules of it" if hasattr(rules, "peft_type") else ""


def _train(rule: TrainRule, path: str, leaf: Leaf) -> FullTraining | None:
    """Returns the decision for a leaf that a rule selects; None if it is in none of its layers."""
    is_table = rule.rows is not None
    indices = rule.rows if is_table else rule.layers
    if indices is None:
        return FullTraining()
    if is_table and len(leaf.shape) != 2:
        raise ValueError(
            f"{rule}: {path!r} has the shape {tuple(leaf.shape)}; rows are those of a table [n, d]"
        )
    if not is_table and (number := numbered_layer(path, stacked=False)) is not None:
        return FullTraining() if number in indices else None
    n = leaf.shape[0] if leaf.shape else 0
    _check_indices(rule, "row" if is_table else "layer", indices, path, n)
    return FullTraining(tuple(indices), is_table)


def _check_indices(rule: Rule, what: str, indices: Sequence[int], path: str, n: int) -> None:
    if wrong := [index for index in indices if index >= n]:
        raise ValueError(
            f"{rule} asks for {what} {wrong[0]} of {path!r}, which has {n}, counted from 0"
        )


def _biases(paths: Container[str], resolved: Mapping[str, Decision]) -> dict[str, Decision]:
    """Returns the decision for each bias that stands beside a kernel whose rule trains it."""
    decisions: dict[str, Decision] = {}
    for path, choice in resolved.items():
        if isinstance(choice, Adaptation) and choice.rule.train_bias:
            bias = bias_path(path, paths)
            if bias is not None and bias not in resolved:
                on = tuple(layer for layer, rank in enumerate(choice.ranks) if rank)
                decisions[bias] = FullTraining(None if len(on) == len(choice.ranks) else on)
    return decisions


def bias_path(path: str, paths: Container[str]) -> str | None:
    """Returns the path of the bias that stands beside a kernel, if there is one."""
    parent = path.removesuffix(leaf_name(path))
    return next((parent + name for name in BIASES if parent + name in paths), None)


def _adapt(
    rules: Mapping[int, LoraRule], path: str, leaf: Leaf, known: LeafFacts
) -> tuple[Adaptation | None, set[int]]:
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
    return Adaptation(roles, tuple(None if i is None else rules[i] for i in layers)), used


# Fields that may differ between the layers of one stack, with values that replace theirs.
_MAY_DIFFER: JsonObject = dict(targets=".*", exclude=(), layers=None, rank=2, alpha=None)


def _roles(rule: LoraRule, path: str, ndim: int, known: LeafFacts) -> AxisRoles:
    if rule.in_axes is not None and rule.out_axes is not None:
        try:
            return AxisRoles.from_axes(rule.in_axes, rule.out_axes, ndim)
        except ValueError as error:
            raise ValueError(f"{rule}: {path!r}: {error}") from None
    roles = default_roles(leaf_name(path), ndim)
    if known.roles is not None:
        seen = known.roles.get(path, NO_ARGUMENT)
        if isinstance(seen, ObservedRoles):
            return seen.roles
        if roles is None or seen == NO_ARGUMENT:
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
