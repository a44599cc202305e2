"""Judges `adapt` on models that others wrote: equal to merge, merging no more than it should."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.adapt.uses import uses
from tests.adapted_trees import with_random_factors
from tests.foreign.case import ALL_LINEAR, Case, Made


class Verdict(NamedTuple):
    """How `adapt` did on a case.

    Attributes:
      paths: of the weights that are adapted.
      merges: a line for each weight and place where it merges.
      errors: by "jit outputs", "jit gradients", "eager outputs" and "eager gradients", the largest
        max|Δ| / max(1, max|ref|) of a leaf.
    """

    paths: set[str]
    merges: list[str]
    errors: dict[str, float]


def judge(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    rules: Sequence[lj.LoraRule] = ALL_LINEAR,
    tolerance: float = 1e-5,
    merges: int = 0,
) -> set[str]:
    """Returns the paths that are adapted, where `adapt` is as good as it should be under jit.

    Raises:
      AssertionError: it is not: it differs from `fn` of the merged tree by more than `tolerance`,
        the adapter is not seen in the outputs, a factor does not train, or weights merge more or
        less often than in `merges` places.
    """
    verdict = measured(Made(fn, params, args, rules), eagerly=False)
    assert len(verdict.merges) == merges, verdict.merges
    assert max(verdict.errors.values()) <= tolerance, verdict.errors
    return verdict.paths


def judged(case: Case) -> Verdict:
    """Returns how `adapt` did on a case; raises AssertionError where it is not as the case says."""
    with jax.numpy_dtype_promotion("standard"):  # code that others wrote, by its own habits
        made = case.make()
    verdict = measured(made)
    assert len(verdict.merges) == case.merges, verdict.merges
    assert len(verdict.paths) == case.weights, sorted(verdict.paths)
    assert max(verdict.errors.values()) <= case.tolerance, verdict.errors
    return verdict


def measured(made: Made, eagerly: bool = True) -> Verdict:
    """Returns how `adapt` does under jit, and eagerly too.

    Checks what makes the comparison one: the adapter is seen, and each factor trains.
    """
    fn, params, args, rules, adapted = made
    with jax.numpy_dtype_promotion("standard"):
        tree = with_random_factors(lj.lorafy(params, rules, trace=(fn, params, *args)))
        adapter, base = lj.split(tree)
        warned: set[str] = set()
        errors = {}
        ours, theirs = adapted or lj.adapt(fn), lambda tree, *args: fn(lj.merge(tree), *args)
        ways = {"jit": jax.jit, "eager": lambda run: run}
        for how, compiled in list(ways.items())[: 2 if eagerly else 1]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", lj.MergeWarning)
                outputs, gradients = _values(compiled, ours, adapter, base, args)
            warned |= {str(w.message) for w in caught if w.category is lj.MergeWarning}
            expected, of_merged = _values(compiled, theirs, adapter, base, args)
            errors[f"{how} outputs"] = _largest(outputs, expected)
            errors[f"{how} gradients"] = _largest(gradients, of_merged)
        plain = _arrays(jax.jit(lambda *a: _arrays(fn(*a)))(params, *args))
        merges = sorted(warned)
        if adapted is None:
            found = [record for record in uses(fn, tree, *args) if record.how == "merged"]
            merges = [f"{record.path} at {record.primitive}" for record in found]
            assert len(warned) == len(merges), (warned, merges)
    assert _largest(outputs, plain) > 1e-2, "the adapter must be seen in the output"
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients[0])), "each factor trains"
    return Verdict(set(adapter), merges, errors)


def _values(
    compiled: Callable[..., Any], run: Callable[..., Any], adapter: Any, base: Any, args: Any
) -> tuple[Any, Any]:
    """Returns the outputs, and the gradients of the adapter and of the inputs that are floats."""
    leaves, treedef = jax.tree.flatten(args)
    floats = {
        i: x for i, x in enumerate(leaves) if jnp.issubdtype(jnp.result_type(x), jnp.floating)
    }

    def loss(trained: Any, base: Any) -> Any:
        adapter, inputs = trained
        given = treedef.unflatten(inputs.get(i, leaf) for i, leaf in enumerate(leaves))
        outputs = _arrays(run(lj.join(adapter, base), *given))
        return sum(_seen_from_one_side(y) for y in outputs), outputs

    grad = jax.value_and_grad(loss, has_aux=True)
    (_, outputs), gradients = compiled(grad)((adapter, floats), base)
    return outputs, gradients


def _arrays(outputs: Any) -> list[jax.Array]:
    """The float arrays among the outputs."""
    leaves = (leaf for leaf in jax.tree.leaves(outputs) if hasattr(leaf, "dtype"))
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _seen_from_one_side(y: jax.Array) -> jax.Array:
    """A sum of y's elements, each with a weight of its own; gradients are not small."""
    return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


def _largest(actual: Any, expected: Any) -> float:
    """The largest max|Δ| / max(1, max|expected|) of a leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(_relative(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs)


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape and np.isfinite(b).all() and not np.isnan(a).any()
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max())) if a.size else 0.0
