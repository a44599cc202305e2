"""The product of an activation with an adapted weight: xW + s·(xA)B, and its mirror image.

This file knows how factors are stored, and why. For a weight with batch, in and out axes:

    a      [batch…, r, in…]     A, transposed: xA and its gradient then read the long axis in order
    b      [batch…, r, out…]    B
    scale  [batch…]             s, fp32

and where a variant asks for them, vectors over the columns, laid out as a B of rank one:

    gain   [batch…, 1, out…]    g: each column of W + s·AB is multiplied by it (DoRA)
    shift  [batch…, 1, out…]    added to the product xW (a bias on B)

Measured on the layers of SmolLM2-135M (tests/benchmarks/product_layouts.py, two CPU cores, forward
and backward to A and B): this order is the fastest of the four, and the order of the operands
below is what keeps the backward pass from copying whole activations into another layout before
each skinny product: z = xA, which is small, is flattened to two dimensions, so that the
derivative of B contracts one axis rather than several; x itself keeps its shape, and its
residual is shared by all products that read it. (On a mesh that is set, z keeps its shape: its
axes may lie apart.) Everything is plain `dot_general`, so
forward mode, reverse mode and their compositions work as JAX derives them.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.axes import AxisRoles, Label
from lora_jax.magnitude import rescaled, wide


@dataclasses.dataclass(frozen=True, eq=False)
class _ForMessages:
    """A path, equal to every other: layers that share a jitted function share its compilation."""

    path: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ForMessages)

    def __hash__(self) -> int:
        return 0


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Factored:
    """(W + s·AB)·diag(g), unformed. The axes of `base` come in any order, in the roles of `labels`.

    `a` holds the batch axes in the base's order, then r, then the in axes; `b` the batch axes, r,
    the out axes; `scale` the batch axes. `key`, [batch…] typed PRNG keys, turns dropout on.
    """

    base: Any
    a: Any
    b: Any
    scale: Any
    key: Any
    labels: tuple[Label, ...]
    dropout: float
    path: str
    gain: Any = None
    shift: Any = None
    uses: str = "all"  # or "lookup", "product": where a tied table is adapted; see `LoraRule`

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children = (self.base, self.a, self.b, self.scale, self.key, self.gain, self.shift)
        return children, (self.labels, self.dropout, _ForMessages(self.path), self.uses)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], children: tuple[Any, ...]) -> "Factored":
        labels, dropout, name, uses = static
        base, a, b, scale, key, gain, shift = children
        return cls(base, a, b, scale, key, labels, dropout, name.path, gain, shift, uses)

    def columns(self) -> dict[str, Any]:
        """What is laid out as B is, by name: B itself, and the gain and the shift if there are."""
        found = {name: getattr(self, name) for name in ("b", "gain", "shift")}
        return {name: array for name, array in found.items() if array is not None}

    def axes(self, label: Label) -> tuple[int, ...]:
        """The base's axes with this role, in order."""
        return tuple(axis for axis, role in enumerate(self.labels) if role == label)

    def sizes(self, label: Label) -> tuple[int, ...]:
        """The sizes of the base's axes with this role."""
        return tuple(self.base.shape[axis] for axis in self.axes(label))

    def merged(self) -> jax.Array:
        """(W + s·AB)·diag(g) as one array: in fp32 (or wider), rounded once to W's dtype."""
        dtype = wide(self.base.dtype)
        total = self.base.astype(dtype) + self.delta(dtype)
        if self.gain is not None:
            total *= self.of_columns(self.gain).astype(dtype)
        return total.astype(self.base.dtype)

    def of_columns(self, vector: jax.Array) -> jax.Array:
        """A gain or a shift in the base's layout, with axes of size one where the in axes are."""
        n = len(self.axes("batch"))
        order = self.axes("batch") + self.axes("out")
        vector = lax.squeeze(vector, (n,))
        vector = lax.transpose(vector, [order.index(axis) for axis in sorted(order)])
        return lax.expand_dims(vector, self.axes("in"))

    def delta(self, dtype: Any) -> jax.Array:
        """s·AB in the base's layout."""
        n = len(self.axes("batch"))
        batch = tuple(range(n))
        scale = lax.expand_dims(self.scale.astype(dtype), range(n, self.a.ndim))
        a = self.a.astype(dtype) * scale
        ab = lax.dot_general(
            a,
            self.b.astype(dtype),
            (((n,), (n,)), (batch, batch)),
            precision=lax.Precision.HIGHEST,
        )  # [batch…, in…, out…]
        order = self.axes("batch") + self.axes("in") + self.axes("out")
        return lax.transpose(ab, tuple(order.index(axis) for axis in range(len(order))))


def canonical(a: Any, b: Any, n_batch: int) -> tuple[Any, Any]:
    """Stored factors in the order of the algebra: A [batch…, in…, r], B [batch…, r, out…]."""
    return jnp.moveaxis(a, n_batch, -1), b


def stored(a: Any, b: Any, n_batch: int) -> tuple[Any, Any]:
    """The inverse of `canonical`."""
    return jnp.moveaxis(a, -1, n_batch), b


def factor_shapes(
    shape: tuple[int, ...], roles: AxisRoles, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The stored shapes of a, b and scale for a weight of this shape."""
    batch = roles.sizes(shape, "batch")
    a = (*batch, rank, *roles.sizes(shape, "in"))
    b = (*batch, rank, *roles.sizes(shape, "out"))
    return a, b, batch


def dot(
    x: jax.Array,
    weight: Factored,
    *,
    for_factors: jax.Array | None = None,
    contract: tuple[tuple[int, ...], tuple[int, ...]],
    batch: tuple[tuple[int, ...], tuple[int, ...]],
    weight_first: bool = False,
    **params: Any,
) -> jax.Array:
    """`lax.dot_general` of x with an adapted weight, in either order, in factored form.

    Args:
      x: any array.
      weight: contracted over all its in axes (the product xW), or over all its out axes (the
        mirror image: a tied head, a transposed use). Its batch axes may be batched or free.
      for_factors: x again, as A is to read it; x itself by default.
      contract, batch: axes of x and of the weight, as in `lax.dot_general`.
      weight_first: whether the weight is the left operand, so that its axes lead the result.
      params: `precision`, `preferred_element_type` and `out_sharding` of `lax.dot_general`.

    xA accumulates in fp32 and is scaled there; A and B are cast to x's dtype.
    """
    forward = set(contract[1]) == set(weight.axes("in"))
    if weight.gain is not None and not forward:
        x = for_factors = x * _of_contracted(weight, x, contract, batch)
        weight = dataclasses.replace(weight, gain=None)

    again = x if for_factors is None else for_factors

    def taken(
        x: jax.Array, again: jax.Array, weight: Factored, seen: jax.Array | None = None
    ) -> jax.Array:
        """x(W + s·AB); xW is taken from `seen` where that is given."""
        if seen is None:
            seen = _base_product(x, weight, contract, batch, weight_first, params)
        delta = _delta(again, weight, contract, batch, weight_first, seen.dtype, params)
        return seen + lax.reshape(delta, seen.shape)

    place = functools.partial(_of_result, weight, batch[1], x.ndim, contract, weight_first)

    def columns_rescaled(x: jax.Array, again: jax.Array, weight: Factored) -> jax.Array:
        return rescaled(taken(x, again, weight), place(weight.gain))

    if weight.gain is None:
        result = taken(x, again, weight)
    elif is_dropped(weight):  # PEFT's: what is dropped is the change that the adapter makes
        product = _base_product(x, weight, contract, batch, weight_first, params)
        seen = _base_product(dropped(x, weight), weight, contract, batch, weight_first, params)
        result = product - seen + rescaled(taken(x, again, weight, seen), place(weight.gain))
    elif _is_narrow(weight):
        result = jax.checkpoint(columns_rescaled)(x, again, weight)
    else:
        result = columns_rescaled(x, again, weight)
    if not forward or weight.shift is None:
        return result
    return result + place(weight.shift).astype(result.dtype)


def _is_narrow(weight: Factored) -> bool:
    """Whether a product costs less to take again than its result to keep, for the gain's gradient.

    So it is with keys and values of grouped queries, a third as wide as what they are made from.
    """
    n_in, n_out = (math.prod(weight.base.shape[a] for a in weight.axes(r)) for r in ("in", "out"))
    return 3 * n_out <= n_in


def _base_product(
    x: jax.Array,
    weight: Factored,
    contract: tuple[tuple[int, ...], tuple[int, ...]],
    batch: tuple[tuple[int, ...], tuple[int, ...]],
    weight_first: bool,
    params: dict[str, Any],
) -> jax.Array:
    """xW, or Wᵀx where the weight comes first."""
    if weight_first:
        dims = (contract[::-1], batch[::-1])
        return lax.dot_general(weight.base, x, dims, **params)
    return lax.dot_general(x, weight.base, (contract, batch), **params)


def _of_contracted(
    weight: Factored,
    x: jax.Array,
    contract: tuple[tuple[int, ...], tuple[int, ...]],
    batch: tuple[tuple[int, ...], tuple[int, ...]],
) -> jax.Array:
    """The gain in x's layout and dtype, where its axes are contracted (the mirror image)."""
    gain = weight.of_columns(weight.gain)
    place = dict(zip(contract[1] + batch[1], contract[0] + batch[0], strict=True))
    axes = [axis for axis in range(gain.ndim) if axis in place]
    gain = lax.squeeze(gain, [axis for axis in range(gain.ndim) if axis not in place])
    gain = lax.transpose(gain, [axes.index(axis) for axis in sorted(axes, key=place.__getitem__)])
    taken = {place[axis] for axis in axes}
    return lax.expand_dims(gain, [a for a in range(x.ndim) if a not in taken]).astype(x.dtype)


def _of_result(
    weight: Factored,
    w_batch: tuple[int, ...],
    x_ndim: int,
    contract: tuple[tuple[int, ...], tuple[int, ...]],
    weight_first: bool,
    vector: jax.Array,
) -> jax.Array:
    """A gain or a shift in the layout of the product xW."""
    vector = lax.squeeze(weight.of_columns(vector), contract[1])
    left = [axis for axis in range(len(weight.labels)) if axis not in contract[1]]
    free = [axis for axis in left if axis not in w_batch]
    vector = lax.transpose(vector, [left.index(axis) for axis in (*w_batch, *free)])
    n_free_x = x_ndim - len(w_batch) - len(contract[0])
    start = len(w_batch) + (len(free) if weight_first else 0)
    return lax.expand_dims(vector, range(start, start + n_free_x))


def _delta(
    x: jax.Array,
    weight: Factored,
    contract: tuple[tuple[int, ...], tuple[int, ...]],
    batch: tuple[tuple[int, ...], tuple[int, ...]],
    weight_first: bool,
    dtype: Any,
    params: dict[str, Any],
) -> jax.Array:
    """s·(xA)B, but for the shape: the axes of x that are free may be flattened to one."""
    (x_contract, w_contract), (x_batch, w_batch) = contract, batch
    forward = set(w_contract) == set(weight.axes("in"))
    near, far = (weight.a, weight.b) if forward else (weight.b, weight.a)
    near_axes, far_axes = weight.axes("in"), weight.axes("out")
    if not forward:
        near_axes, far_axes = far_axes, near_axes
    stack = weight.axes("batch")
    free_stack = tuple(axis for axis in stack if axis not in w_batch)
    x_free = [axis for axis in range(x.ndim) if axis not in (*x_contract, *x_batch)]
    rank_axis = len(stack)
    precision, sharded = params.get("precision"), is_sharded(x)

    # z = s·xA   [w_batch…, x_free…, free_stack…, r]
    z = lax.dot_general(
        dropped(x, weight),
        near.astype(x.dtype),
        (
            (x_contract, tuple(rank_axis + 1 + near_axes.index(axis) for axis in w_contract)),
            (x_batch, tuple(stack.index(axis) for axis in w_batch)),
        ),
        precision=precision,
        preferred_element_type=wide(x.dtype),
        out_sharding=_rank_sharding(x, x_batch, x_free, len(free_stack)) if sharded else None,
    )
    scale = lax.transpose(weight.scale, [stack.index(axis) for axis in (*w_batch, *free_stack)])
    scale = lax.expand_dims(
        scale.astype(z.dtype), [*range(len(w_batch), len(w_batch) + len(x_free)), z.ndim - 1]
    )
    z = (z * scale).astype(x.dtype)
    if len(x_free) > 1 and not sharded and not is_on_mesh():
        flat = math.prod(x.shape[axis] for axis in x_free)
        lead = len(w_batch)
        z = lax.reshape(z, (*z.shape[:lead], flat, *z.shape[lead + len(x_free) :]))
    n_free = z.ndim - 1 - len(w_batch) - len(free_stack)

    # zB: the rank is contracted; batch axes of the weight, wherever they stand in x, are batched
    z_batch = (*range(len(w_batch)), *range(len(w_batch) + n_free, z.ndim - 1))
    far_batch = tuple(stack.index(axis) for axis in (*w_batch, *free_stack))
    last = (z.ndim - 1,)
    how: dict[str, Any] = {"precision": precision, "preferred_element_type": dtype}
    if sharded and not free_stack:
        how["out_sharding"] = params.get("out_sharding")
    far = far.astype(x.dtype)
    if weight_first and not free_stack:
        return lax.dot_general(far, z, (((rank_axis,), last), (far_batch, z_batch)), **how)
    delta = lax.dot_general(z, far, ((last, (rank_axis,)), (z_batch, far_batch)), **how)
    if not free_stack:
        return delta
    # [w_batch…, free_stack…, x_free…, far…] -> the order of the weight's free axes in its base
    free_x: list[Any] = [("x", axis) for axis in range(n_free)]
    have = [*w_batch, *free_stack, *free_x, *far_axes]
    free_w = sorted((*free_stack, *far_axes))
    want = [*w_batch, *free_w, *free_x] if weight_first else [*w_batch, *free_x, *free_w]
    return lax.transpose(delta, [have.index(axis) for axis in want])


def dropped(x: jax.Array, weight: Factored) -> jax.Array:
    """x with dropout as A's input, where the weight carries a key."""
    if not is_dropped(weight):
        return x
    key = weight.key.reshape(-1)[0]  # the layers of a stack that x meets at once share one mask
    keep = jax.random.bernoulli(key, 1 - weight.dropout, x.shape)
    kept = x * jnp.asarray(1 / (1 - weight.dropout), x.dtype)
    return jnp.where(keep, kept, jnp.zeros_like(x))


def is_dropped(weight: Factored) -> bool:
    """Whether dropout is on."""
    return weight.key is not None and weight.dropout > 0


def is_sharded(x: jax.Array) -> bool:
    """Whether x's type says how it is sharded (a mesh with explicit axes)."""
    return any(part is not None for part in jax.typeof(x).sharding.spec)


def is_on_mesh() -> bool:
    """Whether several devices are set (`jax.set_mesh`), so that axes of x may be apart on them."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def _rank_sharding(
    x: jax.Array, x_batch: tuple[int, ...], x_free: list[int], n_stack: int
) -> jax.sharding.NamedSharding:
    """How z is sharded: as x is, and not at all over the weight's free axes and the rank."""
    sharding = jax.typeof(x).sharding
    parts = [sharding.spec[axis] for axis in (*x_batch, *x_free)]
    spec = jax.sharding.PartitionSpec(*parts, *[None] * (n_stack + 1))
    return jax.sharding.NamedSharding(sharding.mesh, spec)
