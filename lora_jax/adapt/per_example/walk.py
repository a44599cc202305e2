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
    join_labels,
)
from lora_jax.adapt.per_example.primitives import RULES
from lora_jax.adapt.per_example.products import KERNEL_RULES, PRODUCT_RULES
from lora_jax.adapt.per_example.tokens import follow_axes
from lora_jax.adapt.rules.flow import sources_of_outputs
from lora_jax.adapt.user_code import UserContext, user_line_of
from lora_jax.core.extend import JaxprEqn
from lora_jax.core.names import SAME_TOKENS, TOKENS

# The number of examples, or the shapes of the masks whose tokens are followed.
Sizes = int | tuple[tuple[int, ...], ...]
_LABELS_OF_JAXPR: weakref.WeakKeyDictionary[eqns.AnyJaxpr, dict[Hashable, ExampleLabels]] = (
    weakref.WeakKeyDictionary()
)
_REASONS_WITHOUT_RULE = {
    "ragged_dot_general": "multiplies rows that are sorted by group",
    "shard_map": "runs on parts of the batch",
    "pallas_call": "is a kernel, which is not looked into",
    "flash_kernel": "is a kernel, which is not looked into",
}
_PLAIN_RULES = {**RULES, **PRODUCT_RULES}


def labels_of_jaxpr(
    jaxpr: eqns.AnyJaxpr, input_labels: Sequence[ExampleLabel], sizes: Sizes
) -> ExampleLabels:
    """Returns the labels of a jaxpr's values, cached by the arguments.

    Args:
      jaxpr: the jaxpr.
      input_labels: labels of its inputs, and perhaps of its constants behind them. Others are the
        same for all examples.
      sizes: the number of examples, or shapes of the masks whose tokens are followed.
    """
    labels_by_input = _LABELS_OF_JAXPR.setdefault(jaxpr, {})
    key = (tuple(input_labels), sizes)
    labels = labels_by_input.get(key)
    if labels is None:
        labels = labels_by_input.setdefault(key, _Walk(sizes).follow_jaxpr(jaxpr, input_labels))
    return labels


class _Walk:
    """A walk over one jaxpr that collects labels; see `ExampleLabels`.

    Attributes:
      sizes: see `labels_of_jaxpr`.
      uses, inner_labels: see `ExampleLabels`.
      tokens_label: label of the last value of the name `TOKENS`.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes: Any = sizes
        self.uses: dict[int, ExampleLabel] = {}
        self.inner_labels: dict[int, ExampleLabels] = {}
        self.tokens_label: ExampleLabel = None

    def follow_jaxpr(
        self, jaxpr: eqns.AnyJaxpr, input_labels: Sequence[ExampleLabel]
    ) -> ExampleLabels:
        """Returns the labels of the whole jaxpr."""
        inner, _ = eqns.jaxpr_and_consts(jaxpr)
        inputs = (*inner.invars, *inner.constvars)
        label_of_variable: dict[eqns.Atom, ExampleLabel] = dict(
            zip(inputs, input_labels, strict=False)
        )

        def label_of(atom: eqns.Atom) -> ExampleLabel:
            return None if eqns.is_literal(atom) else label_of_variable.get(atom)

        for eqn in inner.eqns:
            labels = list(map(label_of, eqn.invars))
            if any(label is not None for label in labels):
                label_of_variable |= zip(eqn.outvars, self._output_labels(eqn, labels), strict=True)
        return ExampleLabels(tuple(map(label_of, inner.outvars)), self.uses, self.inner_labels)

    def _output_labels(self, eqn: JaxprEqn, labels: list[ExampleLabel]) -> list[ExampleLabel]:
        """Returns the labels of an equation's outputs, given those of its operands.

        Where a weight is among the operands, it also notes the label of the other operand.
        """
        if eqn.params.get("name") == TOKENS:
            self.tokens_label = labels[0]
        if eqn.params.get("name") == SAME_TOKENS and isinstance(self.tokens_label, TokenAxes):
            return [self.tokens_label]
        enter = _CONTROL_FLOW.get(eqn.primitive.name)
        mixed_label = _first_label(labels, MixedExamples)
        has_kernel = _first_label(labels, ExampleKernels) is not None
        if enter is None and mixed_label is not None:
            if has_kernel:
                self.uses[id(eqn)] = mixed_label
            return [mixed_label] * len(eqn.outvars)
        if enter is None and _depends_on_unvisited(labels):
            return [UnvisitedCarry()] * len(eqn.outvars)
        try:
            if enter is None:
                output_labels = self._labels_by_rule(eqn, labels)
            else:
                with UserContext(eqn):
                    output_labels = enter(self, eqn, labels)
        except MixingError as error:
            return [_mixed_by_equation(eqn, error)] * len(eqn.outvars)
        if has_kernel:
            self.uses[id(eqn)] = _first_label(labels, ExampleAxis | TokenAxes)
        return output_labels

    def _labels_by_rule(self, eqn: JaxprEqn, labels: list[ExampleLabel]) -> list[ExampleLabel]:
        """Returns the labels of an equation's outputs, by the rule for its primitive.

        Raises:
          MixingError: there is no rule, or the equation mixes examples.
        """
        has_tokens = _first_label(labels, TokenAxes) is not None
        has_kernel = _first_label(labels, ExampleKernels) is not None
        labels = [None if isinstance(label, UnvisitedCarry) else label for label in labels]
        rules = KERNEL_RULES if has_kernel and not has_tokens else _PLAIN_RULES
        rule = rules.get(eqn.primitive.name)
        if rule is None:
            raise MixingError(_reason_without_rule(eqn.primitive.name, has_kernel))
        if has_tokens:
            return follow_axes(rule, eqn, labels)
        return rule(eqn, labels, self.sizes)

    def _enter_body(
        self, body: eqns.AnyJaxpr, labels: Sequence[ExampleLabel]
    ) -> tuple[ExampleLabel, ...]:
        """Returns the labels of an inner jaxpr's outputs, and records its uses of weights.

        Raises:
          MixingError: the jaxpr was entered with other labels before.
        """
        labels_in_body = labels_of_jaxpr(body, labels, self.sizes)
        if not labels_in_body.uses:
            return labels_in_body.outputs
        is_known_otherwise = (
            self.inner_labels.setdefault(id(body), labels_in_body) is not labels_in_body
        )
        if is_known_otherwise:
            problem = "is met twice, with the examples along different axes"
            mixed_label = _first_label(labels, MixedExamples)
            if mixed_label is None:
                mixed_label = MixedExamples(f"a function {problem}")
            uses = dict.fromkeys(labels_in_body.uses, mixed_label)
            self.inner_labels[id(body)] = dataclasses.replace(
                labels_in_body, uses=uses, inner_labels={}
            )
            raise MixingError(problem)
        return labels_in_body.outputs

    def _enter_call(self, eqn: JaxprEqn, labels: list[ExampleLabel]) -> list[ExampleLabel]:
        names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
        body = next(eqn.params[name] for name in names if name in eqn.params)
        return list(self._enter_body(body, labels))

    def _enter_custom_derivative(
        self, eqn: JaxprEqn, labels: list[ExampleLabel]
    ) -> list[ExampleLabel]:
        """Returns the labels of a function with a custom derivative."""
        if _first_label(labels, ExampleKernels) is not None:
            raise MixingError("has a derivative of its own, for which an adapted weight is formed")
        return self._enter_call(eqn, labels)

    def _enter_scan(self, eqn: JaxprEqn, labels: list[ExampleLabel]) -> list[ExampleLabel]:
        """Returns the labels of a scan's outputs."""
        scan = eqns.read_scan(eqn)
        consts, first_carry, stacks = scan.split(labels)
        slices = [_label_of_slice(label, eqn) for label in stacks]
        carry = self._carry_of_every_step(scan.body, consts, first_carry, slices)
        outputs = self._enter_body(scan.body, (*consts, *carry, *slices))
        scanned_axes: set[MaskAxis] = set()  # axes of a mask that the scan goes over
        for label in stacks:
            if isinstance(label, TokenAxes):
                scanned_axes |= {axis for axis in label.axes if axis.location.axis == 0}
        ys = [_label_of_stack(label, eqn, scanned_axes) for label in outputs[scan.n_carry :]]
        return [*carry, *ys]

    def _enter_while(self, eqn: JaxprEqn, labels: list[ExampleLabel]) -> list[ExampleLabel]:
        """Returns the labels of a while loop's outputs."""
        loop = eqns.read_while(eqn)
        condition_consts, body_consts, first_carry = loop.split(labels)
        carry = self._carry_of_every_step(loop.body, body_consts, first_carry, [])
        self._enter_body(loop.body, (*body_consts, *carry))
        (condition_label,) = self._enter_body(loop.condition, (*condition_consts, *carry))
        if isinstance(condition_label, MixedExamples):
            return [condition_label] * len(carry)
        return carry

    def _carry_of_every_step(
        self,
        body: eqns.AnyJaxpr,
        consts: Sequence[ExampleLabel],
        first_carry: Sequence[ExampleLabel],
        slices: Sequence[ExampleLabel],
    ) -> list[ExampleLabel]:
        """Returns the labels of a loop's carry that hold in every step.

        A state that starts the same for all examples, as zeros, may have examples after a step. It
        is first taken for whatever the step makes of it, and then held against that.

        Args:
          body: body of the loop.
          consts, first_carry, slices: labels of its arguments in the first step.
        """

        def repeated(carry: list[ExampleLabel]) -> list[ExampleLabel]:
            """Returns the carry's labels after any number of steps."""
            while True:
                outputs = labels_of_jaxpr(body, (*consts, *carry, *slices), self.sizes).outputs
                next_carry = list(map(join_labels, carry, outputs[: len(carry)]))
                if next_carry == carry:
                    return carry
                carry = next_carry

        # What starts the same for all examples may have examples after a step.
        unvisited_carry: list[ExampleLabel] = [
            UnvisitedCarry() if label is None else label for label in first_carry
        ]
        carry_of_steps = repeated(unvisited_carry)
        carry = repeated(list(map(join_labels, first_carry, carry_of_steps)))
        if _first_label(carry, ExampleKernels) is None:
            return carry
        # Each weight must be returned as it came.
        argument_of_output = sources_of_outputs(body)
        for index, label in enumerate(carry):
            is_changed = argument_of_output[index] != len(consts) + index
            if isinstance(label, ExampleKernels) and is_changed:
                raise MixingError("carries an adapted weight, and changes it")
        return carry

    def _enter_cond(self, eqn: JaxprEqn, labels: list[ExampleLabel]) -> list[ExampleLabel]:
        """Returns the labels of a cond's outputs, joined over its branches."""
        branch_index, *operands = labels
        if isinstance(branch_index, MixedExamples):
            return [branch_index] * len(eqn.outvars)
        outputs_of_branches = [
            self._enter_body(branch, operands) for branch in eqn.params["branches"]
        ]
        outputs = list(outputs_of_branches[0])
        for branch_outputs in outputs_of_branches[1:]:
            outputs = list(map(join_labels, outputs, branch_outputs))
        return [_label_of_array(label, eqn) for label in outputs]


def _first_label(labels: Iterable[ExampleLabel], kind: Any) -> ExampleLabel:
    """Returns the first label of one of these classes, or None."""
    return next((label for label in labels if isinstance(label, kind)), None)


def _depends_on_unvisited(labels: Sequence[ExampleLabel]) -> bool:
    """Returns True if the label is unknown until a loop's first step is followed."""
    has_unvisited = _first_label(labels, UnvisitedCarry) is not None
    return has_unvisited and _first_label(labels, ExampleAxis | TokenAxes) is None


def _mixed_by_equation(eqn: JaxprEqn, problem: object) -> MixedExamples:
    return MixedExamples(f"{eqn.primitive.name!r} at {user_line_of(eqn)} {problem}")


def _label_of_slice(label: ExampleLabel, eqn: JaxprEqn) -> ExampleLabel:
    """Returns the label of the slice that one scan step takes of an operand."""
    if isinstance(label, ExampleAxis):
        if label.axis == 0:
            return _mixed_by_equation(eqn, "goes over the examples")
        return ExampleAxis(label.axis - 1, label.n_consecutive)
    if isinstance(label, TokenAxes):
        return label.with_leading_axes(-1)
    if isinstance(label, ExampleKernels):
        if label.roles[0] != "batch":
            return _mixed_by_equation(eqn, "goes over rows or columns of an adapted weight")
        return ExampleKernels(label.roles[1:])
    return label


def _label_of_stack(
    label: ExampleLabel, eqn: JaxprEqn, scanned_axes: Set[MaskAxis]
) -> ExampleLabel:
    """Returns the label of an output that a scan stacks, with the scanned mask axes."""
    if isinstance(label, TokenAxes):
        stack_label = label.with_leading_axes(1)
        return dataclasses.replace(stack_label, axes=stack_label.axes | scanned_axes)
    if isinstance(label, ExampleAxis):
        return ExampleAxis(label.axis + 1, label.n_consecutive)
    return _label_of_array(label, eqn)


def _label_of_array(label: ExampleLabel, eqn: JaxprEqn) -> ExampleLabel:
    """Returns the label of a value that counts as a plain array from here on."""
    return (
        _mixed_by_equation(eqn, "forms an adapted weight")
        if isinstance(label, ExampleKernels)
        else label
    )


def _reason_without_rule(primitive: str, has_kernel: bool) -> str:
    """Returns the reason why a primitive without a rule may mix examples."""
    if primitive in _REASONS_WITHOUT_RULE:
        return _REASONS_WITHOUT_RULE[primitive]
    if has_kernel:
        return "forms an adapted weight, of which each example has its own"
    return "is not known to keep examples apart"


_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")
_CONTROL_FLOW: dict[str, Callable[[_Walk, JaxprEqn, list[ExampleLabel]], list[ExampleLabel]]] = {
    **dict.fromkeys(_CALLS, _Walk._enter_call),
    "custom_jvp_call": _Walk._enter_custom_derivative,
    "custom_vjp_call": _Walk._enter_custom_derivative,
    "custom_vjp_call_jaxpr": _Walk._enter_custom_derivative,
    "scan": _Walk._enter_scan,
    "while": _Walk._enter_while,
    "cond": _Walk._enter_cond,
}
