"""Finds, without running a jaxpr, which inputs it returns and which outputs may be weights."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn

from lora_jax.adapt import eqns

Sources = tuple[int | None, ...]
_CALLS = frozenset({"jit", "pjit", "closed_call", "remat2", "checkpoint"})


def sources(jaxpr: eqns.AnyJaxpr) -> Sources:
    """Returns, for each output that is an input, that input's place; None for other outputs.

    It looks into functions, loops and branches.
    """
    inner, _ = eqns.opened(jaxpr)
    where: dict[Any, int] = {var: place for place, var in enumerate(inner.invars)}

    def found(atoms: Sequence[Any], place: int | None) -> int | None:
        is_known = place is not None and not eqns.is_literal(atoms[place])
        return where.get(atoms[place]) if is_known else None  # type: ignore[index]

    for eqn in inner.eqns:
        for out, place in zip(eqn.outvars, _through(eqn), strict=True):
            origin = found(eqn.invars, place)
            if origin is not None:
                where[out] = origin
    return tuple(found(inner.outvars, place) for place in range(len(inner.outvars)))


def agreed_sources(branches: Sequence[eqns.AnyJaxpr]) -> Sources:
    """Returns, for each output, the input that every branch returns; None where they differ."""
    each = zip(*map(sources, branches), strict=True)
    return tuple(places[0] if len(set(places)) == 1 else None for places in each)


def _through(eqn: JaxprEqn) -> Sources:
    """Returns, for each output of an equation, the operand that it is."""
    name, nothing = eqn.primitive.name, (None,) * len(eqn.outvars)
    if name in _CALLS:
        return sources(_called(eqn))
    if name == "cond":
        each = [sources(branch) for branch in eqn.params["branches"]]
        agreed = [
            places[0] if len(set(places)) == 1 else None for places in zip(*each, strict=True)
        ]
        return tuple(None if place is None else place + 1 for place in agreed)
    if name == "scan":
        scan = eqns.scan_of(eqn)
        return (
            _carried(sources(scan.body)[: scan.n_carry], scan.n_consts, 0) + nothing[scan.n_carry :]
        )
    if name == "while":
        loop = eqns.while_of(eqn)
        return _carried(sources(loop.body), loop.n_body_consts, loop.n_condition_consts)
    return nothing


def _carried(carries: Sources, first: int, before: int) -> Sources:
    """Returns the operands of a loop that it carries unchanged.

    Args:
      carries: for each carry that the body returns, the argument of the body that it is.
      first: the place of the first carry among the body's arguments.
      before: the number of the loop's operands that the body does not take, which come first.
    """
    same = (source == first + place for place, source in enumerate(carries))
    return tuple(before + first + place if kept else None for place, kept in enumerate(same))


def may_be_weights(jaxpr: eqns.AnyJaxpr, given: Sequence[bool]) -> tuple[bool, ...]:
    """Returns which outputs may be adapted weights: those that come from one without a product.

    Args:
      jaxpr: of a function or a branch.
      given: which of its inputs are adapted weights.
    """
    inner, _ = eqns.opened(jaxpr)
    held = {var for var, is_weight in zip(inner.invars, given, strict=True) if is_weight}

    def is_held(atom: Any) -> bool:
        return not eqns.is_literal(atom) and atom in held

    for eqn in inner.eqns:
        operands = [is_held(atom) for atom in eqn.invars]
        if any(operands):
            results = zip(eqn.outvars, _passed_on(eqn, operands), strict=True)
            held |= {out for out, is_weight in results if is_weight}
    return tuple(map(is_held, inner.outvars))


def _passed_on(eqn: JaxprEqn, operands: list[bool]) -> Sequence[bool]:
    """Returns which outputs of an equation may be weights."""
    name, n_outputs = eqn.primitive.name, len(eqn.outvars)
    if name in _CALLS:
        return may_be_weights(_called(eqn), operands)
    if name == "cond":
        each = (may_be_weights(branch, operands[1:]) for branch in eqn.params["branches"])
        return [all(outputs) for outputs in zip(*each, strict=True)]
    if name in ("scan", "while"):
        return [place is not None and operands[place] for place in _through(eqn)]
    if name == "dot_general":
        return [all(operands)]
    return [name not in _ENDS] * n_outputs


_ENDS = frozenset({"conv_general_dilated", "ragged_dot_general", "shard_map"})
_ENDS |= {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


def _called(eqn: JaxprEqn) -> eqns.AnyJaxpr:
    names = ("jaxpr", "call_jaxpr")
    return next(eqn.params[name] for name in names if name in eqn.params)
