"""`adapt`: runs any function on an adapted tree, with each adapted weight in factored form."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapt import eqns
from lora_jax.adapt.activate import args_with_masks, params_by_prompt
from lora_jax.adapt.eqns import EagerSteps
from lora_jax.adapt.interpreter import Interpreter, Rule
from lora_jax.adapt.nnx_writes import Output, write_back
from lora_jax.adapt.per_example.axes import (
    ExampleAxes,
    find_example_axes,
    follow_tokens,
    follow_trace,
)
from lora_jax.adapt.reports import WeightUse, collect_reports
from lora_jax.adapt.rules.arithmetic import ARITHMETIC_RULES
from lora_jax.adapt.rules.chains import CHAIN_RULES
from lora_jax.adapt.rules.choices import CHOICE_RULES
from lora_jax.adapt.rules.control import CONTROL_RULES, SOLVE_RULES
from lora_jax.adapt.rules.layout import LAYOUT_RULES
from lora_jax.adapt.rules.lookups import LOOK_UP_RULES
from lora_jax.adapt.rules.products import PRODUCT_RULES
from lora_jax.adapt.rules.ragged import RAGGED_RULES
from lora_jax.adapt.rules.reductions import REDUCTION_RULES
from lora_jax.adapt.sides import collect_sides, warn_of_swapped_roles
from lora_jax.adapt.traces import EagerTraces, FlatCall, Trace, trace
from lora_jax.adapt.user_code import user_line_of_call
from lora_jax.core.aliases import KeyPath, flatten_with_aliases, resolve_aliases
from lora_jax.core.axes import Label
from lora_jax.core.base import is_base, stand_in
from lora_jax.core.factored import Factored
from lora_jax.core.opaque import unwrap_opaque_leaves
from lora_jax.core.paths import check_prng_key, fold_in_path, path_string
from lora_jax.core.types import BaseLike, Forward, Leaf, Tree, Value
from lora_jax.core.weight import LoraWeight, Trained, TrainedRows, is_leaf, is_node

# The rule for each primitive that knows what to do with an adapted weight. Products and look-ups
# keep the factored form, layout and arithmetic carry the factors along, control flow is entered.
# Everything else merges.
RULES: dict[str, Rule] = {
    **PRODUCT_RULES,
    **LOOK_UP_RULES,
    **RAGGED_RULES,
    **CHAIN_RULES,
    **LAYOUT_RULES,
    **ARITHMETIC_RULES,
    **REDUCTION_RULES,
    **CHOICE_RULES,
    **CONTROL_RULES,
    **SOLVE_RULES,
}


def adapt(
    fn: Forward, *, strict: bool = False, primitives: Mapping[str, Forward] | None = None
) -> Forward:
    """Returns `fn` for adapted trees: each product with an adapted W is xW + s·(xA)B.

    W + s·AB is never formed, nor a gradient of W where the derivative is taken with respect to
    the adapter half alone (see `lora_jax.split`). `fn` is any function that JAX can trace, of a
    tree of arrays: a Flax Linen ``apply``, a function that calls an NNX module or
    ``nnx.merge(graphdef, state)(x)``, a plain function. Arguments that are not arrays are passed on
    as they are. The result commutes with `jit`, `grad`, `jvp`, `vmap`, `scan` and `remat`.

    What `fn` changes in an NNX module among its arguments (batch statistics, counters of random
    streams, caches) is changed in the module that was passed. An adapted weight that `fn` assigns
    to is merged, with a warning.

    An eager call traces `fn` and compiles its operations one by one; later calls that differ in
    nothing but the elements of arrays run these, without calling `fn` again. To know that, they
    compare other arguments, what `fn` closes over, globals that it names and attributes of objects
    that it reaches. A `fn` that needs the elements of an array is traced in each call. Calls may
    come from several threads.

    A use that has no factored form merges that weight at that place, with a `MergeWarning` that
    names the weight, the primitive and the line of your code.

    Args:
      fn: called with the same arguments, but with plain arrays in place of the tree's nodes.
      strict: raise `MergeError` instead of merging.
      primitives: rules of your own, by the name of a primitive, or of a function under `jax.jit`,
        `jax.custom_vjp` or `jax.custom_jvp` (a Pallas kernel with its derivative, say). Without a
        rule, a weight merges where it enters one of the last two. A rule is called as
        ``rule(*operands, **params)`` with the equation's operands and parameters, an adapted
        weight as a `lora_jax.core.factored.Factored`, and returns the output or the list of
        outputs, or None to have `adapt` do what it does without the rule.

    Returns:
      ``forward(*args, dropout_key=None, **kwargs)``. A PRNG key as `dropout_key` turns on the
      dropout of the rules; each weight, layer and place of use gets a mask of its own. `forward`
      raises TypeError where no argument holds an adapted tree, or `dropout_key` is no PRNG key;
      `RoleError` where a use contradicts a weight's recorded axis roles; and `MergeError` where a
      use has no factored form and a merged weight would not do the same (with dropout or a bias on
      B, say).

    Source: Hu et al., *LoRA*, arXiv 2106.09685, equation 3 (it is ΔW·x that α/r scales).

    >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> forward = lj.adapt(lambda params, x: x @ params["dense"]["kernel"])
    >>> forward(tree, jnp.ones((1, 4)))
    Array([[4., 4., 4.]], dtype=float32)
    """
    own_rules = tuple((primitives or {}).items())
    interpreter = Interpreter(RULES, strict, own_rules)
    eager_traces = EagerTraces()

    @functools.wraps(fn)
    def forward(*args: Tree, dropout_key: jax.Array | None = None, **kwargs: Tree) -> Tree:
        args = args_with_masks(fn, args, kwargs)
        return run(fn, interpreter, args, kwargs, dropout_key, eager_traces)

    forward.params_by_prompt = params_by_prompt  # type: ignore[attr-defined]  # for generation
    return forward


def run(
    fn: Forward,
    interpreter: Interpreter,
    args: tuple[Tree, ...],
    kwargs: dict[str, Tree],
    dropout_key: jax.Array | None,
    eager_traces: EagerTraces | None = None,
    axes: ExampleAxes | None = None,
) -> Tree:
    """Returns ``fn(*args, **kwargs)``, with adapted weights among the arguments in factored form.

    Args:
      fn: the function.
      interpreter: with the rules.
      args, kwargs: arguments of the function.
      dropout_key: see `adapt`.
      eager_traces: traces of the function, for eager calls.
      axes: which axes hold the examples of a batch, where weights have `rows`, so that each example
        has an adapter of its own; see `lora_jax.adapt.per_example`.

    Raises:
      ExamplesError: with `axes`, if the function mixes examples or its result has others. Nothing
        has been run then.
    """
    if dropout_key is not None:
        dropout_key = check_prng_key("dropout_key", dropout_key)
    adapted = _adapted_call(fn, args, kwargs, dropout_key)
    call = adapted.call
    # No weight is factored: all nodes are arrays in `call.leaves`.
    if not adapted.weights:
        args, kwargs = resolve_aliases(unwrap_opaque_leaves(call.treedef.unflatten(call.leaves)))
        return fn(*args, **kwargs)
    example_axes: dict[int, int] = {}
    if axes is not None:
        example_axes = find_example_axes(call, adapted.nodes, axes)
        call = dataclasses.replace(
            call, others={index: call.leaves[index] for index in example_axes}
        )
    # An eager call uses a trace of an earlier call, if there is one.
    cached_trace = None
    if eager_traces is not None and not _is_being_traced():
        cached_trace = eager_traces.find(call)
    traced = trace(call) if cached_trace is None else cached_trace
    _report_assigned_weights(interpreter, traced, adapted.weights, (args, kwargs))
    if axes is not None:
        examples = follow_trace(traced, adapted.weights, call, example_axes, axes.of_result)
        interpreter = dataclasses.replace(interpreter, examples=examples)
    elif any(weight.active is not None for weight in adapted.weights.values()):
        tokens = follow_tokens(traced, adapted.weights, call)
        interpreter = dataclasses.replace(interpreter, examples=tokens)
    eager_steps = None if cached_trace is None else cached_trace.steps
    outputs = _evaluate_call(interpreter, traced, adapted, eager_steps)
    result, writes = traced.outputs.filled(outputs)
    write_back((args, kwargs), writes)
    return result


class _AdaptedCall(NamedTuple):
    """A flattened call, with the weights and the nodes that its leaves stand for.

    Attributes:
      call: the call.
      weights: by the index of a leaf, the weight in its place while the jaxpr is evaluated.
      nodes: by the index of a leaf, the node or base in its place in the caller's tree.
    """

    call: FlatCall
    weights: dict[int, Factored]
    nodes: dict[int, Leaf]


def _evaluate_call(
    interpreter: Interpreter, traced: Trace, adapted: _AdaptedCall, eager_steps: EagerSteps | None
) -> list[Value]:
    """Returns the outputs of a traced function as arrays or nodes, None where unused."""
    inputs = [
        adapted.weights.get(index, adapted.call.leaves[index]) for index in traced.leaf_indices
    ]
    # Outputs that are nodes of the arguments are returned as these nodes. The others are computed.
    leaf_of_output = traced.outputs.origins
    node_of_output = {
        output_index: adapted.nodes[leaf_index]
        for output_index, leaf_index in leaf_of_output.items()
        if leaf_index in adapted.nodes
    }
    inner, _ = eqns.jaxpr_and_consts(traced.jaxpr)
    used_outputs = tuple(
        index in leaf_of_output and index not in node_of_output
        for index in range(len(inner.outvars))
    )
    with collect_sides() as sides_by_path, collect_reports() as reports:
        outputs = interpreter.evaluate(traced.jaxpr, inputs, used_outputs, eager_steps)
        if reports.is_incomplete and not traced.is_reported:
            _report_without_caches(interpreter, traced.jaxpr, inputs, used_outputs)
            traced.is_reported = True
    warn_of_swapped_roles(sides_by_path, traced.jaxpr, inputs)
    # Merge the weights that the function returns.
    assigned_outputs = {
        value.number for value in traced.outputs.assigned.values() if isinstance(value, Output)
    }
    for index, output in enumerate(outputs):
        if index in node_of_output:
            outputs[index] = node_of_output[index]
        elif isinstance(output, Factored):
            if index not in assigned_outputs:  # `_report_assigned_weights` has warned of those
                interpreter.report_merge(output, "output", user_line_of_call())
            outputs[index] = output.merged()
    return outputs


def _report_without_caches(
    interpreter: Interpreter,
    jaxpr: eqns.AnyJaxpr,
    inputs: Sequence[Value],
    used_outputs: Sequence[bool],
) -> None:
    """Walks a jaxpr for its warnings alone; no function inside it comes from JAX's caches."""
    uncached = dataclasses.replace(interpreter, record=_ignore_use, warns=True)

    def evaluate(values: list[Value]) -> list[Value]:
        return uncached.evaluate(jaxpr, values, tuple(used_outputs))

    jax.eval_shape(evaluate, list(inputs))


def _ignore_use(use: WeightUse) -> None:
    """Does nothing with the record of a use."""


def _report_assigned_weights(
    interpreter: Interpreter, traced: Trace, weights: Mapping[int, Factored], arguments: Tree
) -> None:
    """Warns of adapted weights of NNX modules that a function overwrites; they are merged.

    Raises:
      MergeError: under ``strict=True``, or where a merged weight would not do the same.
    """
    if not traced.outputs.assigned:
        return
    keyed_leaves, _ = flatten_with_aliases(arguments, is_leaf)
    for leaf_index in traced.outputs.assigned:
        key_path, node = keyed_leaves[leaf_index]
        may_change = not is_node(node) or isinstance(node, Trained)
        if may_change:
            continue
        weight = weights.get(leaf_index)
        if weight is None:
            weight = _weight_without_factors(
                node.base, len(node.shape), _path_in_argument(key_path)
            )
        interpreter.report_merge(weight, "assignment", user_line_of_call())


def _is_being_traced() -> bool:
    """Returns True if the caller is traced, under `jax.jit` or in a `shard_map`."""
    return isinstance(lax.full((), 0), jax.core.Tracer)


def _adapted_call(
    fn: Forward, args: tuple[Tree, ...], kwargs: dict[str, Tree], dropout_key: jax.Array | None
) -> _AdaptedCall:
    """Returns a flattened call, with its weights and nodes.

    Raises:
      TypeError: no argument holds an adapted tree.
    """
    treedef: jax.tree_util.PyTreeDef
    keyed_leaves, treedef = flatten_with_aliases((args, kwargs), is_leaf)
    if not any(is_leaf(leaf) for _, leaf in keyed_leaves):
        raise TypeError(
            f"adapt({getattr(fn, '__name__', fn)}): no argument contains an adapted tree, so "
            "there is no adapter to run. Pass the tree that lorafy, join or load_adapter "
            "returned as an argument. A tree that the function closes over does not count."
        )
    leaves = [leaf for _, leaf in keyed_leaves]
    nodes: dict[int, Leaf] = {}
    weights: dict[int, Factored] = {}
    for index, (key_path, leaf) in enumerate(keyed_leaves):
        if not is_leaf(leaf):
            continue
        path = _path_in_argument(key_path)
        leaves[index] = _array_for_tracing(leaf, path)
        if is_node(leaf) and leaf.is_factored:
            nodes[index] = leaf
            weights[index] = leaf.factored(path, _dropout_keys_of_weight(leaf, path, dropout_key))
        elif is_base(leaves[index]):
            nodes[index] = leaf
            weights[index] = _weight_without_factors(leaves[index], len(leaf.shape), path)
    stand_ins = {index: stand_in(weight.base) for index, weight in weights.items()}
    return _AdaptedCall(FlatCall(fn, leaves, treedef, stand_ins), weights, nodes)


def _path_in_argument(key_path: KeyPath) -> str:
    """Returns the path of a leaf of (args, kwargs) within its argument."""
    return path_string(key_path[2:])


def _weight_without_factors(base: BaseLike, ndim: int, path: str) -> Factored:
    """Returns W as a weight without factors."""
    labels: list[Label] = ["batch"] * ndim
    return Factored(base, {}, tuple(labels), path=path)


def _array_for_tracing(leaf: Leaf, path: str) -> Leaf:
    """Returns the array or the base with which a leaf is traced."""
    if not is_node(leaf):
        return leaf
    if isinstance(leaf, Trained) and not leaf.is_on:
        raise ValueError(
            f"{path!r} trains in full, but this half of the tree has no value for it. Call "
            "lora_jax.join(adapter, base) first, and pass its result."
        )
    return leaf.base if leaf.is_factored or not leaf.is_on else leaf.merged()


def _dropout_keys_of_weight(
    weight: LoraWeight | TrainedRows, path: str, key: jax.Array | None
) -> jax.Array | None:
    """Returns a weight's dropout keys, one for each index of its batch axes."""
    if key is None or isinstance(weight, TrainedRows) or not weight.dropout:
        return None
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    key = fold_in_path(key, path)
    batch_shape = weight.roles.sizes(weight.shape, "batch")
    if not batch_shape:
        return key
    return jax.random.split(key, math.prod(batch_shape)).reshape(batch_shape)
