"""Finds the axes of a function's arguments and results that hold the examples of a batch."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from lora_jax.adapt import eqns
from lora_jax.adapt.nnx_writes import Output
from lora_jax.adapt.per_example.labels import (
    ExampleAxis,
    ExampleKernels,
    ExampleLabel,
    ExampleLabels,
    MixedExamples,
)
from lora_jax.adapt.per_example.tokens import tokens_of
from lora_jax.adapt.per_example.walk import followed
from lora_jax.adapt.traces import FlatCall, Trace
from lora_jax.adapt.user_code import place_of_call
from lora_jax.core.factored import ExamplesError, Factored
from lora_jax.core.types import Leaf, Tree, Value


@dataclasses.dataclass(frozen=True)
class ExampleAxes:
    """The axes that hold the examples, as `jax.vmap` is told: keyword arguments have them first.

    Attributes:
      of_args: a prefix of the positional arguments. None for what is the same for all examples, the
        adapted tree among it.
      of_result: a prefix of the function's result, or a function that returns one for a tree like
        the result. A result that is the same for all examples has any axis of their number.
    """

    of_args: Tree
    of_result: Tree


def mapped(call: FlatCall, nodes: Mapping[int, Value], axes: ExampleAxes) -> dict[int, int]:
    """Returns, by the place of each leaf that holds examples, the axis that does.

    Args:
      call: the call; its leaves have nodes whole.
      nodes: the nodes of adapted trees, by place.
      axes: axes of the examples.

    Raises:
      ValueError: `axes` do not fit the arguments, or a node has an axis of examples.
    """
    args, kwargs = call.treedef.unflatten(range(len(call.leaves)))
    holding = dict(_pairs(axes.of_args, args))
    holding |= dict(_pairs(0, {k: v for k, v in kwargs.items() if not _holds(v, nodes)}))
    holding = {place: axis for place, axis in holding.items() if axis is not None}
    sizes = set()
    for place, axis in holding.items():
        shape = getattr(call.leaves[place], "shape", ())
        if place in nodes or not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"axis {axis} cannot hold the examples of an argument of shape {tuple(shape)}"
                + ", a node of an adapted tree: give None" * (place in nodes)
            )
        holding[place] = axis % len(shape)
        sizes.add(shape[axis])
    if len(sizes) > 1:
        raise ValueError(f"the arguments hold {sorted(sizes)} examples: give one number of them")
    return holding


def _holds(tree: Tree, nodes: Mapping[int, Value]) -> bool:
    return any(place in nodes for place in jax.tree.leaves(tree))


def _pairs(prefix: Tree, tree: Tree) -> Iterator[tuple[Leaf, Leaf]]:
    """Returns each leaf of a tree with that of its prefix, where None is a leaf, too."""
    boxed = jax.tree.map(_Leaf, prefix, is_leaf=lambda axis: axis is None)
    axes = (leaf.axis for leaf in jax.tree.leaves(jax.tree.broadcast(boxed, tree)))
    return zip(jax.tree.leaves(tree), axes, strict=True)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """An axis, or None, as a leaf of a tree."""

    axis: int | None


def follow_trace(
    traced: Trace,
    weights: Mapping[int, Factored],
    call: FlatCall,
    axes: Mapping[int, int],
    of_result: Tree,
) -> ExampleLabels:
    """Returns the examples' axes in a function's values, after a check of its result.

    Args:
      traced: trace of the call.
      weights: by place among its leaves.
      call: the call.
      axes: see `mapped`.
      of_result: see `ExampleAxes`.

    Raises:
      ExamplesError: there are no examples, or their number is not that of the weights' rows; an
        output mixes examples, or its examples lie elsewhere than asked.
    """
    if not axes:
        raise ExamplesError("no argument holds examples")
    place, axis = next(iter(axes.items()))
    n = call.leaves[place].shape[axis]
    for weight in weights.values():
        if weight.rows is None:
            continue
        if len(weight.rows) != n:
            raise ValueError(f"{weight.path!r} has adapters for {len(weight.rows)} of {n} examples")
        if weight.gain is not None or weight.shift is not None:
            raise ExamplesError(
                f"the weight {weight.path!r} has a magnitude or a bias on B, of which there is "
                "one for all examples"
            )

    def known(place: int) -> ExampleLabel:
        if place in axes:
            return ExampleAxis(axes[place])
        weight = weights.get(place)
        return None if weight is None or weight.rows is None else ExampleKernels(weight.labels)

    labels = followed(traced.jaxpr, [known(place) for place in traced.places], n)
    _check_result(traced, labels, n, of_result)
    return labels


def follow_tokens(traced: Trace, weights: Mapping[int, Factored], call: FlatCall) -> ExampleLabels:
    """Returns the places of the tokens of masks in the operands that weights are multiplied by.

    The tokens lie in arguments without an adapted tree, and in arrays that are closed over.

    Args:
      traced: trace of the call.
      weights: by place among its leaves.
      call: the call.
    """
    active = {place: w for place, w in weights.items() if w.active is not None}
    masks = tuple(sorted({weight.active.shape for weight in active.values()}))
    args, kwargs = call.treedef.unflatten(range(len(call.leaves)))
    trees = [tree for tree in (*args, *kwargs.values()) if _holds(tree, weights)]
    params = {id(call.leaves[place]) for place in jax.tree.leaves(trees)}

    def label_of(array: Leaf, place: int | None = None) -> ExampleLabel:
        if place in active:
            return ExampleKernels(weights[place].labels)
        return None if id(array) in params else tokens_of(np.shape(array), masks)

    _, consts = eqns.opened(traced.jaxpr)
    labels = [label_of(call.leaves[place], place) for place in traced.places]
    return followed(traced.jaxpr, [*labels, *map(label_of, consts)], masks)


def _check_result(traced: Trace, labels: ExampleLabels, n: int, expected: Tree) -> None:
    inner, _ = eqns.opened(traced.jaxpr)
    types = [eqns.type_of(atom) for atom in inner.outvars]
    known = list(zip(labels.outputs, types, strict=True))
    each = [
        known[leaf.number] if isinstance(leaf, Output) else (None, leaf)
        for leaf in traced.outputs.leaves
    ]
    axes = [_axis(label, np.shape(value), n) for label, value in each]
    result, writes = traced.outputs.treedef.unflatten(range(len(axes)))
    if any(axes[place] is not None for place in jax.tree.leaves(writes)):
        raise ExamplesError("the function writes what depends on the examples")
    if callable(expected):
        expected = expected(result)
    for place, want in _pairs(expected, result):
        shape = np.shape(each[place][1])
        want = want if want is None else want % len(shape) if shape else want
        _check(axes[place], want, shape, n)


def _axis(known: ExampleLabel, shape: Sequence[int], n: int) -> int | None:
    """Returns the axis of an output that holds the examples."""
    if isinstance(known, MixedExamples):
        raise ExamplesError(f"the examples of the batch cannot be told apart: {known.why}")
    if isinstance(known, ExampleKernels):
        raise ExamplesError(f"an adapted weight is an output of the function at {place_of_call()}")
    if not isinstance(known, ExampleAxis):
        return None
    if shape[known.axis] != n:
        raise ExamplesError(
            f"an output of shape {tuple(shape)} has the examples merged with others along axis "
            f"{known.axis}"
        )
    return known.axis


def _check(axis: int | None, want: int | None, shape: Sequence[int], n: int) -> None:
    if axis == want or (axis is None and want is not None and shape[want : want + 1] == (n,)):
        return
    there = (
        "is the same for all examples" if axis is None else f"has the examples along axis {axis}"
    )
    raise ExamplesError(
        f"an output of shape {tuple(shape)} {there}; the axis that was asked for is {want}"
    )
