"""Finds, without running a jaxpr, which inputs it returns and which outputs may be weights.

The **source** of a value is the operand or input that it is, perhaps with its axes moved.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from lora_jax.adapt import eqns
from lora_jax.core.extend import JaxprEqn

Sources = tuple[int | None, ...]
_CALLS = frozenset({"jit", "pjit", "closed_call", "remat2", "checkpoint"})
_T = TypeVar("_T")


class _Source(NamedTuple):
    """The operand that a value equals, up to a permutation of its axes.

    Attributes:
      operand: index of the operand.
      order: for each axis of the value, the axis of the operand.
    """

    operand: int
    order: tuple[int, ...]


def sources_of_outputs(jaxpr: eqns.AnyJaxpr) -> Sources:
    """Returns the index of the input that each output equals, or None for others.

    It looks into functions, loops and branches, and follows axes that are moved away and back.
    """
    return tuple(map(_index_if_unmoved, _input_sources(jaxpr)))


def sources_among_variables(
    jaxpr: eqns.AnyJaxpr, index_of_variable: Mapping[eqns.Atom, int]
) -> Sources:
    """Returns the index of the variable that each output equals, or None for others."""
    return tuple(map(_index_if_unmoved, _moved_sources_among_variables(jaxpr, index_of_variable)))


def common_sources(branches: Sequence[eqns.AnyJaxpr]) -> Sources:
    """Returns the index of the input that every branch returns as an output, or None."""
    indices_of_branches = [sources_of_outputs(branch) for branch in branches]
    return tuple(_common_value(indices) for indices in zip(*indices_of_branches, strict=True))


def _index_if_unmoved(source: _Source | None) -> int | None:
    """Returns the index of the source operand if its axes are not permuted, or None."""
    if source is None:
        return None
    is_moved = source.order != tuple(range(len(source.order)))
    return None if is_moved else source.operand


def _common_value(values: Sequence[_T]) -> _T | None:
    return values[0] if len(set(values)) == 1 else None


def _moved_sources_among_variables(
    jaxpr: eqns.AnyJaxpr, index_of_variable: Mapping[eqns.Atom, int]
) -> list[_Source | None]:
    """Returns the source of each output among some variables, or None."""
    inner, _ = eqns.jaxpr_and_consts(jaxpr)
    eqn_of_variable: dict[eqns.Atom, tuple[JaxprEqn, int]] = {}  # with the index of the output
    for eqn in inner.eqns:
        for output_index, output in enumerate(eqn.outvars):
            eqn_of_variable[output] = (eqn, output_index)
    sources_of_eqn: dict[int, Sequence[_Source | None]] = {}  # by identity

    def source_of(atom: eqns.Atom) -> _Source | None:
        """Follows a value back through transposes, calls and loops."""
        order = tuple(range(getattr(eqns.type_of(atom), "ndim", 0)))
        while not eqns.is_literal(atom):
            if atom in index_of_variable:
                return _Source(index_of_variable[atom], order)
            if atom not in eqn_of_variable:
                return None
            eqn, output_index = eqn_of_variable[atom]
            if id(eqn) not in sources_of_eqn:
                sources_of_eqn[id(eqn)] = _operand_sources(eqn)
            source = sources_of_eqn[id(eqn)][output_index]
            if source is None:
                return None
            atom = eqn.invars[source.operand]
            order = tuple(source.order[axis] for axis in order)
        return None

    return list(map(source_of, inner.outvars))


def _input_sources(jaxpr: eqns.AnyJaxpr) -> list[_Source | None]:
    inner, _ = eqns.jaxpr_and_consts(jaxpr)
    return _moved_sources_among_variables(
        jaxpr, {variable: index for index, variable in enumerate(inner.invars)}
    )


def _operand_sources(eqn: JaxprEqn) -> Sequence[_Source | None]:
    """Returns the source of each output of an equation among its operands, or None."""
    name = eqn.primitive.name
    if name == "transpose":
        return [_Source(0, tuple(eqn.params["permutation"]))]
    if name in _CALLS:
        return _input_sources(_called_jaxpr(eqn))
    if name == "cond":
        sources_of_branches = [_input_sources(branch) for branch in eqn.params["branches"]]
        # The first operand of a cond, the index of the branch, is no argument of a branch.
        return [
            _shift_operand_index(_common_value(source_of_branches), 1)
            for source_of_branches in zip(*sources_of_branches, strict=True)
        ]
    if name == "scan":
        return _scan_sources(eqns.read_scan(eqn))
    if name == "while":
        loop = eqns.read_while(eqn)
        carries = _unchanged_carries(_input_sources(loop.body), loop.n_body_consts)
        # The condition's constants come before the arguments of the body.
        return [_shift_operand_index(source, loop.n_condition_consts) for source in carries]
    return [None] * len(eqn.outvars)


def _scan_sources(scan: eqns.Scan) -> list[_Source | None]:
    """Returns the source of each output of a scan: a carry, or a stack of slices."""
    sources_in_body = _input_sources(scan.body)
    n_unsliced = scan.n_consts + scan.n_carry
    scan_sources = _unchanged_carries(sources_in_body[: scan.n_carry], scan.n_consts)
    for source in sources_in_body[scan.n_carry :]:
        if source is not None and source.operand >= n_unsliced:
            scan_sources.append(_source_of_stack(source))
        else:
            scan_sources.append(None)
    return scan_sources


def _shift_operand_index(source: _Source | None, n_operands: int) -> _Source | None:
    """Returns the source with its operand index shifted by `n_operands`."""
    return None if source is None else _Source(n_operands + source.operand, source.order)


def _source_of_stack(source: _Source) -> _Source:
    """Returns the source of an output that stacks slices of an operand."""
    return _Source(source.operand, (0, *(axis + 1 for axis in source.order)))


def _unchanged_carries(
    sources_in_body: Sequence[_Source | None], n_consts: int
) -> list[_Source | None]:
    """Returns the source of each carry that a loop does not change, None for the others.

    Args:
      sources_in_body: for each carry that the body returns, the argument of the body that it is.
      n_consts: the number of constants, which are the first arguments.
    """
    carries: list[_Source | None] = []
    for index, source in enumerate(sources_in_body):
        is_unchanged = _index_if_unmoved(source) == n_consts + index
        carries.append(source if is_unchanged else None)
    return carries


def input_that_selects(jaxpr: eqns.AnyJaxpr, stack_index: int) -> int | None:
    """Returns the input that is the index at which a jaxpr takes one member of a stack.

    None if the jaxpr uses the stack in any other way. It looks into functions.

    Args:
      jaxpr: the jaxpr.
      stack_index: the index of the input that is a stack; its members lie along axis 0.
    """
    inner, _ = eqns.jaxpr_and_consts(jaxpr)
    stack = inner.invars[stack_index]
    selectors: list[eqns.Atom | None] = [None for output in inner.outvars if output is stack]
    for eqn in inner.eqns:
        for operand_index, operand in enumerate(eqn.invars):
            if operand is stack:
                selectors.append(_selector_of_member(eqn, operand_index))
    for index, variable in enumerate(inner.invars):
        if selectors and all(selector is variable for selector in selectors):
            return index
    return None


def _selector_of_member(eqn: JaxprEqn, stack_index: int) -> eqns.Atom | None:
    """Returns the operand of an equation that selects a member; see `input_that_selects`."""
    if eqn.primitive.name in _CALLS:
        index = input_that_selects(_called_jaxpr(eqn), stack_index)
        return None if index is None else eqn.invars[index]
    if eqn.primitive.name != "dynamic_slice" or stack_index != 0:
        return None
    member_shape = (1, *eqns.type_of(eqn.invars[0]).shape[1:])
    is_member = eqn.params["slice_sizes"] == member_shape
    return eqn.invars[1] if is_member else None


def may_be_weights(jaxpr: eqns.AnyJaxpr, is_weight: Sequence[bool]) -> tuple[bool, ...]:
    """Returns a flag for each output: True if it may be a weight, with no product before it.

    Args:
      jaxpr: jaxpr of a function or a branch.
      is_weight: which of its inputs are adapted weights.
    """
    inner, _ = eqns.jaxpr_and_consts(jaxpr)
    possible_weights = set(itertools.compress(inner.invars, is_weight))

    def may_be_weight(atom: eqns.Atom) -> bool:
        return not eqns.is_literal(atom) and atom in possible_weights

    for eqn in inner.eqns:
        operand_flags = list(map(may_be_weight, eqn.invars))
        if any(operand_flags):
            output_flags = _may_pass_on(eqn, operand_flags)
            possible_weights |= set(itertools.compress(eqn.outvars, output_flags))
    return tuple(map(may_be_weight, inner.outvars))


def _may_pass_on(eqn: JaxprEqn, operand_flags: list[bool]) -> Sequence[bool]:
    """Returns a flag for each output of an equation: True if it may be a weight.

    Args:
      eqn: the equation.
      operand_flags: which of its operands may be weights.
    """
    name = eqn.primitive.name
    if name in _CALLS:
        return may_be_weights(_called_jaxpr(eqn), operand_flags)
    if name == "cond":
        flags_of_branches = [
            may_be_weights(branch, operand_flags[1:]) for branch in eqn.params["branches"]
        ]
        return [all(flags) for flags in zip(*flags_of_branches, strict=True)]
    if name in ("scan", "while"):
        return [
            source is not None and operand_flags[source.operand] for source in _operand_sources(eqn)
        ]
    if name == "dot_general":
        return [all(operand_flags)]
    return [name not in _NEVER_RETURN_WEIGHTS] * len(eqn.outvars)


# Primitives that never return a weight.
_NEVER_RETURN_WEIGHTS = frozenset({"conv_general_dilated", "ragged_dot_general", "shard_map"})
_NEVER_RETURN_WEIGHTS |= {"custom_linear_solve"}
_NEVER_RETURN_WEIGHTS |= {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


def _called_jaxpr(eqn: JaxprEqn) -> eqns.AnyJaxpr:
    names = ("jaxpr", "call_jaxpr")
    called: eqns.AnyJaxpr = next(eqn.params[name] for name in names if name in eqn.params)
    return called
