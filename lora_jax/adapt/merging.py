"""Warns of uses that merge a weight because they have no factored form, or raises an error.

The weight is **merged** at such a use: W + s·AB is formed.
"""

from collections.abc import Sequence

from lora_jax.adapt.reports import is_new_message, note_report
from lora_jax.adapt.user_code import SourceLine, user_line_of, warn
from lora_jax.core.extend import JaxprEqn
from lora_jax.core.factored import Factored, TokensError
from lora_jax.core.types import Value


class MergeWarning(UserWarning):
    """Warns that W + s·AB is formed at a use that has no factored form."""


class MergeError(ValueError):
    """Raised where a use has no factored form, and the weight must not be merged.

    Raised under ``strict=True``, and where a merged weight could not do the same: with dropout on,
    with a bias on B, with `uses` other than "all", or where some tokens alone see the adapter.
    """


_MERGE_REMEDY = (
    "To avoid the merge, multiply by the weight with a dot product (x @ w, einsum), or exclude the "
    "weight from the rules"
)
_ASSIGNMENT_REMEDY = (
    "To avoid the merge, exclude the weight from the rules, or call the function with "
    "lora_jax.merge(params)"
)
_PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
CUSTOM_DERIVATIVES = ("custom_vjp_call", "custom_jvp_call")


def merge_reason(primitive: str) -> str:
    """Returns the reason why a weight has no factored form at a primitive."""
    if primitive in CUSTOM_DERIVATIVES:
        return "has a derivative of its own, which must be kept"
    if primitive == "output":
        return "the function returns the changed weight"
    if primitive == "assignment":
        return "the function assigns to the weight"
    return "has no factored form"


def merge_remedy(weight: Factored, primitive: str, function: str | None) -> str:
    """Returns the remedy for a merge.

    Args:
      weight: the weight that is merged.
      primitive: the primitive that the weight meets.
      function: the name of the function that it calls, if it calls one.
    """
    if primitive == "assignment":
        return _ASSIGNMENT_REMEDY
    if primitive in _PRODUCTS:
        axes = zip(weight.base.shape, weight.labels, strict=True)
        roles = ", ".join(f"{size}: {label}" for size, label in axes)
        return (
            f"The roles of its axes are ({roles}). If they do not fit this product, give lorafy a "
            "trace, trace=(fn, params, x), or give in_axes= and out_axes= in the rule of this "
            "weight. Else exclude the weight from the rules"
        )
    if primitive not in CUSTOM_DERIVATIVES:
        return _MERGE_REMEDY
    name = primitive if function is None else function
    return (
        f"If {name!r} calls a function of yours (a vector field, the body of a loop), adapt only "
        "this inner function with field = lora_jax.adapt(field), and pass the adapted tree to it "
        f"through its arguments (args). If {name!r} is a compiled kernel, pass a rule for it with "
        f"adapt(fn, primitives={{{name!r}: rule}})"
    )


def unknown_examples_message(weight: Factored, primitive: str, line: SourceLine) -> str:
    """Returns the error message for a primitive that hides which example uses which adapter."""
    return (
        f"the weight {weight.path!r} has an adapter for each example of a batch, but "
        f"{primitive!r} at {line} does not show which examples it multiplies the weight by"
    )


# The primitives that a weight with a mask of tokens may meet: a product, and operations that move
# or cast the weight.
_PRIMITIVES_THAT_TELL_TOKENS = frozenset(
    """
    dot_general transpose squeeze expand_dims broadcast_in_dim reshape slice dynamic_slice split
    unstack convert_element_type copy copy_p name stop_gradient device_put sharding_constraint
    reshard
    """.split()
)
# Primitives that several such weights may enter. A custom derivative would merge the weight, which
# raises an error there.
_ENTERED_PRIMITIVES = frozenset(
    """
    jit pjit closed_call core_call remat2 checkpoint scan while cond shard_map
    optimization_barrier custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr
    """.split()
)


def check_tokens(primitive: str, values: Sequence[Value], eqn: JaxprEqn) -> None:
    """Raises a TokensError if a primitive does not show which tokens it multiplies.

    Args:
      primitive: the primitive.
      values: its operands.
      eqn: the equation, whose line the message names.
    """
    weights = [value for value in values if isinstance(value, Factored)]
    tells_tokens = primitive in _PRIMITIVES_THAT_TELL_TOKENS and len(weights) == 1
    if tells_tokens or primitive in _ENTERED_PRIMITIVES:
        return
    for weight in weights:
        if weight.active is not None:
            raise TokensError(
                f"The weight {weight.path!r} acts on some tokens only, but {primitive!r} at "
                f"{user_line_of(eqn)} does not show which tokens it multiplies. Exclude embedding "
                "tables, kernels of experts and kernels of convolutions from the rules."
            )


def warn_of_merge(
    weight: Factored, primitive: str, function: str | None, line: SourceLine, *, strict: bool
) -> None:
    """Warns that a weight is merged, or raises an error.

    Args:
      weight: the weight.
      primitive, function: see `merge_remedy`.
      line: the user's line.
      strict: raise instead.

    Raises:
      MergeError: `strict`, or a merged weight would not do what the weight does.
    """
    problem = _describe_merge(weight, primitive, line)
    remedy = merge_remedy(weight, primitive, function)
    if weight.key is not None and weight.dropout:
        raise MergeError(
            f"{problem}, but a merged weight cannot have dropout. Remove dropout_key, or set "
            "dropout=0 in the rule of this weight."
        )
    if weight.active is not None:
        raise MergeError(
            f"{problem}, but this weight acts on some tokens only, and a merged weight acts on "
            f"all tokens. {remedy}."
        )
    if weight.uses != "all":
        raise MergeError(
            f"{problem}, but the uses of this weight do not all see the same adapter "
            f"(uses={weight.uses!r}), so it cannot be merged. {remedy}."
        )
    if weight.shift is not None:
        raise MergeError(
            f"{problem}, but a merged weight has no place for a bias on B. {remedy}, or set "
            "bias_on_b=False in the rule of this weight."
        )
    if strict:
        raise MergeError(f"{problem}. {remedy}.")
    formed_kernel = "W + s·AB" if weight.parts else "W"
    effect = f"{formed_kernel} is formed there, which needs the memory of W. The result is right"
    if primitive == "assignment":
        effect = "The result is right, but the weight that you passed has no adapter afterwards"
    message = f"{problem}. {effect}. {remedy}."
    note_report()
    if is_new_message(message, line):
        warn(message, MergeWarning, line)


def _describe_merge(weight: Factored, primitive: str, line: SourceLine) -> str:
    """Returns the first part of the message: the weight, and the use without a factored form."""
    if primitive == "output":
        return f"The changed weight {weight.path!r} is an output of the function at {line}"
    if primitive == "assignment":
        return (
            f"The function at {line} assigns to {weight.path!r}, which is adapted, so the assigned "
            "value replaces W and its factors"
        )
    reason = merge_reason(primitive)
    return f"The weight {weight.path!r} meets {primitive!r} at {line}, which {reason}"
