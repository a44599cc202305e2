"""A sum over turns, most of which never run: a loop that keeps nothing but its operands.

`add_turns` is a primitive. It is lowered to a loop with a number of turns that only the device
knows, which may be 0. Its derivative runs each turn again and keeps only the operands. A
conditional in its place would fill residuals with zeros in every step, operands among them.

The derivative is a `jax.custom_vjp` over the operands that are differentiated, so nothing computes
the gradient of a frozen operand. Forward mode is not defined.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.extend import Primitive, ad, batching, jaxpr_as_fun, mlir
from lora_jax.core.types import Tree

TURNS = "turns"  # the name of the primitive
# The operands are the number of turns, the total before them, and what a turn reads. The parameter
# is the jaxpr of a turn: (the turn's index, what it reads) -> what the turn adds.
_TURNS_PRIMITIVE = Primitive(TURNS)


def add_turns(
    turn: Callable[..., jax.Array], n_turns: jax.Array, total: jax.Array, *operands: Tree
) -> jax.Array:
    """Returns a total plus the results of turns 0 … n_turns - 1.

    Args:
      turn: (index, *operands) -> an array like `total`. It must not close over traced arrays.
      n_turns: [] int, the number of turns; inside `jax.shard_map`, devices may differ.
      total: any array.
      operands: arrays, or trees of arrays, that turns read.
    """
    leaves, tree = jax.tree.flatten(operands)

    def turn_of_leaves(index: jax.Array, *leaves: jax.Array) -> jax.Array:
        return turn(index, *jax.tree.unflatten(tree, leaves))

    jaxpr = jax.make_jaxpr(turn_of_leaves)(n_turns, *leaves)
    result: jax.Array = _TURNS_PRIMITIVE.bind(n_turns, total, *leaves, jaxpr=jaxpr)
    return result


def _run_loop(n_turns: jax.Array, total: jax.Array, *leaves: jax.Array, jaxpr: Any) -> jax.Array:
    """Runs the turns one by one."""
    turn = jaxpr_as_fun(jaxpr)

    def add_turn(index: jax.Array, total: jax.Array) -> jax.Array:
        (addend,) = turn(index, *leaves)
        next_total: jax.Array = total + addend
        return next_total

    sums: jax.Array = _loop_over_turns(n_turns, add_turn, total)
    return sums


def _loop_over_turns(n_turns: jax.Array, add_turn: Callable[..., Any], total: Any) -> Any:
    """Returns a total after ``total = add_turn(index, total)`` for index 0 … n_turns - 1."""

    def goes_on(state: tuple[jax.Array, Any]) -> jax.Array:
        n_left, _ = state
        return n_left > 0

    def run_turn(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        n_left, total = state
        return n_left - 1, add_turn(n_turns - n_left, total)

    # In `jax.shard_map`, a count that begins with the number of turns varies like that number.
    _, total = lax.while_loop(goes_on, run_turn, (n_turns, total))
    return total


def _run_eagerly(*operands: jax.Array, jaxpr: Any) -> Any:
    return jax.jit(functools.partial(_run_loop, jaxpr=jaxpr))(*operands)


def _abstract_result(_: Any, total: Any, *__: Any, **___: Any) -> Any:
    return total


def _differentiate(primals: Sequence[Any], tangents: Sequence[Any], *, jaxpr: Any) -> Any:
    """Returns the sum and its tangent, which only reverse mode can use."""
    is_variable = tuple(type(tangent) is not ad.Zero for tangent in tangents)
    variable_indices = [index for index, flag in enumerate(is_variable) if flag]
    run = _differentiable_loop(jaxpr, is_variable)

    def run_variables(*variables: jax.Array) -> jax.Array:
        operands = [*primals]
        for index, variable in zip(variable_indices, variables, strict=True):
            operands[index] = variable
        return run(*operands)

    return jax.jvp(
        run_variables,
        [primals[index] for index in variable_indices],
        [tangents[index] for index in variable_indices],
    )


def _differentiable_loop(jaxpr: Any, is_variable: tuple[bool, ...]) -> Callable[..., jax.Array]:
    """Returns the sum as a function with a derivative of its own.

    Args:
      jaxpr: the jaxpr of a turn.
      is_variable: which operands are differentiated: the number of turns, the total, and the rest.
    """
    turn = jaxpr_as_fun(jaxpr)

    @jax.custom_vjp
    def run(*operands: jax.Array) -> jax.Array:
        result: jax.Array = _TURNS_PRIMITIVE.bind(*operands, jaxpr=jaxpr)
        return result

    def run_forward(*operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return run(*operands), operands

    def run_backward(
        operands: tuple[jax.Array, ...], cotangent: jax.Array
    ) -> tuple[jax.Array | None, ...]:
        """Runs each turn again, and adds up the gradients of its operands."""
        n_turns, _, *leaves = operands
        variable_indices = [index for index, flag in enumerate(is_variable[2:]) if flag]
        variables = [leaves[index] for index in variable_indices]

        def add_gradients(index: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
            def addend_of_variables(*variables: jax.Array) -> jax.Array:
                turn_leaves = [*leaves]
                for leaf_index, variable in zip(variable_indices, variables, strict=True):
                    turn_leaves[leaf_index] = variable
                addend: jax.Array
                (addend,) = turn(index, *turn_leaves)
                return addend

            _, pull_back = jax.vjp(addend_of_variables, *variables)
            return [
                total + gradient for total, gradient in zip(sums, pull_back(cotangent), strict=True)
            ]

        zeros = list(map(jnp.zeros_like, variables))
        sums = _loop_over_turns(n_turns, add_gradients, zeros)
        gradients: list[jax.Array | None] = [None] * len(leaves)
        for leaf_index, gradient in zip(variable_indices, sums, strict=True):
            gradients[leaf_index] = gradient
        return None, cotangent, *gradients

    run.defvjp(run_forward, run_backward)
    return run


def _map_turns(operands: Sequence[Any], axes: Sequence[Any], *, jaxpr: Any) -> tuple[Any, int]:
    """Returns the sums of all examples, and the mapped axis of the result.

    An example runs as many turns as the one that has most, and adds its own alone.
    """
    n_turns, total, *leaves = operands
    turns_axis, total_axis, *leaf_axes = axes
    size = next(
        operand.shape[axis]
        for operand, axis in zip(operands, axes, strict=True)
        if axis is not None
    )
    if total_axis is None:
        total = jnp.broadcast_to(total, (size, *total.shape))
    else:
        total = jnp.moveaxis(total, total_axis, 0)
    turn = jaxpr_as_fun(jaxpr)
    turns_of_example = n_turns
    if turns_axis is None:
        turns_of_example = jnp.broadcast_to(n_turns, (size,))

    def add_examples(index: jax.Array, turns_of_example: jax.Array, *leaves: jax.Array) -> Any:
        def add_example(n_turns: jax.Array, *leaves: jax.Array) -> jax.Array:
            (addend,) = turn(index, *leaves)
            return jnp.where(index < n_turns, addend, 0)

        return jax.vmap(add_example, (0, *leaf_axes))(turns_of_example, *leaves)

    most_turns = jnp.max(turns_of_example)
    return add_turns(add_examples, most_turns, total, turns_of_example, *leaves), 0


_TURNS_PRIMITIVE.def_impl(_run_eagerly)
_TURNS_PRIMITIVE.def_abstract_eval(_abstract_result)
mlir.register_lowering(_TURNS_PRIMITIVE, mlir.lower_fun(_run_loop, multiple_results=False))
# Since JAX 0.12: before it is lowered, a turn with functions of a derivative of their own becomes a
# part of the loop.
_TURNS_PRIMITIVE.to_lojax = _run_loop  # type: ignore[method-assign]
ad.primitive_jvps[_TURNS_PRIMITIVE] = _differentiate
batching.primitive_batchers[_TURNS_PRIMITIVE] = _map_turns
