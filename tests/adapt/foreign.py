"""Judges `adapt` on modules that others wrote: roles read by looking, nothing merged."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from tests.support import assert_close, with_random_factors

ALL_LINEAR = (lj.LoraRule(targets="all-linear", rank=2, alpha=3.0),)


def rule(targets: lj.rules.Targets, **settings: Any) -> tuple[lj.LoraRule, ...]:
    """One rule of rank 2 whose scale is not one."""
    return (lj.LoraRule(targets=targets, rank=2, alpha=3.0, **settings),)


def judge(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    rules: Sequence[lj.LoraRule] = ALL_LINEAR,
    tolerance: float = 1e-4,
) -> set[str]:
    """Holds ``adapt(fn, strict=True)`` to `fn` of the merged tree; the paths that are adapted.

    Outputs and the adapter's gradients agree, and the adapter is seen in the outputs.
    """
    with jax.numpy_dtype_promotion("standard"):  # code that others wrote, by its own habits
        tree = with_random_factors(lj.lorafy(params, rules, trace=(fn, params, *args)))
        adapter, base = lj.split(tree)

        def values(run: Callable[..., Any]) -> Any:
            def loss(adapter: Any, base: Any, *args: Any) -> Any:
                outputs = jax.tree.leaves(run(lj.join(adapter, base), *args))
                return sum(_seen_from_one_side(y) for y in outputs), outputs

            grad = jax.value_and_grad(loss, has_aux=True)
            (_, outputs), gradients = jax.jit(grad)(adapter, base, *args)
            return outputs, gradients

        ours = values(lj.adapt(fn, strict=True))
        theirs = values(lambda tree, *args: fn(lj.merge(tree), *args))
        plain = jax.tree.leaves(jax.jit(fn)(params, *args))
    assert_close(ours, theirs, tolerance)
    changes = [np.abs(a - b).max() for a, b in zip(ours[0], plain, strict=True)]
    assert max(changes) > 1e-2, "the adapter must be seen in the output"
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(ours[1])), "each factor must train"
    return set(adapter)


def _seen_from_one_side(y: jax.Array) -> jax.Array:
    """A sum of y's elements, each with a weight of its own."""
    return jnp.mean(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))
