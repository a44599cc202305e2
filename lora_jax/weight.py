"""The nodes that `lorafy` puts into a parameter tree.

`LoraWeight` is an adapted kernel, `Trained` a leaf that trains in full, `TrainedRows` a leaf of
which some rows train. All of them give and take their trained arrays by name (`parts`,
`with_parts`), so that whoever walks over a tree need not know their kinds.
"""

import math
from collections.abc import Mapping
from typing import Any, NoReturn, Self

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

from lora_jax.axes import AxisRoles, Label
from lora_jax.magnitude import column_norms, wide
from lora_jax.product import Factored

_HOW_TO_USE = (
    "is a node of an adapted tree, not an array. Call the function that uses it through "
    "lora_jax.adapt: forward = adapt(fn); forward(params, …). To get plain arrays, use "
    "lora_jax.merge(params)"
)


class _Node:
    """What the nodes share: children and static fields by name, and a message on misuse."""

    __slots__ = ()
    _children: tuple[str, ...] = ()
    _static: tuple[str, ...] = ()

    def replace(self, **changes: Any) -> Self:
        """A copy with other values in some of the attributes."""
        names = (*self._children, *self._static)
        return type(self)(**{name: getattr(self, name) for name in names} | changes)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[GetAttrKey, Any]], tuple[Any, ...]]:
        children = [(GetAttrKey(name), getattr(self, name)) for name in self._children]
        return children, tuple(getattr(self, name) for name in self._static)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], children: Any) -> Self:
        names = (*cls._children, *cls._static)
        return cls(**dict(zip(names, (*children, *static), strict=True)))

    @classmethod
    def children(cls) -> tuple[str, ...]:
        """The names of the attributes that hold arrays."""
        return cls._children

    def parts(self) -> dict[str, Any]:
        """The arrays that train, by name; empty in the base half of a tree."""
        found = {name: getattr(self, name) for name in self.part_names()}
        return {name: array for name, array in found.items() if array is not None}

    def part_names(self) -> tuple[str, ...]:
        """The names of the arrays that train, whether or not this half of the tree has them."""
        raise NotImplementedError

    def with_parts(self, parts: Mapping[str, Any]) -> Self:
        """The inverse of `parts`; with an empty mapping, the node of the base half."""
        return self.replace(**{name: parts.get(name) for name in self.part_names()})

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} {_HOW_TO_USE}.")

    __jax_array__ = __array__ = __getitem__ = __iter__ = __len__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __pow__ = __neg__ = _refuse


@jax.tree_util.register_pytree_with_keys_class
class LoraWeight(_Node):
    """A kernel W with its factors: it stands for W + s·AB, or what a variant makes of it.

    Attributes:
      base: W itself, the same object as in the tree before.
      a: [batch…, r, in…], A, stored transposed (see `lora_jax.product`); None in the base half.
      b: [batch…, r, out…], B; None in the base half.
      scale: [batch…], s, fp32; a leaf, so that another alpha recompiles nothing; never trained.
      magnitude: [batch…, out…], m of DoRA, which stands for (W + s·AB)·diag(m / ‖W + s·AB‖).
      bias: [batch…, out…], c, a bias on B: the product is xW + s·((xA)B + c).
      start: (A₀, B₀), laid out as a and b, where an initialiser takes the factors out of W: the
        weight stands for W + s·(AB − A₀B₀). Never trained.
      roles: the axis roles of `base`.
      ranks: r of each layer of the first batch axis, or one r for all. A rank smaller than the
        largest is padded with zeros in both factors, which training leaves at zero.
      dropout: probability of zeroing an element of A's input.
      frozen: names of those of a, b, magnitude and bias that do not train.
      uses: where the adapter is seen: in "all" uses of W, or in a "lookup" or a "product" only.

    Nothing is checked on construction: None, masks and tracers pass through.
    """

    _children = ("base", "a", "b", "scale", "magnitude", "bias", "start")
    _static = ("roles", "ranks", "dropout", "frozen", "uses", "has")
    __slots__ = _children + _static

    def __init__(
        self,
        base: Any,
        a: Any,
        b: Any,
        scale: Any,
        magnitude: Any = None,
        bias: Any = None,
        start: Any = None,
        *,
        roles: AxisRoles,
        ranks: tuple[int, ...],
        dropout: float = 0.0,
        frozen: tuple[str, ...] = (),
        uses: str = "all",
        has: tuple[str, ...] | None = None,
    ) -> None:
        self.base = base
        self.a = a
        self.b = b
        self.scale = scale
        self.magnitude = magnitude
        self.bias = bias
        self.start = start
        self.roles = roles
        self.ranks = ranks
        self.dropout = dropout
        self.frozen = frozen
        self.uses = uses
        # Which of the optional arrays there are, so that the base half knows what it lacks.
        extras = {"magnitude": magnitude, "bias": bias}
        self.has = tuple(n for n, v in extras.items() if v is not None) if has is None else has

    def part_names(self) -> tuple[str, ...]:
        return tuple(name for name in ("a", "b", *self.has) if name not in self.frozen)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W."""
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        """The number of axes of W."""
        return len(self.base.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of W."""
        return self.base.dtype

    @property
    def n_batch(self) -> int:
        """The number of batch axes of W."""
        return self.ndim - len(self.roles.in_axes) - len(self.roles.out_axes)

    @property
    def rank(self) -> int:
        """The rank that the factors are stored with: the largest of `ranks`."""
        return max(self.ranks)

    def _counts(self) -> dict[str, int]:
        """The number of parameters of each array of the adapter, padding not counted."""
        batch = self.roles.sizes(self.shape, "batch")
        fan_in, fan_out = (math.prod(self.roles.sizes(self.shape, label)) for label in _SIDES)
        copies = math.prod(batch)
        if len(self.ranks) > 1:
            copies //= batch[0]
        rank, layers = sum(self.ranks), sum(r > 0 for r in self.ranks)
        each = {"a": rank * fan_in, "b": rank * fan_out}
        each |= dict.fromkeys(("magnitude", "bias"), layers * fan_out)
        return {name: copies * each[name] for name in ("a", "b", *self.has)}

    @property
    def n_trainable(self) -> int:
        """The number of trained parameters, padding not counted."""
        return sum(self._counts()[name] for name in self.part_names())

    @property
    def n_frozen(self) -> int:
        """The number of the adapter's parameters that do not train; W is not among them."""
        return sum(n for name, n in self._counts().items() if name in self.frozen)

    @property
    def is_on(self) -> bool:
        """Whether the factors are here: False in the base half, which stands for W alone."""
        return self.a is not None and self.b is not None

    def factored(self, path: str = "", key: Any = None) -> Factored:
        """The weight as what the products work on; see `lora_jax.product`."""
        labels = self.roles.labels(self.ndim)
        n, a, b = self.n_batch, self.a, self.b
        if self.start is not None:
            a0, b0 = self.start
            a, b = jnp.concatenate([a, a0], axis=n), jnp.concatenate([b, -b0], axis=n)
        gain = shift = None
        if self.magnitude is not None:
            norms = jax.lax.stop_gradient(column_norms(self.base, a, b, self.scale, labels))
            gain = self._where_adapted(self.magnitude / norms, 1)
            gain = jnp.expand_dims(gain, n)
        if self.bias is not None:
            s = jnp.expand_dims(self.scale, range(n, self.bias.ndim)).astype(self.bias.dtype)
            shift = jnp.expand_dims(s * self.bias, n)
        return Factored(
            self.base, a, b, self.scale, key, labels, self.dropout, path, gain, shift, self.uses
        )

    def _where_adapted(self, array: jax.Array, otherwise: float) -> jax.Array:
        """The array, but for the layers of rank 0."""
        if all(self.ranks):
            return array
        on = jnp.asarray([rank > 0 for rank in self.ranks])
        on = on.reshape(-1, *[1] * (array.ndim - 1))
        return jnp.where(on, array, jnp.asarray(otherwise, array.dtype))

    def merged(self) -> jax.Array:
        """W + s·AB (DoRA's rescaled), summed in fp32 and rounded once to W's dtype.

        A bias on B is no part of it.
        """
        return self.factored().merged()

    def __repr__(self) -> str:
        shape = getattr(self.base, "shape", None)
        ranks = self.ranks[0] if len(self.ranks) == 1 else self.ranks
        return f"LoraWeight(shape={shape}, ranks={ranks}, {self.roles})"


_SIDES: tuple[Label, Label] = ("in", "out")


@jax.tree_util.register_pytree_with_keys_class
class Trained(_Node):
    """A leaf that trains in full. `value` is None in the base half of a tree."""

    _children = ("value",)
    __slots__ = _children

    def __init__(self, value: Any) -> None:
        self.value = value

    def part_names(self) -> tuple[str, ...]:
        return ("value",)

    @property
    def base(self) -> Any:
        """The value: no copy of the earlier one is kept."""
        return self.value

    @property
    def is_on(self) -> bool:
        """Whether the value is here: False in the base half."""
        return self.value is not None

    @property
    def n_trainable(self) -> int:
        """The number of trained parameters."""
        return math.prod(self.shape)

    def merged(self) -> Any:
        """The value."""
        return self.value

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the leaf."""
        return self.value.dtype

    def __repr__(self) -> str:
        return f"Trained(shape={getattr(self.value, 'shape', None)})"


@jax.tree_util.register_pytree_with_keys_class
class TrainedRows(_Node):
    """A leaf of which some rows along the first axis train: tokens of a table, layers of a stack.

    Attributes:
      base: the leaf itself, [n, …], frozen.
      value: [rows, …], what stands in the place of those rows; None in the base half.
      rows: their indices.
      is_table: whether they are rows of a matrix, which may be looked up or multiplied by, or
        layers of a stack.
    """

    _children = ("base", "value")
    _static = ("rows", "is_table")
    __slots__ = _children + _static

    def __init__(self, base: Any, value: Any, *, rows: tuple[int, ...], is_table: bool) -> None:
        self.base = base
        self.value = value
        self.rows = rows
        self.is_table = is_table

    def part_names(self) -> tuple[str, ...]:
        return ("value",)

    @property
    def is_on(self) -> bool:
        """Whether the trained rows are here: False in the base half."""
        return self.value is not None

    n_frozen = 0

    @property
    def n_trainable(self) -> int:
        """The number of trained parameters."""
        return len(self.rows) * math.prod(self.shape[1:])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the leaf."""
        return self.base.dtype

    def merged(self) -> jax.Array:
        """The leaf with its trained rows, in its own dtype."""
        return self.base.at[jnp.asarray(self.rows)].set(self.value.astype(self.base.dtype))

    def factored(self, path: str = "", key: Any = None) -> Factored:
        """The table as W + AB, where each column of A picks one row, and B holds their changes.

        So a look-up adds a row's change to it, and a tied head multiplies by nothing but the
        changes: neither copies the table, and there is no gradient of it.
        """
        dtype = wide(self.base.dtype)
        rows = jnp.asarray(self.rows)
        a = (rows[:, None] == jnp.arange(self.base.shape[0])).astype(dtype)
        b = self.value.astype(dtype) - jax.lax.stop_gradient(self.base[rows]).astype(dtype)
        one = jnp.ones((), jnp.float32)
        return Factored(self.base, a, b, one, None, ("in", "out"), 0.0, path)

    def __repr__(self) -> str:
        return f"TrainedRows(shape={getattr(self.base, 'shape', None)}, rows={self.rows})"


Node = LoraWeight | Trained | TrainedRows


def is_node(leaf: Any) -> bool:
    """Whether `leaf` is a node of an adapted tree: the `is_leaf` of all walks over one."""
    return isinstance(leaf, Node)
