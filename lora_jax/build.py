"""The node that the rules make of one leaf: its factors drawn, its variant's arrays added."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.axes import AxisRoles
from lora_jax.init import Factors, FactorShape, takes_from_base
from lora_jax.magnitude import column_norms, wide
from lora_jax.paths import fold_in_path
from lora_jax.product import factor_shapes, stored
from lora_jax.resolve import Adapted, Choice, InFull
from lora_jax.weight import LoraWeight, Node, Trained, TrainedRows


def node_of(leaf: Any, path: str, choice: Choice, key: jax.Array) -> Node:
    """The node for a leaf; of `jax.ShapeDtypeStruct`\\ s where the leaf is one."""
    make = _trained if isinstance(choice, InFull) else _adapted
    if isinstance(leaf, jax.ShapeDtypeStruct):
        node = jax.eval_shape(lambda leaf: make(leaf, path, choice, jax.random.key(0)), leaf)
        return node.replace(base=leaf) if isinstance(node, LoraWeight | TrainedRows) else node
    return make(leaf, path, choice, key)


def _trained(leaf: Any, path: str, choice: Any, key: jax.Array) -> Node:
    """A copy of what trains, so that donating it spares the leaf."""
    if choice.rows is None:
        return Trained(jnp.array(leaf, copy=True))
    value = leaf[jnp.asarray(choice.rows)].astype(wide(leaf.dtype))
    return TrainedRows(leaf, value, rows=choice.rows, is_table=choice.is_table)


def _adapted(leaf: Any, path: str, choice: Any, key: jax.Array) -> Node:
    rule, roles, n = choice.rule, choice.roles, leaf.ndim
    a_shape, b_shape, scale_shape = factor_shapes(tuple(leaf.shape), roles, max(choice.ranks))
    scales = np.asarray(choice.scales, np.float32)
    scales = scales.reshape(-1, *[1] * (len(scale_shape) - 1)) if scale_shape else scales[0]
    scale = jnp.asarray(np.broadcast_to(scales, scale_shape))
    a, b = stored(*_draw(leaf, path, choice, scale, key), len(scale_shape))
    a, b = a.reshape(a_shape), b.reshape(b_shape)
    vector = (*scale_shape, *roles.sizes(leaf.shape, "out"))
    dtype = jnp.dtype(rule.dtype)
    start = (a, b) if takes_from_base(rule.init) else None
    magnitude = None
    if (
        rule.dora
    ):  # ‖W‖, or that of W + s·AB where the factors start elsewhere and are not taken out
        seen = a if start is None else jnp.zeros_like(a)
        magnitude = column_norms(leaf, seen, b, scale, roles.labels(n)).astype(dtype)
    return LoraWeight(
        leaf,
        # Copies, so that a donated factor leaves the one that training started from.
        a if start is None else jnp.array(a, copy=True),
        b if start is None else jnp.array(b, copy=True),
        scale,
        magnitude,
        jnp.zeros(vector, dtype) if rule.bias_on_b else None,
        start,
        roles=roles,
        ranks=choice.ranks,
        dropout=rule.dropout,
        frozen=("a",) if rule.freeze_a else (),
        uses=rule.uses,
    )


def _draw(leaf: Any, path: str, choice: Adapted, scale: jax.Array, key: jax.Array) -> Factors:
    """A [batch…, in, r] and B [batch…, r, out]: where the layers' ranks differ, layer by layer."""
    roles, rule, shape = choice.roles, choice.rule, tuple(leaf.shape)
    batch = roles.sizes(shape, "batch")
    fan_in, fan_out = (math.prod(roles.sizes(shape, label)) for label in ("in", "out"))
    rank, dtype = max(choice.ranks), np.dtype(rule.dtype)
    key = fold_in_path(key, path)
    kernel = _as_matrices(leaf, roles) if takes_from_base(rule.init) else None

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
    """W as [batch…, in, out], in fp32 or wider."""
    labels = roles.labels(leaf.ndim)
    order = [
        axis for role in ("batch", "in", "out") for axis in range(leaf.ndim) if labels[axis] == role
    ]
    sizes = [math.prod(roles.sizes(leaf.shape, role)) for role in ("in", "out")]
    matrices = jnp.transpose(leaf, order).reshape(*roles.sizes(leaf.shape, "batch"), *sizes)
    return matrices.astype(wide(leaf.dtype))


def _padded(factors: Factors | None, shape: FactorShape, dtype: Any) -> Factors:
    """Factors with zeros up to the rank of `shape`, which is where training leaves them."""
    if factors is None:
        return jnp.zeros(shape.a, dtype), jnp.zeros(shape.b, dtype)
    a, b = factors
    missing = shape.rank - a.shape[-1]
    none = [(0, 0)] * len(shape.batch)
    return jnp.pad(a, [*none, (0, 0), (0, missing)]), jnp.pad(b, [*none, (0, missing), (0, 0)])
