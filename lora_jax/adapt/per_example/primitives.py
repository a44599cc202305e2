"""The primitives that keep examples apart, and where the examples lie in their outputs.

A primitive that is not named here ends the walk where it meets examples.
"""

from collections.abc import Callable, Sequence

from jax.extend.core import JaxprEqn

from lora_jax.adapt import eqns
from lora_jax.adapt.per_example.labels import At, Known, MixesError, agreed, reshaped

# (equation, what is known of its operands, the number of examples) -> what is known of its outputs.
# At least one operand has examples, none is a weight.
Rule = Callable[[JaxprEqn, Sequence[Known], int], list[Known]]


def shape_of(eqn: JaxprEqn, place: int = 0) -> tuple[int, ...]:
    """Returns the shape of an operand."""
    return tuple(eqns.type_of(eqn.invars[place]).shape)


def out_shape(eqn: JaxprEqn) -> tuple[int, ...]:
    """Returns the shape of the first output."""
    return tuple(eqns.type_of(eqn.outvars[0]).shape)


def _elementwise(eqn: JaxprEqn, given: Sequence[Known], _: int) -> list[Known]:
    return [agreed(given)] * len(eqn.outvars)


def each(_: JaxprEqn, given: Sequence[Known], __: int) -> list[Known]:
    """Returns what is known of the operands: each is an output."""
    return list(given)


def _along(verb: str, name: str) -> Rule:
    """Returns the rule for an operation along axes: any but that of the examples."""

    def rule(eqn: JaxprEqn, given: Sequence[Known], _: int) -> list[Known]:
        at, axes = agreed(given), eqn.params[name]
        axes = axes if isinstance(axes, Sequence) else (axes,)
        if at.axis in axes:
            raise MixesError(f"{verb} the axis of the examples")
        return [at] * len(eqn.outvars)

    return rule


def _reduced(eqn: JaxprEqn, given: Sequence[Known], _: int) -> list[Known]:
    at, axes = agreed(given), eqn.params["dimensions" if eqn.primitive.name == "reduce" else "axes"]
    if at.axis in axes:
        raise MixesError("reduces over the examples")
    return [_without(at, axes)] * len(eqn.outvars)


def _without(at: At, axes: Sequence[int]) -> At:
    """Returns where the examples lie once other axes are gone."""
    return At(at.axis - sum(axis < at.axis for axis in axes), at.inner)


def _squeezed(eqn: JaxprEqn, given: Sequence[Known], _: int) -> list[Known]:
    at, ndim = agreed(given), len(shape_of(eqn))
    axes = [axis % ndim for axis in eqn.params["dimensions"]]
    if at.axis in axes:
        raise MixesError("drops the axis of the examples")
    return [_without(at, axes)]


def _transposed(eqn: JaxprEqn, given: Sequence[Known], _: int) -> list[Known]:
    at = agreed(given)
    return [At(tuple(eqn.params["permutation"]).index(at.axis), at.inner)]


def _broadcast(eqn: JaxprEqn, given: Sequence[Known], _: int) -> list[Known]:
    at = agreed(given)
    return [At(eqn.params["broadcast_dimensions"][at.axis], at.inner)]


def _reshape(eqn: JaxprEqn, given: Sequence[Known], n: int) -> list[Known]:
    if eqn.params.get("dimensions") is not None:
        raise MixesError("transposes as it reshapes")
    return [reshaped(agreed(given), n, shape_of(eqn), out_shape(eqn))]


def _stacked(eqn: JaxprEqn, given: Sequence[Known], _: int) -> list[Known]:
    at = agreed(given)
    return [At(at.axis + (at.axis >= eqn.params["axis"]), at.inner)]


def _unstacked(eqn: JaxprEqn, given: Sequence[Known], _: int) -> list[Known]:
    at, axis = agreed(given), eqn.params["axis"]
    if at.axis == axis:
        raise MixesError("takes the axis of the examples apart")
    return [_without(at, [axis])] * len(eqn.outvars)


def _sliced(eqn: JaxprEqn, given: Sequence[Known], _: int) -> list[Known]:
    at, params = agreed(given), eqn.params
    strides = params["strides"] or (1,) * len(params["start_indices"])
    if strides[at.axis] != 1 or out_shape(eqn)[at.axis] != shape_of(eqn)[at.axis]:
        raise MixesError("takes some of the examples")
    return [at]


def _padded(eqn: JaxprEqn, given: Sequence[Known], _: int) -> list[Known]:
    at = agreed(given)
    if any(eqn.params["padding_config"][at.axis]):
        raise MixesError("pads the axis of the examples")
    return [at]


def _windowed(eqn: JaxprEqn, given: Sequence[Known], _: int) -> list[Known]:
    at, params = agreed(given), eqn.params
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    there = [params[name][at.axis] for name in names if name in params]
    if any(n != 1 for n in there) or any(params["padding"][at.axis]):
        raise MixesError("has windows over the axis of the examples")
    return [at] * len(eqn.outvars)


def _transformed(eqn: JaxprEqn, given: Sequence[Known], _: int) -> list[Known]:
    at = agreed(given)
    if at.axis >= len(shape_of(eqn)) - len(eqn.params["fft_lengths"]):
        raise MixesError("transforms along the axis of the examples")
    return [at]


def _of_keys(eqn: JaxprEqn, given: Sequence[Known], _: int) -> list[Known]:
    """Keys, or their words, keep their axes; those of what is made of them come after."""
    at = agreed(given)
    if at.axis >= min(len(shape_of(eqn)), len(out_shape(eqn))):
        raise MixesError("makes keys of several examples")
    return [at]


def _bits_cast(eqn: JaxprEqn, given: Sequence[Known], _: int) -> list[Known]:
    if shape_of(eqn) != out_shape(eqn):
        raise MixesError("casts to another width")
    return [agreed(given)]


def _updated(eqn: JaxprEqn, given: Sequence[Known], _: int) -> list[Known]:
    """An update in place, `dynamic_update_slice`: of all examples alike."""
    at = agreed(given)
    if shape_of(eqn, 0)[at.axis] != shape_of(eqn, 1)[at.axis]:
        raise MixesError("updates some of the examples")
    return [at]


def _dynamically_sliced(eqn: JaxprEqn, given: Sequence[Known], _: int) -> list[Known]:
    at = agreed(given)
    if shape_of(eqn)[at.axis] != out_shape(eqn)[at.axis]:
        raise MixesError("takes some of the examples")
    return [at]


_ELEMENTWISE = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil "
    "clamp clz complex conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf "
    "erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow "
    "is_finite le le_to lgamma log log1p logistic lt lt_to max min mul mulhi name ne neg nextafter "
    "not or polygamma population_count pow random_fold_in real reduce_precision "
    "regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta"
).split()
_REDUCTIONS = "sum max min prod and or xor".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys((f"reduce_{name}" for name in _REDUCTIONS), _reduced),
    **dict.fromkeys(("argmax", "argmin", "reduce"), _reduced),
    **dict.fromkeys(("optimization_barrier", "device_put"), each),
    **dict.fromkeys(("sharding_constraint", "reshard"), each),
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("accumulates", "axis")
    ),
    **dict.fromkeys(("random_bits", "random_split", "random_wrap", "random_unwrap"), _of_keys),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _windowed),
    "sort": _along("sorts", "dimension"),
    "top_k": _along("sorts", "axis"),
    "rev": _along("reverses", "dimensions"),
    "concatenate": _along("joins values along", "dimension"),
    "split": _along("splits", "axis"),
    "squeeze": _squeezed,
    "transpose": _transposed,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "stack": _stacked,
    "unstack": _unstacked,
    "slice": _sliced,
    "pad": _padded,
    "fft": _transformed,
    "bitcast_convert_type": _bits_cast,
    "dynamic_slice": _dynamically_sliced,
    "dynamic_update_slice": _updated,
}
