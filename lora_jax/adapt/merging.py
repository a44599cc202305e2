"""Warns of, or refuses, uses of a weight that have no factored form: W + s·AB is formed there."""

from collections.abc import Sequence

from lora_jax.adapt.user_code import SourceLine, user_line_of, warn
from lora_jax.core.extend import JaxprEqn
from lora_jax.core.factored import Factored, TokensError
from lora_jax.core.types import Value


class MergeWarning(UserWarning):
    """A weight is used in a way that has no factored form, so W + s·AB is formed at that place."""


class MergeError(ValueError):
    """A weight has no factored form at a use, and is not merged there.

    Raised under ``strict=True``, and where a merged weight could not do the same: with dropout on,
    with a bias on B, with `uses` other than "all", or where some tokens alone see the adapter.
    """


_ADVICE = (
    "To avoid it, multiply by the weight with a dot product (x @ w, einsum), or leave the weight "
    "out of the rules"
)
_ADVICE_ON_ASSIGNMENT = (
    "To avoid it, leave the weight out of the rules, or run the function on lora_jax.merge(params)"
)
_PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
OWN_DERIVATIVES = ("custom_vjp_call", "custom_jvp_call")


def merge_reason(primitive: str) -> str:
    """Returns the reason why a weight has no factored form at a primitive."""
    if primitive in OWN_DERIVATIVES:
        return "has a derivative of its own, which must be kept"
    if primitive == "output":
        return "the weight itself, changed, is an output"
    if primitive == "assignment":
        return "the function assigns to it"
    return "has no factored form"


def advice(weight: Factored, primitive: str, function: str | None) -> str:
    """Returns the remedy for a merge.

    Args:
      weight: the weight that is merged.
      primitive: the primitive that the weight meets.
      function: the name of the function that it calls, if it calls one.
    """
    if primitive == "assignment":
        return _ADVICE_ON_ASSIGNMENT
    if primitive in _PRODUCTS:
        axes = zip(weight.base.shape, weight.labels, strict=True)
        roles = ", ".join(f"{size}: {label}" for size, label in axes)
        return (
            f"The roles of its axes are ({roles}). If they do not fit this product, give lorafy a "
            "trace, trace=(fn, params, x), or give in_axes= and out_axes= in the rule of this "
            "weight. Else exclude the weight from the rules"
        )
    if primitive not in OWN_DERIVATIVES:
        return _ADVICE
    name = function or primitive
    return (
        f"To avoid it where {name!r} calls a function of yours (a vector field, the body of a "
        "loop): adapt that function, field = lora_jax.adapt(field), and not the one around it; the "
        "adapted tree reaches it through the arguments that are there for it (args). Where it is a "
        "kernel, give a rule for it: "
        f"adapt(fn, primitives={{{name!r}: rule}})"
    )


def example_error(weight: Factored, primitive: str, line: SourceLine) -> str:
    """Returns the message for a primitive that weights with an adapter each example cannot meet."""
    return (
        f"the weight {weight.path!r} has an adapter for each example of a batch, and it is not "
        f"known which examples {primitive!r} at {line} multiplies it by"
    )


# The primitives that a weight may meet that some tokens alone see: a product, or what moves or
# casts it.
_TELL_TOKENS = frozenset(
    """
    dot_general transpose squeeze expand_dims broadcast_in_dim reshape slice dynamic_slice split
    unstack convert_element_type copy copy_p name stop_gradient device_put sharding_constraint
    reshard
    """.split()
)
# Primitives that several such weights may enter. Where a derivative of its own would merge a
# weight, that is refused there.
_ENTERED = frozenset(
    """
    jit pjit closed_call core_call remat2 checkpoint scan while cond shard_map
    optimization_barrier custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr
    """.split()
)


def check_tokens(primitive: str, values: Sequence[Value], eqn: JaxprEqn) -> None:
    """Raises a TokensError where a primitive does not tell which tokens see an adapted weight.

    Args:
      primitive: the primitive.
      values: its operands.
      eqn: the equation, whose line the message names.
    """
    weights = [value for value in values if isinstance(value, Factored)]
    tells_tokens = primitive in _TELL_TOKENS and len(weights) == 1
    if tells_tokens or primitive in _ENTERED:
        return
    for weight in weights:
        if weight.active is not None:
            raise TokensError(
                f"The weight {weight.path!r} acts on some tokens only, but {primitive!r} at "
                f"{user_line_of(eqn)} does not show which tokens it multiplies. Exclude the "
                "weight from the rules, if it is a table that is looked up, a kernel of "
                "experts or of a convolution."
            )


def warn_or_raise(
    weight: Factored, primitive: str, function: str | None, line: SourceLine, *, strict: bool
) -> None:
    """Warns that a weight is merged.

    Args:
      weight: the weight.
      primitive, function: see `advice`.
      line: the user's line.
      strict: raise instead.

    Raises:
      MergeError: `strict`, or a merged weight would not do what the weight does.
    """
    problem = _problem(weight, primitive, line)
    remedy = advice(weight, primitive, function)
    if weight.key is not None and weight.dropout:
        raise MergeError(
            f"{problem}, but a merged weight cannot have dropout. Remove dropout_key, or set "
            "dropout=0 in the rule of this weight."
        )
    if weight.active is not None:
        raise MergeError(
            f"{problem}, but this weight acts on some tokens only, and a merged weight acts on "
            f"all. {remedy}"
        )
    if weight.uses != "all":
        raise MergeError(
            f"{problem}, but its uses are adapted one by one (uses={weight.uses!r}), so it "
            f"cannot be merged. {remedy}"
        )
    if weight.shift is not None:
        raise MergeError(
            f"{problem}, but a merged weight has no place for a bias on B. {remedy}, or set "
            "bias_on_b=False in its rule."
        )
    if strict:
        raise MergeError(f"{problem}. {remedy}")
    formed = "W + s·AB" if weight.parts else "W"
    cost = f": {formed} is formed there, at the cost of W's memory. The result is right"
    if primitive == "assignment":
        cost = ". The result is right, and the weight that was passed has no adapter afterwards"
    warn(f"{problem}{cost}. {remedy}.", MergeWarning, line)


def _problem(weight: Factored, primitive: str, line: SourceLine) -> str:
    """Returns the first part of a message: the weight, and the use that has no factored form."""
    if primitive == "output":
        return f"the weight {weight.path!r}, changed, is an output of the function at {line}"
    if primitive == "assignment":
        return (
            f"the function at {line} assigns to {weight.path!r}, which is adapted: what it "
            "assigns takes the place of W and its factors"
        )
    reason = merge_reason(primitive)
    return f"the weight {weight.path!r} meets {primitive!r} at {line}, which {reason}"
