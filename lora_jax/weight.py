"""The nodes that `lorafy` puts into a parameter tree: an adapted weight, a leaf that trains."""

import math
from typing import Any, NoReturn

import jax
from jax.tree_util import GetAttrKey

from lora_jax.axes import AxisRoles
from lora_jax.product import Factored

_HOW_TO_USE = (
    "is a node of an adapted tree, not an array. Call the function that uses it through "
    "lora_jax.adapt: forward = adapt(fn); forward(params, …). To get plain arrays, use "
    "lora_jax.merge(params)"
)


class _Node:
    """What both nodes share: the message that an operation on one raises."""

    __slots__ = ()

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} {_HOW_TO_USE}.")

    __jax_array__ = __array__ = __getitem__ = __iter__ = __len__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __pow__ = __neg__ = _refuse


@jax.tree_util.register_pytree_with_keys_class
class LoraWeight(_Node):
    """A kernel W with its factors: it stands for W + s·AB.

    Attributes:
      base: W itself, the same object as in the tree before.
      a: [batch…, r, in…], A, stored transposed (see `lora_jax.product`); None in the base half.
      b: [batch…, r, out…], B; None in the base half.
      scale: [batch…], s, fp32; a leaf, so that another alpha recompiles nothing; never trained.
      roles: the axis roles of `base`.
      ranks: r of each layer of the first batch axis, or one r for all. A rank smaller than the
        largest is padded with zeros in both factors, which training leaves at zero.
      dropout: probability of zeroing an element of A's input.

    Nothing is checked on construction: None, masks and tracers pass through.
    """

    __slots__ = ("base", "a", "b", "scale", "roles", "ranks", "dropout")

    def __init__(
        self,
        base: Any,
        a: Any,
        b: Any,
        scale: Any,
        *,
        roles: AxisRoles,
        ranks: tuple[int, ...],
        dropout: float = 0.0,
    ) -> None:
        self.base = base
        self.a = a
        self.b = b
        self.scale = scale
        self.roles = roles
        self.ranks = ranks
        self.dropout = dropout

    def replace(self, **changes: Any) -> "LoraWeight":
        """A copy with other values in some of the attributes."""
        return LoraWeight(**{name: getattr(self, name) for name in self.__slots__} | changes)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[GetAttrKey, Any]], tuple[Any, ...]]:
        children = [(GetAttrKey(name), getattr(self, name)) for name in self.__slots__[:4]]
        return children, (self.roles, self.ranks, self.dropout)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], children: Any) -> "LoraWeight":
        roles, ranks, dropout = static
        return cls(*children, roles=roles, ranks=ranks, dropout=dropout)

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

    @property
    def n_trainable(self) -> int:
        """The number of trained parameters, padding not counted."""
        batch = self.roles.sizes(self.shape, "batch")
        fan = math.prod(self.roles.sizes(self.shape, "in"))
        fan += math.prod(self.roles.sizes(self.shape, "out"))
        copies = math.prod(batch)
        if len(self.ranks) > 1:
            copies //= batch[0]
        return sum(self.ranks) * fan * copies

    def factored(self, path: str = "", key: Any = None) -> Factored:
        """The weight as what the products work on; see `lora_jax.product`."""
        labels = self.roles.labels(self.ndim)
        return Factored(self.base, self.a, self.b, self.scale, key, labels, self.dropout, path)

    def merged(self) -> jax.Array:
        """W + s·AB, summed in fp32 and rounded once to W's dtype."""
        return self.factored().merged()

    def __repr__(self) -> str:
        shape = getattr(self.base, "shape", None)
        ranks = self.ranks[0] if len(self.ranks) == 1 else self.ranks
        return f"LoraWeight(shape={shape}, ranks={ranks}, {self.roles})"


@jax.tree_util.register_pytree_with_keys_class
class Trained(_Node):
    """A leaf that trains in full. `value` is None in the base half of a tree."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def tree_flatten_with_keys(self) -> tuple[list[tuple[GetAttrKey, Any]], None]:
        return [(GetAttrKey("array"), self.value)], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Trained":
        return cls(*children)

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


Node = LoraWeight | Trained


def is_node(leaf: Any) -> bool:
    """Whether `leaf` is a node of an adapted tree: the `is_leaf` of all walks over one."""
    return isinstance(leaf, Node)
