"""Rules for primitives that keep examples separate: the axis of the examples in their outputs.

A primitive that is not named here ends the walk where it meets examples.
"""

from collections.abc import Callable, Sequence

from lora_jax.adapt import eqns
from lora_jax.adapt.per_example.labels import (
    ExampleAxis,
    ExampleLabel,
    MixingError,
    axis_after_reshape,
    common_example_axis,
)
from lora_jax.core.extend import JaxprEqn

# (equation, what is known of its operands, the number of examples) -> what is known of its outputs.
# At least one operand has examples, none is a weight.
Rule = Callable[[JaxprEqn, Sequence[ExampleLabel], int], list[ExampleLabel]]


def shape_of_operand(eqn: JaxprEqn, operand_index: int = 0) -> tuple[int, ...]:
    """Returns the shape of an operand."""
    return tuple(eqns.type_of(eqn.invars[operand_index]).shape)


def shape_of_output(eqn: JaxprEqn) -> tuple[int, ...]:
    """Returns the shape of the first output."""
    return tuple(eqns.type_of(eqn.outvars[0]).shape)


def labels_of_operands(_: JaxprEqn, labels: Sequence[ExampleLabel], __: int) -> list[ExampleLabel]:
    """Returns the labels of the operands as the labels of the outputs."""
    return list(labels)


def _same_axis(_: JaxprEqn, axis: int) -> int:
    return axis


def _never_mixes(*_: object) -> bool:
    return False


def _rule_for_one_axis(
    result_axis: Callable[[JaxprEqn, int], int] = _same_axis,
    problem: str = "",
    mixes: Callable[[JaxprEqn, int], object] = _never_mixes,
) -> Rule:
    """Returns the rule for a primitive whose operands share one example axis.

    Args:
      result_axis: (equation, that axis) -> their axis in the outputs; by default the same.
      problem: what the primitive does where `mixes` is true of the same.
      mixes: whether it mixes examples.
    """

    def rule(eqn: JaxprEqn, labels: Sequence[ExampleLabel], _: int) -> list[ExampleLabel]:
        """Returns the example axis of the outputs, unless the primitive mixes examples."""
        examples = common_example_axis(labels)
        if mixes(eqn, examples.axis):
            raise MixingError(problem)
        axis = result_axis(eqn, examples.axis)
        return [ExampleAxis(axis, examples.n_consecutive)] * len(eqn.outvars)

    return rule


def _axes_of_parameter(eqn: JaxprEqn, name: str) -> list[int]:
    """Returns the axes that a parameter names: one or several, perhaps negative."""
    axes = eqn.params[name]
    axes = axes if isinstance(axes, Sequence) else [axes]
    return [axis % len(shape_of_operand(eqn)) for axis in axes]


def _rule_for_operation_along(name: str, problem: str) -> Rule:
    """Returns the rule for an operation that mixes elements along some axes."""

    def is_along(eqn: JaxprEqn, axis: int) -> bool:
        return axis in _axes_of_parameter(eqn, name)

    return _rule_for_one_axis(problem=problem, mixes=is_along)


def _rule_for_dropped_axes(name: str, problem: str) -> Rule:
    """Returns the rule for an operation that removes the axes a parameter names."""

    def result_axis(eqn: JaxprEqn, axis: int) -> int:
        n_dropped_before = sum(
            dropped_axis < axis for dropped_axis in _axes_of_parameter(eqn, name)
        )
        return axis - n_dropped_before

    def is_dropped(eqn: JaxprEqn, axis: int) -> bool:
        return axis in _axes_of_parameter(eqn, name)

    return _rule_for_one_axis(result_axis, problem, is_dropped)


def _reshape(eqn: JaxprEqn, labels: Sequence[ExampleLabel], n_examples: int) -> list[ExampleLabel]:
    """Returns the example axis after a reshape."""
    if eqn.params.get("dimensions") is not None:
        raise MixingError("transposes as it reshapes")
    return [
        axis_after_reshape(
            common_example_axis(labels), n_examples, shape_of_operand(eqn), shape_of_output(eqn)
        )
    ]


def _transposed_axis(eqn: JaxprEqn, axis: int) -> int:
    return tuple(eqn.params["permutation"]).index(axis)


def _broadcast_axis(eqn: JaxprEqn, axis: int) -> int:
    result_axis: int = eqn.params["broadcast_dimensions"][axis]
    return result_axis


def _stacked_axis(eqn: JaxprEqn, axis: int) -> int:
    return axis + 1 if axis >= eqn.params["axis"] else axis


def _is_padded(eqn: JaxprEqn, axis: int) -> bool:
    return any(eqn.params["padding_config"][axis])


def _is_transformed(eqn: JaxprEqn, axis: int) -> bool:
    """Returns True if an FFT transforms this axis; it transforms the last axes."""
    return axis >= len(shape_of_operand(eqn)) - len(eqn.params["fft_lengths"])


def _has_other_shape(eqn: JaxprEqn, _: int) -> bool:
    return shape_of_operand(eqn) != shape_of_output(eqn)


def _is_updated_in_part(eqn: JaxprEqn, axis: int) -> bool:
    return shape_of_operand(eqn, 0)[axis] != shape_of_operand(eqn, 1)[axis]


def _is_shortened(eqn: JaxprEqn, axis: int) -> bool:
    return shape_of_operand(eqn)[axis] != shape_of_output(eqn)[axis]


def _is_sliced(eqn: JaxprEqn, axis: int) -> bool:
    strides = eqn.params["strides"]
    return _is_shortened(eqn, axis) or (strides is not None and strides[axis] != 1)


def _has_windows(eqn: JaxprEqn, axis: int) -> bool:
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    sizes = [eqn.params[name][axis] for name in names if name in eqn.params]
    return any(size != 1 for size in sizes) or any(eqn.params["padding"][axis])


def _is_behind_key_axes(eqn: JaxprEqn, axis: int) -> bool:
    """Returns True if an axis lies behind the axes of the keys, as that of their words does."""
    return axis >= min(len(shape_of_operand(eqn)), len(shape_of_output(eqn)))


ELEMENTWISE = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil "
    "clamp clz complex conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf "
    "erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow "
    "is_finite le le_to lgamma log log1p logistic lt lt_to max min mul mulhi name ne neg nextafter "
    "not or polygamma population_count pow random_fold_in real reduce_precision "
    "regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta"
).split()
_REDUCTIONS = "sum max min prod and or xor".split()

_IN_PART = "takes some of the examples"
_OVER = "reduces over the examples"

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _rule_for_one_axis()),
    **dict.fromkeys(
        (f"reduce_{name}" for name in _REDUCTIONS), _rule_for_dropped_axes("axes", _OVER)
    ),
    **dict.fromkeys(("argmax", "argmin"), _rule_for_dropped_axes("axes", _OVER)),
    "reduce": _rule_for_dropped_axes("dimensions", _OVER),
    **dict.fromkeys(("optimization_barrier", "device_put"), labels_of_operands),
    **dict.fromkeys(("sharding_constraint", "reshard"), labels_of_operands),
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"),
        _rule_for_operation_along("axis", "accumulates the axis of the examples"),
    ),
    **dict.fromkeys(
        ("random_bits", "random_split", "random_wrap", "random_unwrap"),
        _rule_for_one_axis(problem="makes keys of several examples", mixes=_is_behind_key_axes),
    ),
    **dict.fromkeys(
        ("reduce_window_sum", "reduce_window_max", "reduce_window_min"),
        _rule_for_one_axis(problem="has windows over the axis of the examples", mixes=_has_windows),
    ),
    "sort": _rule_for_operation_along("dimension", "sorts the axis of the examples"),
    "top_k": _rule_for_operation_along("axis", "sorts the axis of the examples"),
    "rev": _rule_for_operation_along("dimensions", "reverses the axis of the examples"),
    "concatenate": _rule_for_operation_along(
        "dimension", "joins values along the axis of the examples"
    ),
    "split": _rule_for_operation_along("axis", "splits the axis of the examples"),
    "squeeze": _rule_for_dropped_axes("dimensions", "drops the axis of the examples"),
    "transpose": _rule_for_one_axis(_transposed_axis),
    "broadcast_in_dim": _rule_for_one_axis(_broadcast_axis),
    "reshape": _reshape,
    "stack": _rule_for_one_axis(_stacked_axis),
    "unstack": _rule_for_dropped_axes("axis", "takes the axis of the examples apart"),
    "slice": _rule_for_one_axis(problem=_IN_PART, mixes=_is_sliced),
    "pad": _rule_for_one_axis(problem="pads the axis of the examples", mixes=_is_padded),
    "fft": _rule_for_one_axis(
        problem="transforms along the axis of the examples", mixes=_is_transformed
    ),
    "bitcast_convert_type": _rule_for_one_axis(
        problem="casts to another width", mixes=_has_other_shape
    ),
    "dynamic_slice": _rule_for_one_axis(problem=_IN_PART, mixes=_is_shortened),
    "dynamic_update_slice": _rule_for_one_axis(
        problem="updates some of the examples", mixes=_is_updated_in_part
    ),
}
