"""`adapt`: runs any function of an adapted tree, each adapted weight in factored form."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapt import eqns
from lora_jax.adapt.activate import params_by_prompt, with_own_masks
from lora_jax.adapt.interpreter import Interpreter, Rule
from lora_jax.adapt.nnx_writes import Output, write
from lora_jax.adapt.per_example.axes import ExampleAxes, follow_tokens, follow_trace, mapped
from lora_jax.adapt.rules.arithmetic import ARITHMETIC_RULES
from lora_jax.adapt.rules.chains import CHAIN_RULES
from lora_jax.adapt.rules.choices import CHOICE_RULES
from lora_jax.adapt.rules.control import CONTROL_RULES, SOLVE_RULES
from lora_jax.adapt.rules.layout import LAYOUT_RULES
from lora_jax.adapt.rules.lookups import LOOK_UP_RULES
from lora_jax.adapt.rules.products import PRODUCT_RULES
from lora_jax.adapt.rules.ragged import RAGGED_RULES
from lora_jax.adapt.rules.reductions import REDUCTION_RULES
from lora_jax.adapt.sides import noted, warn_of_swapped
from lora_jax.adapt.traces import EagerTraces, FlatCall, Trace, trace
from lora_jax.adapt.user_code import place_of_call
from lora_jax.core.aliases import flatten, resolved
from lora_jax.core.axes import Label
from lora_jax.core.base import is_base, stand_in
from lora_jax.core.factored import Factored
from lora_jax.core.opaque import unsealed
from lora_jax.core.paths import checked_key, fold_in_path, path_string
from lora_jax.core.types import Forward, Leaf, Tree
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
    own = tuple((primitives or {}).items())
    interpreter, eager = Interpreter(RULES, strict, own), EagerTraces()

    @functools.wraps(fn)
    def forward(*args: Tree, dropout_key: jax.Array | None = None, **kwargs: Tree) -> Tree:
        args = with_own_masks(fn, args, kwargs)
        return run(fn, interpreter, args, kwargs, dropout_key, eager)

    forward.params_by_prompt = params_by_prompt  # type: ignore[attr-defined]  # for generation
    return forward


def run(
    fn: Forward,
    interpreter: Interpreter,
    args: tuple[Tree, ...],
    kwargs: dict[str, Tree],
    dropout_key: jax.Array | None,
    eager: EagerTraces | None = None,
    axes: ExampleAxes | None = None,
) -> Tree:
    """Returns ``fn(*args, **kwargs)``, with adapted weights among the arguments factored.

    Args:
      fn: the function.
      interpreter: with the rules.
      args, kwargs: arguments of the function.
      dropout_key: see `adapt`.
      eager: traces of the function, for eager calls.
      axes: which axes hold the examples of a batch, where weights have `rows`, so that each example
        has an adapter of its own; see `lora_jax.adapt.per_example`.

    Raises:
      ExamplesError: with `axes`, if the function mixes examples or its result has others. Nothing
        has been run then.
    """
    if dropout_key is not None:
        dropout_key = checked_key("dropout_key", dropout_key)
    call, weights, nodes = _flattened(fn, args, kwargs, dropout_key)
    if not weights:
        args, kwargs = resolved(unsealed(call.treedef.unflatten(call.leaves)))
        return fn(*args, **kwargs)
    where = {} if axes is None else mapped(call, nodes, axes)
    call = dataclasses.replace(call, others={place: call.leaves[place] for place in where})
    cached = None if eager is None or _is_traced() else eager.find(call)
    steps = None if cached is None else cached.steps
    traced = trace(call) if cached is None else cached
    _say_assigned(interpreter, traced, weights, (args, kwargs))
    if axes is not None:
        followed = follow_trace(traced, weights, call, where, axes.of_result)
        interpreter = dataclasses.replace(interpreter, examples=followed)
    elif any(weight.active is not None for weight in weights.values()):
        followed = follow_tokens(traced, weights, call)
        interpreter = dataclasses.replace(interpreter, examples=followed)
    inputs = [weights.get(place, call.leaves[place]) for place in traced.places]
    inner, _ = eqns.opened(traced.jaxpr)
    needed = traced.outputs.origins
    same = {n: nodes[origin] for n, origin in needed.items() if origin in nodes}
    live = tuple(n in needed and n not in same for n in range(len(inner.outvars)))
    with noted() as seen:
        values = interpreter.evaluate(traced.jaxpr, inputs, live, steps)
    warn_of_swapped(seen, traced.jaxpr, inputs)
    assigned = {v.number for v in traced.outputs.assigned.values() if isinstance(v, Output)}
    results = [same.get(n, value) for n, value in enumerate(values)]
    for n, value in enumerate(results):
        if isinstance(value, Factored):
            if n not in assigned:  # of which it has been said
                interpreter.say_merged(value, "output", place_of_call())
            results[n] = value.merged()
    result, writes = traced.outputs.filled(results)
    write((args, kwargs), writes)
    return result


def _say_assigned(
    interpreter: Interpreter, traced: Trace, weights: Mapping[int, Factored], arguments: Tree
) -> None:
    """Warns of adapted weights of NNX modules that a function assigns to; they are merged.

    Raises:
      MergeError: under ``strict=True``, or where a merged weight would not do the same.
    """
    if not traced.outputs.assigned:
        return
    keyed, _ = flatten(arguments, is_leaf)
    for place in traced.outputs.assigned:
        key_path, node = keyed[place]
        if not is_node(node) or isinstance(node, Trained):  # whose value it may change
            continue
        weight = weights.get(place)
        if weight is None:
            labels: list[Label] = ["batch"] * len(node.shape)
            weight = Factored(node.base, {}, tuple(labels), path=path_string(key_path[2:]))
        interpreter.say_merged(weight, "assignment", place_of_call())


def _is_traced() -> bool:
    """Returns True if the caller is being traced itself, under `jax.jit` or in a `shard_map`."""
    return isinstance(lax.full((), 0), jax.core.Tracer)


def _flattened(
    fn: Forward, args: tuple[Tree, ...], kwargs: dict[str, Tree], dropout_key: jax.Array | None
) -> tuple[FlatCall, dict[int, Factored], dict[int, Leaf]]:
    """Returns a call as its function is traced, and its weights and nodes by place."""
    treedef: jax.tree_util.PyTreeDef
    keyed, treedef = flatten((args, kwargs), is_leaf)
    if not any(is_leaf(leaf) for _, leaf in keyed):
        raise TypeError(
            f"adapt({getattr(fn, '__name__', fn)}): no argument holds an adapted tree, so "
            "there is no adapter to run. Pass the tree that lorafy, join or load_adapter "
            "returned as an argument; one that the function closes over is not seen"
        )
    leaves = [leaf for _, leaf in keyed]
    nodes: dict[int, Leaf] = {}
    weights: dict[int, Factored] = {}
    for place, (key_path, leaf) in enumerate(keyed):
        if not is_leaf(leaf):
            continue
        path = path_string(key_path[2:])  # without ([args or kwargs], [which of them])
        leaves[place] = _plain(leaf, path)
        if is_node(leaf) and leaf.is_factored:
            nodes[place] = leaf
            weights[place] = leaf.factored(path, _weight_key(leaf, path, dropout_key))
        elif is_base(leaves[place]):
            nodes[place] = leaf
            labels: list[Label] = ["batch"] * len(leaf.shape)
            weights[place] = Factored(leaves[place], {}, tuple(labels), path=path)
    stand_ins = {place: stand_in(weight.base) for place, weight in weights.items()}
    return FlatCall(fn, leaves, treedef, stand_ins), weights, nodes


def _plain(leaf: Leaf, path: str) -> Leaf:
    """Returns a leaf as the function is traced with it."""
    if not is_node(leaf):
        return leaf
    if isinstance(leaf, Trained) and not leaf.is_on:
        raise ValueError(
            f"{path!r} trains in full, and this half of the tree has no value for it: call "
            "lora_jax.join(adapter, base) first"
        )
    return leaf.base if leaf.is_factored or not leaf.is_on else leaf.merged()


def _weight_key(
    weight: LoraWeight | TrainedRows, path: str, key: jax.Array | None
) -> jax.Array | None:
    """Returns a weight's dropout keys, one for each index of its batch axes."""
    if key is None or isinstance(weight, TrainedRows) or not weight.dropout:
        return None
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    key = fold_in_path(key, path)
    batch = weight.roles.sizes(weight.shape, "batch")
    return jax.random.split(key, math.prod(batch)).reshape(batch) if batch else key
