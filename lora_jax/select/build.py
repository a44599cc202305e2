"""Makes the node of one leaf by its rule: draws its factors, adds its variants' arrays."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.axes import EMBEDDING_NAMES
from lora_jax.core.base import as_array, is_abstract
from lora_jax.core.factored import factor_shapes, matrices_of
from lora_jax.core.magnitude import wide
from lora_jax.core.parts import filled
from lora_jax.core.paths import fold_in_path, leaf_name
from lora_jax.core.types import Leaf
from lora_jax.core.weight import LoraWeight, Node, Part, Trained, TrainedRows
from lora_jax.init import Factors, FactorShape, takes_from_base
from lora_jax.select.resolve import Adaptation, Decision, FullTraining
from lora_jax.variants.variant import KernelFacts, MakeFactors, Variant

Starts = Mapping[Variant, MakeFactors]


def starts_of(leaves: Mapping[str, Leaf], chosen: Mapping[str, Decision], key: jax.Array) -> Starts:
    """Returns the functions that make A and B of a tree's weights, for variants that draw none.

    Args:
      leaves: the arrays of the tree, by path.
      chosen: the decision for some of them, by path.
      key: a PRNG key.

    Raises:
      ValueError: the weights do not fit their variant.
    """
    kernels: dict[Variant, list[KernelFacts]] = {}
    for path, choice in chosen.items():
        if isinstance(choice, Adaptation) and (variant := _starting(choice)):
            kernels.setdefault(variant, []).append(_kernel(leaves[path], path, choice))
    return {v: v.start(each, key) for v, each in kernels.items() if v.start}


def _starting(choice: Adaptation) -> Variant | None:
    """Returns the variant that gives a weight its A and B, if there is one."""
    return next((variant for variant in choice.rule.variants if variant.start), None)


def _kernel(leaf: Leaf, path: str, choice: Adaptation) -> KernelFacts:
    dtype = np.dtype(choice.rule.dtype)
    variant = _starting(choice)
    settings = choice.rule.settings_of(variant) if variant else {}
    return KernelFacts(path, tuple(leaf.shape), choice.roles, choice.ranks, dtype, settings)


def node_of(leaf: Leaf, path: str, choice: Decision, key: jax.Array, starts: Starts) -> Node:
    """Returns the node for a leaf; its arrays are `jax.ShapeDtypeStruct`\\ s where the leaf's are.

    Args:
      leaf: an array, or a `lora_jax.core.base.Base`.
      path: path of the leaf; each of its draws depends on it.
      choice: the decision of `lora_jax.select.resolve.resolve` for the leaf.
      key: a PRNG key.
      starts: see `starts_of`.
    """
    make: Callable[..., Node] = _trained if isinstance(choice, FullTraining) else _adapted
    if is_abstract(leaf):
        key = jax.random.key(0)
        node = jax.eval_shape(lambda leaf: make(leaf, path, choice, key, starts), leaf)
        return node if isinstance(node, Trained) else node.replace(base=leaf)
    return make(leaf, path, choice, key, starts)


def _trained(leaf: Leaf, path: str, choice: FullTraining, *_: object) -> Node:
    """Returns the node with a copy of what trains, so that donating it spares the leaf."""
    array = as_array(leaf)
    if choice.rows is None:
        return Trained(jnp.array(array, copy=True))
    value = jnp.take(array, np.asarray(choice.rows), axis=0).astype(wide(leaf.dtype))
    return TrainedRows(leaf, value, rows=choice.rows, is_table=choice.is_table)


def _adapted(leaf: Leaf, path: str, choice: Adaptation, key: jax.Array, starts: Starts) -> Node:
    rule, scales = choice.rule, np.asarray(choice.scales, np.float32)
    if rule.invocation is not None and leaf_name(path) in EMBEDDING_NAMES:
        raise ValueError(
            f"{path!r} is looked up by token, and an activated LoRA is for weights that multiply "
            "activations: exclude it in the rule with the invocation"
        )
    a_shape, b_shape, scale_shape = factor_shapes(leaf.shape, choice.roles, max(choice.ranks))
    n_batch = len(scale_shape)
    scales = scales.reshape(-1, *[1] * (n_batch - 1)) if n_batch else scales[0]
    scale = jax.device_put(np.broadcast_to(scales, scale_shape))  # asarray would compile
    arrays: dict[str, Leaf] = {"scale": scale}
    if variant := _starting(choice):
        arrays |= starts[variant](leaf, _kernel(leaf, path, choice))
    else:
        a, b = _draw(leaf, path, choice, scale, key)
        a, b = jnp.moveaxis(a, -1, n_batch).reshape(a_shape), b.reshape(b_shape)
        arrays |= {"a": a, "b": b}
    if takes_from_base(rule.init):
        # Copies, so that a donated factor leaves the one that training started from.
        copies = {"a": jnp.array(a, copy=True), "b": jnp.array(b, copy=True)}
        arrays |= {"start_a": a, "start_b": b, **copies}
    node = LoraWeight(
        leaf, arrays, choice.roles, choice.ranks, rule.dropout, rule.parts, rule.frozen, rule.uses
    )
    node = node.replace(invocation=rule.invocation)
    key = fold_in_path(key, path)

    def first(extra: Part) -> jax.Array:
        given = (fold_in_path(key, extra.name),) if extra.is_drawn else ()
        return extra.init(node, *given).astype(rule.dtype)

    return node.replace(**{extra.name: first(extra) for extra in rule.parts})


def _draw(leaf: Leaf, path: str, choice: Adaptation, scale: jax.Array, key: jax.Array) -> Factors:
    """Returns A [batch…, in, r] and B [batch…, r, out].

    Where ranks differ, the factors are drawn layer by layer and filled up with zeros, which
    training leaves as they are.
    """
    roles, rule, ranks = choice.roles, choice.rule, choice.ranks
    batch = roles.sizes(leaf.shape, "batch")
    fan_in, fan_out = (math.prod(roles.sizes(leaf.shape, label)) for label in ("in", "out"))
    key, dtype, kernel = fold_in_path(key, path), np.dtype(rule.dtype), None
    if takes_from_base(rule.init):
        kernel = matrices_of(leaf, roles)

    def drawn(key: jax.Array, rank: int, *layer: int) -> Factors:
        size = FactorShape(batch[len(layer) :], fan_in, fan_out, rank)
        more = {} if kernel is None else {"kernel": kernel[layer], "scale": scale[layer]}
        a, b = rule.init(key, size, dtype, **more)
        if a.shape != size.a or b.shape != size.b:
            raise ValueError(
                f"the initialiser {rule.init!r} returned A of shape {a.shape} and B of shape "
                f"{b.shape}; expected {size.a} and {size.b}"
            )
        return a.astype(dtype), b.astype(dtype)

    def initialise(rank: int, *layer: int) -> Factors:
        own = jax.random.fold_in(key, *layer) if layer else key
        if rule.uses != "each":
            return drawn(own, rank, *layer)
        halves = [drawn(jax.random.fold_in(own, n), rank // 2, *layer) for n in (0, 1)]
        a, b = zip(*halves, strict=True)
        return jnp.concatenate(a, axis=-1), jnp.concatenate(b, axis=-2)

    if len(set(ranks)) == 1:
        return initialise(ranks[0])
    none = FactorShape(batch[1:], fan_in, fan_out, 0)
    empty = jnp.zeros(none.a, dtype), jnp.zeros(none.b, dtype)
    layers = [initialise(rank, i) if rank else empty for i, rank in enumerate(ranks)]
    a, b = (
        jnp.stack([filled(factor, axis, max(ranks)) for factor in factors])
        for factors, axis in zip(
            zip(*layers, strict=True), (len(batch), len(batch) - 1), strict=True
        )
    )
    return a, b
