"""Follows the examples of a batch through a jaxpr, from its inputs to its outputs.

An equation of which no operand has examples is passed over: its results are the same for all. Any
other follows the rule for its primitive; one without a rule, or one that mixes examples, leaves its
results `MixedExamples`, which matters only where an output depends on them.
"""

import dataclasses
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence, Set
from typing import Any

from lora_jax.adapt import eqns
from lora_jax.adapt.per_example.labels import (
    ExampleAxis,
    ExampleKernels,
    ExampleLabel,
    ExampleLabels,
    MaskAxis,
    MixedExamples,
    MixingError,
    TokenAxes,
    UnvisitedCarry,
    joined,
)
from lora_jax.adapt.per_example.primitives import RULES
from lora_jax.adapt.per_example.products import KERNEL_RULES, PRODUCT_RULES
from lora_jax.adapt.per_example.tokens import follow_axes
from lora_jax.adapt.rules.flow import sources
from lora_jax.adapt.user_code import place_of, user_context
from lora_jax.core.extend import JaxprEqn
from lora_jax.core.names import SAME_TOKENS, TOKENS

_FOLLOWED: weakref.WeakKeyDictionary[eqns.AnyJaxpr, dict[Hashable, ExampleLabels]] = (
    weakref.WeakKeyDictionary()
)
Followed = int | tuple[tuple[int, ...], ...]
_NO_RULE = {
    "ragged_dot_general": "multiplies rows that are sorted by group",
    "shard_map": "runs on parts of the batch",
    "pallas_call": "is a kernel, which is not looked into",
    "flash_kernel": "is a kernel, which is not looked into",
}
_PLAIN_RULES = {**RULES, **PRODUCT_RULES}


def followed(jaxpr: eqns.AnyJaxpr, given: Sequence[ExampleLabel], n: Followed) -> ExampleLabels:
    """Returns the labels of a jaxpr's values: the same object for the same arguments.

    Args:
      jaxpr: the jaxpr.
      given: what is known of its inputs, and perhaps of its constants behind them. Others are the
        same for all examples.
      n: the number of examples, or shapes of the masks whose tokens are followed.
    """
    known, key = _FOLLOWED.setdefault(jaxpr, {}), (tuple(given), n)
    labels = known.get(key)
    return labels or known.setdefault(key, _Walk(n).through(jaxpr, key[0]))


class _Walk:
    """The walk over one jaxpr, and what it finds; see `ExampleLabels`."""

    def __init__(self, n: Followed) -> None:
        self.n: Any = n
        self.uses: dict[int, ExampleLabel] = {}
        self.inner: dict[int, ExampleLabels] = {}
        self.tokens: ExampleLabel = None  # of the last value of the name `TOKENS`

    def through(self, jaxpr: eqns.AnyJaxpr, given: Sequence[ExampleLabel]) -> ExampleLabels:
        """Returns the labels of the whole jaxpr."""
        inner, _ = eqns.opened(jaxpr)
        inputs = (*inner.invars, *inner.constvars)
        labels: dict[eqns.Atom, ExampleLabel] = dict(zip(inputs, given, strict=False))

        def known(atoms: Iterable[eqns.Atom]) -> list[ExampleLabel]:
            return [None if eqns.is_literal(atom) else labels.get(atom) for atom in atoms]

        for eqn in inner.eqns:
            operands = known(eqn.invars)
            if any(label is not None for label in operands):
                labels |= zip(eqn.outvars, self._after(eqn, operands), strict=True)
        return ExampleLabels(tuple(known(inner.outvars)), self.uses, self.inner)

    def _after(self, eqn: JaxprEqn, given: list[ExampleLabel]) -> list[ExampleLabel]:
        """Returns the labels of an equation's outputs."""
        name = eqn.primitive.name
        has_kernel = any(isinstance(at, ExampleKernels) for at in given)
        enter = _CONTROL.get(name)
        mixed = next((at for at in given if isinstance(at, MixedExamples)), None)
        if eqn.params.get("name") == TOKENS:
            self.tokens = given[0]
        if eqn.params.get("name") == SAME_TOKENS and isinstance(self.tokens, TokenAxes):
            return [self.tokens]
        if mixed is not None and enter is None:
            if has_kernel:
                self.uses[id(eqn)] = mixed
            return [mixed] * len(eqn.outvars)
        has_tokens = any(isinstance(at, TokenAxes) for at in given)
        if enter is None and any(isinstance(at, UnvisitedCarry) for at in given):
            if not has_tokens and not any(isinstance(at, ExampleAxis) for at in given):
                return [UnvisitedCarry()] * len(eqn.outvars)
            given = [None if isinstance(at, UnvisitedCarry) else at for at in given]
        try:
            if enter is not None:
                with user_context(eqn):
                    outputs = enter(self, eqn, given)
            else:
                rules = KERNEL_RULES if has_kernel and not has_tokens else _PLAIN_RULES
                rule = rules.get(name)
                if rule is None:
                    raise MixingError(_no_rule(name, has_kernel))
                if has_tokens:
                    outputs = follow_axes(rule, eqn, given)
                else:
                    outputs = rule(eqn, given, self.n)
        except MixingError as error:
            return [_mixed(eqn, error)] * len(eqn.outvars)
        if has_kernel:
            examples = (at for at in given if isinstance(at, ExampleAxis | TokenAxes))
            self.uses[id(eqn)] = next(examples, None)
        return outputs

    def _entered(
        self, body: eqns.AnyJaxpr, given: Sequence[ExampleLabel]
    ) -> tuple[ExampleLabel, ...]:
        """Returns the labels of an inner jaxpr's outputs, and records its uses of weights."""
        child = followed(body, given, self.n)
        if child.uses and self.inner.setdefault(id(body), child) is not child:
            why = "is met twice, with the examples along different axes"
            mixed = (label for label in given if isinstance(label, MixedExamples))
            uses = dict.fromkeys(child.uses, next(mixed, MixedExamples(f"a function {why}")))
            self.inner[id(body)] = dataclasses.replace(child, uses=uses, inner={})
            raise MixingError(why)
        return child.outputs

    def _call(self, eqn: JaxprEqn, given: list[ExampleLabel]) -> list[ExampleLabel]:
        names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
        return list(self._entered(next(eqn.params[n] for n in names if n in eqn.params), given))

    def _own_derivative(self, eqn: JaxprEqn, given: list[ExampleLabel]) -> list[ExampleLabel]:
        if any(isinstance(label, ExampleKernels) for label in given):
            raise MixingError("has a derivative of its own, for which an adapted weight is formed")
        return self._call(eqn, given)

    def _scan(self, eqn: JaxprEqn, given: list[ExampleLabel]) -> list[ExampleLabel]:
        scan = eqns.scan_of(eqn)
        n_fixed = scan.n_consts + scan.n_carry
        consts, carry = given[: scan.n_consts], given[scan.n_consts : n_fixed]
        xs = [_slice_of(label, eqn) for label in given[n_fixed:]]
        carry = self._carried(scan.body, consts, carry, xs)
        ys = self._entered(scan.body, (*consts, *carry, *xs))[scan.n_carry :]
        tokens = [label for label in given[n_fixed:] if isinstance(label, TokenAxes)]
        scanned = {axis for label in tokens for axis in label.axes if axis.location.axis == 0}
        return [*carry, *(_stack_of(label, eqn, scanned) for label in ys)]

    def _while(self, eqn: JaxprEqn, given: list[ExampleLabel]) -> list[ExampleLabel]:
        loop = eqns.while_of(eqn)
        n_condition, n_body = loop.n_condition_consts, loop.n_body_consts
        of_condition, of_body = given[:n_condition], given[n_condition : n_condition + n_body]
        carry = self._carried(loop.body, of_body, given[n_condition + n_body :], [])
        self._entered(loop.body, (*of_body, *carry))
        (goes_on,) = self._entered(loop.condition, (*of_condition, *carry))
        return [goes_on] * len(carry) if isinstance(goes_on, MixedExamples) else list(carry)

    def _carried(
        self,
        body: eqns.AnyJaxpr,
        consts: Sequence[ExampleLabel],
        carry: Sequence[ExampleLabel],
        xs: Sequence[ExampleLabel],
    ) -> list[ExampleLabel]:
        """Returns the labels of a loop's carry in every step; weights must stay as they are.

        A state that starts the same for all examples, as zeros, may have examples after a step. It
        is first taken for whatever the step makes of it, and then held against that.
        """

        def settled(carry: list[ExampleLabel]) -> list[ExampleLabel]:
            while True:
                child = followed(body, (*consts, *carry, *xs), self.n)
                before, carry = carry, list(map(joined, carry, child.outputs[: len(carry)]))
                if carry == before:
                    return carry

        after = settled([UnvisitedCarry() if label is None else label for label in carry])
        carry = settled(list(map(joined, carry, after)))
        origins = sources(body) if any(isinstance(label, ExampleKernels) for label in carry) else ()
        for place, label in enumerate(carry):
            if isinstance(label, ExampleKernels) and origins[place] != len(consts) + place:
                raise MixingError("carries an adapted weight, and changes it")
        return carry

    def _cond(self, eqn: JaxprEqn, given: list[ExampleLabel]) -> list[ExampleLabel]:
        index, *operands = given
        if isinstance(index, MixedExamples):
            return [index] * len(eqn.outvars)
        each = [self._entered(branch, operands) for branch in eqn.params["branches"]]
        outputs = list(each[0])
        for branch in each[1:]:
            outputs = list(map(joined, outputs, branch))
        return [_formed(label, eqn) for label in outputs]


def _mixed(eqn: JaxprEqn, why: object) -> MixedExamples:
    return MixedExamples(f"{eqn.primitive.name!r} at {place_of(eqn)} {why}")


def _slice_of(known: ExampleLabel, eqn: JaxprEqn) -> ExampleLabel:
    """Returns the label of one step's part of an operand that a scan goes over."""
    if isinstance(known, ExampleAxis):
        if known.axis == 0:
            return _mixed(eqn, "goes over the examples")
        return ExampleAxis(known.axis - 1, known.inner)
    if isinstance(known, TokenAxes):
        return known.shifted(-1)
    if isinstance(known, ExampleKernels):
        first, *roles = known.roles
        if first != "batch":
            return _mixed(eqn, "goes over rows or columns of an adapted weight")
        return ExampleKernels(tuple(roles))
    return known


def _stack_of(known: ExampleLabel, eqn: JaxprEqn, scanned: Set[MaskAxis]) -> ExampleLabel:
    """Returns the label of an output that a scan stacks; it goes over these axes of a mask."""
    if isinstance(known, TokenAxes):
        label = known.shifted(1)
        return dataclasses.replace(label, axes=label.axes | scanned)
    return (
        ExampleAxis(known.axis + 1, known.inner)
        if isinstance(known, ExampleAxis)
        else _formed(known, eqn)
    )


def _formed(known: ExampleLabel, eqn: JaxprEqn) -> ExampleLabel:
    """Returns the label of a value that is an array from here on."""
    return _mixed(eqn, "forms an adapted weight") if isinstance(known, ExampleKernels) else known


def _no_rule(name: str, has_kernel: bool) -> str:
    if name in _NO_RULE:
        return _NO_RULE[name]
    if has_kernel:
        return "forms an adapted weight, of which each example has its own"
    return "is not known to keep examples apart"


_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")
_CONTROL: dict[str, Callable[[_Walk, JaxprEqn, list[ExampleLabel]], list[ExampleLabel]]] = {
    **dict.fromkeys(_CALLS, _Walk._call),
    "custom_jvp_call": _Walk._own_derivative,
    "custom_vjp_call": _Walk._own_derivative,
    "custom_vjp_call_jaxpr": _Walk._own_derivative,
    "scan": _Walk._scan,
    "while": _Walk._while,
    "cond": _Walk._cond,
}
