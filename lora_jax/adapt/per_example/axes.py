"""Finds the axes of a function's arguments and results that index the examples of a batch."""

import dataclasses
from collections.abc import Mapping, Sequence

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
from lora_jax.adapt.per_example.tokens import label_of_tokens
from lora_jax.adapt.per_example.walk import labels_of_jaxpr
from lora_jax.adapt.traces import FlatCall, Trace
from lora_jax.adapt.user_code import user_line_of_call
from lora_jax.core.factored import ExamplesError, Factored
from lora_jax.core.types import Leaf, Tree, Value


@dataclasses.dataclass(frozen=True)
class ExampleAxes:
    """The axes that index the examples, in the form of `jax.vmap`'s in_axes and out_axes.

    Attributes:
      of_args: a prefix of the positional arguments. None for what is the same for all examples, the
        adapted tree among it.
      of_result: a prefix of the function's result, or a function that returns one for a tree like
        the result. A result that is the same for all examples has any axis of their number.
    """

    of_args: Tree
    of_result: Tree


def find_example_axes(
    call: FlatCall, nodes: Mapping[int, Value], axes: ExampleAxes
) -> dict[int, int]:
    """Returns the example axis of each leaf that has one, by the index of the leaf.

    Args:
      call: the call; its leaves have nodes whole.
      nodes: the nodes of adapted trees, by the index of the leaf.
      axes: axes of the examples.

    Raises:
      ValueError: `axes` do not fit the arguments, or a node has an axis of examples.
    """
    # The arguments with the index of each leaf in its place.
    args, kwargs = call.treedef.unflatten(range(len(call.leaves)))
    plain_kwargs = {
        name: indices for name, indices in kwargs.items() if not _holds_node(indices, nodes)
    }
    declared_axes = _axis_by_leaf(axes.of_args, args) | _axis_by_leaf(0, plain_kwargs)
    example_axes: dict[int, int] = {}
    sizes = set()
    for leaf_index, axis in declared_axes.items():
        if axis is None:
            continue
        shape = getattr(call.leaves[leaf_index], "shape", ())
        is_node = leaf_index in nodes
        if is_node or not -len(shape) <= axis < len(shape):
            problem = f"Axis {axis} cannot be the examples' axis of an argument of shape {shape}"
            if is_node:
                raise ValueError(
                    f"{problem}, because it is a node of an adapted tree. Use None as its axis."
                )
            raise ValueError(f"{problem}. Use an axis of this shape.")
        example_axes[leaf_index] = axis % len(shape)
        sizes.add(shape[axis])
    if len(sizes) > 1:
        raise ValueError(
            f"The arguments have different numbers of examples, {sorted(sizes)}. Pass arguments "
            "with the same number of examples."
        )
    return example_axes


def _holds_node(indices: Tree, nodes: Mapping[int, Value]) -> bool:
    """Returns True if a leaf with one of these indices is a node of an adapted tree."""
    return any(index in nodes for index in jax.tree.leaves(indices))


@dataclasses.dataclass(frozen=True)
class _AxisLeaf:
    """An axis, or None, as a leaf of a tree."""

    axis: int | None


def _axis_by_leaf(prefix: Tree, tree: Tree) -> dict[Leaf, int | None]:
    """Returns the axis of each leaf of a tree.

    Args:
      prefix: a prefix of the tree with an axis, or None, as each leaf.
      tree: the tree, whose leaves are the keys of the result.
    """
    axis_leaves = jax.tree.map(_AxisLeaf, prefix, is_leaf=lambda axis: axis is None)
    axis_tree = jax.tree.broadcast(axis_leaves, tree)
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(axis_tree), strict=True)
    return {leaf: axis_leaf.axis for leaf, axis_leaf in pairs}


def follow_trace(
    traced: Trace,
    weights: Mapping[int, Factored],
    call: FlatCall,
    example_axes: Mapping[int, int],
    of_result: Tree,
) -> ExampleLabels:
    """Returns the example axis of each value of a function, and checks the function's result.

    Args:
      traced: trace of the call.
      weights: the adapted weights, by the index of the leaf.
      call: the call.
      example_axes: see `find_example_axes`.
      of_result: see `ExampleAxes`.

    Raises:
      ExamplesError: there are no examples, or their number is not that of the weights' rows; an
        output mixes examples, or its examples lie elsewhere than asked.
    """
    if not example_axes:
        raise ExamplesError("no argument contains examples")
    leaf_index = min(example_axes)
    n_examples = call.leaves[leaf_index].shape[example_axes[leaf_index]]
    for weight in weights.values():
        if weight.rows is None:
            continue
        if len(weight.rows) != n_examples:
            raise ValueError(
                f"{weight.path!r} has adapters for {len(weight.rows)} examples, but the "
                f"batch has {n_examples}. Choose one adapter for each example of the batch."
            )
        if weight.gain is not None or weight.shift is not None:
            raise ExamplesError(
                f"the weight {weight.path!r} has a magnitude or a bias on B, which is the same for "
                "all examples"
            )
    input_labels: list[ExampleLabel] = []
    for leaf_index in traced.leaf_indices:
        label: ExampleLabel = None
        if leaf_index in example_axes:
            label = ExampleAxis(example_axes[leaf_index])
        elif leaf_index in weights and weights[leaf_index].rows is not None:
            label = ExampleKernels(weights[leaf_index].labels)
        input_labels.append(label)
    labels = labels_of_jaxpr(traced.jaxpr, input_labels, n_examples)
    _check_example_axes_of_result(traced, labels, n_examples, of_result)
    return labels


def follow_tokens(traced: Trace, weights: Mapping[int, Factored], call: FlatCall) -> ExampleLabels:
    """Returns the axes of the masks' tokens in the operands that multiply adapted weights.

    The tokens lie in arguments without an adapted tree, and in arrays that are closed over.

    Args:
      traced: trace of the call.
      weights: the adapted weights, by the index of the leaf.
      call: the call.
    """
    masks = [weight.active for weight in weights.values() if weight.active is not None]
    mask_shapes = tuple(sorted({mask.shape for mask in masks}))
    ids_of_params = _ids_beside_weights(weights, call)

    def label_of_array(array: Leaf) -> ExampleLabel:
        if id(array) in ids_of_params:
            return None
        return label_of_tokens(np.shape(array), mask_shapes)

    labels: list[ExampleLabel] = []
    for leaf_index in traced.leaf_indices:
        weight = weights.get(leaf_index)
        if weight is not None and weight.active is not None:
            labels.append(ExampleKernels(weight.labels))
        else:
            labels.append(label_of_array(call.leaves[leaf_index]))
    _, consts = eqns.jaxpr_and_consts(traced.jaxpr)
    labels += map(label_of_array, consts)
    return labels_of_jaxpr(traced.jaxpr, labels, mask_shapes)


def _ids_beside_weights(weights: Mapping[int, Factored], call: FlatCall) -> set[int]:
    """Returns the ids of all leaves of the arguments that contain an adapted weight."""
    args, kwargs = call.treedef.unflatten(range(len(call.leaves)))
    ids: set[int] = set()
    for indices in (*args, *kwargs.values()):
        if _holds_node(indices, weights):
            ids |= {id(call.leaves[index]) for index in jax.tree.leaves(indices)}
    return ids


def _check_example_axes_of_result(
    traced: Trace, labels: ExampleLabels, n_examples: int, expected_axes: Tree
) -> None:
    """Checks that the function's result has the examples along the expected axes.

    Args:
      traced: trace of the function.
      labels: the labels of its jaxpr's outputs.
      n_examples: the number of examples.
      expected_axes: see `ExampleAxes.of_result`.

    Raises:
      ExamplesError: the result has the examples along other axes, or mixed, or a write to an NNX
        object depends on the examples.
    """
    # For each leaf of the result and of the writes, its shape and the axis of the examples.
    jaxpr, _ = eqns.jaxpr_and_consts(traced.jaxpr)
    shape_of_leaf: list[tuple[int, ...]] = []
    axis_of_leaf: list[int | None] = []
    for leaf in traced.outputs.leaves:
        if isinstance(leaf, Output):
            shape = tuple(eqns.type_of(jaxpr.outvars[leaf.number]).shape)
            axis_of_leaf.append(_examples_axis(labels.outputs[leaf.number], shape, n_examples))
        else:
            # A leaf that no input reaches is the same for all examples.
            shape = np.shape(leaf)
            axis_of_leaf.append(None)
        shape_of_leaf.append(shape)
    # The result and the writes, with the index of each leaf in its place.
    result, writes = traced.outputs.treedef.unflatten(range(len(axis_of_leaf)))
    if any(axis_of_leaf[index] is not None for index in jax.tree.leaves(writes)):
        raise ExamplesError("the function writes a value that depends on the examples")
    if callable(expected_axes):
        expected_axes = expected_axes(result)
    for index, expected_axis in _axis_by_leaf(expected_axes, result).items():
        _check_output_axis(axis_of_leaf[index], expected_axis, shape_of_leaf[index], n_examples)


def _examples_axis(label: ExampleLabel, shape: Sequence[int], n_examples: int) -> int | None:
    """Returns the axis of an output that indexes the examples, or None if there is none."""
    if isinstance(label, MixedExamples):
        raise ExamplesError(f"the examples of the batch cannot be told apart, because {label.why}")
    if isinstance(label, ExampleKernels):
        raise ExamplesError(f"the function returns an adapted weight at {user_line_of_call()}")
    if not isinstance(label, ExampleAxis):
        return None
    if shape[label.axis] != n_examples:
        raise ExamplesError(
            f"in an output of shape {tuple(shape)}, the axis of the examples is merged with "
            f"another axis, into axis {label.axis}"
        )
    return label.axis


def _check_output_axis(
    axis: int | None, expected_axis: int | None, shape: Sequence[int], n_examples: int
) -> None:
    """Raises ExamplesError unless an output has the examples along the requested axis.

    An output that is the same for all examples has any axis of their number.
    """
    if expected_axis is not None and shape:
        expected_axis %= len(shape)
    if axis == expected_axis:
        return
    # The output is the same for all examples, and has an axis of their number.
    if axis is None and expected_axis is not None:
        is_axis_of_examples = tuple(shape[expected_axis : expected_axis + 1]) == (n_examples,)
        if is_axis_of_examples:
            return
    position = "is the same for all examples"
    if axis is not None:
        position = f"has the examples along axis {axis}"
    raise ExamplesError(
        f"an output of shape {tuple(shape)} {position}, but out_axes says {expected_axis}"
    )
