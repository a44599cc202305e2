"""The node that the rules make of one leaf: its factors drawn, its variant's arrays added."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.axes import AxisRoles
from lora_jax.base import as_array, is_abstract
from lora_jax.factored import factor_shapes
from lora_jax.init import Factors, FactorShape, takes_from_base
from lora_jax.magnitude import wide
from lora_jax.paths import fold_in_path
from lora_jax.resolve import Adapted, Choice, InFull
from lora_jax.weight import LoraWeight, Node, Trained, TrainedRows


def node_of(leaf: Any, path: str, choice: Choice, key: jax.Array) -> Node:
    """Returns the node for a leaf; of `jax.ShapeDtypeStruct`\\ s where the leaf is of those."""
    make: Any = _trained if isinstance(choice, InFull) else _adapted
    if is_abstract(leaf):
        node = jax.eval_shape(lambda leaf: make(leaf, path, choice, jax.random.key(0)), leaf)
        return node if isinstance(node, Trained) else node.replace(base=leaf)
    return make(leaf, path, choice, key)


def _trained(leaf: Any, path: str, choice: InFull, key: jax.Array) -> Node:
    """Returns a copy of what trains, so that donating it spares the leaf."""
    array = as_array(leaf)
    if choice.rows is None:
        return Trained(jnp.array(array, copy=True))
    value = array[jnp.asarray(choice.rows)].astype(wide(leaf.dtype))
    return TrainedRows(leaf, value, rows=choice.rows, is_table=choice.is_table)


def _adapted(leaf: Any, path: str, choice: Adapted, key: jax.Array) -> Node:
    rule, n_batch = choice.rule, len(choice.roles.sizes(leaf.shape, "batch"))
    a_shape, b_shape, scale_shape = factor_shapes(leaf.shape, choice.roles, max(choice.ranks))
    scales = np.asarray(choice.scales, np.float32)
    scales = scales.reshape(-1, *[1] * (n_batch - 1)) if n_batch else scales[0]
    scale = jnp.asarray(np.broadcast_to(scales, scale_shape))
    a, b = _draw(leaf, path, choice, scale, key)
    a, b = jnp.moveaxis(a, -1, n_batch).reshape(a_shape), b.reshape(b_shape)
    arrays = {"a": a, "b": b, "scale": scale}
    if takes_from_base(rule.init):
        # Copies, so that a donated factor leaves the one that training started from.
        arrays |= {"start_a": a, "a": jnp.array(a, copy=True)}
        arrays |= {"start_b": b, "b": jnp.array(b, copy=True)}
    node = LoraWeight(
        leaf,
        arrays,
        roles=choice.roles,
        ranks=choice.ranks,
        dropout=rule.dropout,
        extras=rule.parts,
        frozen=("a",) if rule.freeze_a else (),
        uses=rule.uses,
    )
    first = {extra.name: extra.init(node).astype(rule.dtype) for extra in rule.parts}
    return node.replace(**first)


def _draw(leaf: Any, path: str, choice: Adapted, scale: jax.Array, key: jax.Array) -> Factors:
    """Returns A [batch…, in, r] and B [batch…, r, out], drawn layer by layer if ranks differ."""
    roles, rule, shape = choice.roles, choice.rule, tuple(leaf.shape)
    batch = roles.sizes(shape, "batch")
    fan_in, fan_out = (math.prod(roles.sizes(shape, label)) for label in ("in", "out"))
    rank, dtype = max(choice.ranks), np.dtype(rule.dtype)
    key = fold_in_path(key, path)
    kernel = _as_matrices(as_array(leaf), roles) if takes_from_base(rule.init) else None

    def initialise(key: jax.Array, size: FactorShape, *layer: int) -> Factors:
        more = {} if kernel is None else {"kernel": kernel[layer], "scale": scale[layer]}
        a, b = rule.init(key, size, dtype, **more)
        if a.shape != size.a or b.shape != size.b:
            raise ValueError(
                f"the initialiser {rule.init!r} returned A of shape {a.shape} and B of shape "
                f"{b.shape}; expected {size.a} and {size.b}"
            )
        return a.astype(dtype), b.astype(dtype)

    if len(set(choice.ranks)) == 1:
        return initialise(key, FactorShape(batch, fan_in, fan_out, rank))
    whole = FactorShape(batch[1:], fan_in, fan_out, rank)
    layers = []
    for layer, r in enumerate(choice.ranks):
        size = FactorShape(batch[1:], fan_in, fan_out, r)
        drawn = initialise(jax.random.fold_in(key, layer), size, layer) if r else None
        layers.append(_padded(drawn, whole, dtype))
    a, b = (jnp.stack(factors) for factors in zip(*layers, strict=True))
    return a, b


def _as_matrices(leaf: Any, roles: AxisRoles) -> jax.Array:
    """Returns W as [batch…, in, out], in fp32 or wider."""
    labels = roles.labels(leaf.ndim)
    order = [
        axis for role in ("batch", "in", "out") for axis in range(leaf.ndim) if labels[axis] == role
    ]
    sizes = [math.prod(roles.sizes(leaf.shape, role)) for role in ("in", "out")]
    matrices = jnp.transpose(leaf, order).reshape(*roles.sizes(leaf.shape, "batch"), *sizes)
    return matrices.astype(wide(leaf.dtype))


def _padded(factors: Factors | None, shape: FactorShape, dtype: Any) -> Factors:
    """Returns factors with zeros up to the rank of `shape`, which is where training leaves them."""
    if factors is None:
        return jnp.zeros(shape.a, dtype), jnp.zeros(shape.b, dtype)
    a, b = factors
    missing = shape.rank - a.shape[-1]
    none = [(0, 0)] * len(shape.batch)
    return jnp.pad(a, [*none, (0, 0), (0, missing)]), jnp.pad(b, [*none, (0, missing), (0, 0)])
