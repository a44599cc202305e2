"""The nodes that `lorafy` puts into a parameter tree.

`LoraWeight` is an adapted kernel, `Trained` a leaf that trains in full, `TrainedRows` a leaf of
which some rows train. A node's **parts** are its arrays that train, by name. Every kind of node
returns its parts (`parts`) and takes others (`with_parts`), so that code that walks over a tree
need not know the kinds. A node **is on** where its parts are present; in the base half of a tree
(`lora_jax.split`) they are not. Flax's msgpack files refuse nodes, and say what to save instead.
"""

import dataclasses
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.aliases import restore_alias_form
from lora_jax.core.axes import AxisRoles, Label
from lora_jax.core.base import NoArray, along, as_array, is_base
from lora_jax.core.factored import Factored
from lora_jax.core.magnitude import accumulation_dtype
from lora_jax.core.parts import AXES, STATIC, Axes, Role, layout_of_axes, shape_of_axes
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.types import BaseLike, Leaf, Parts, Tree

_EMPTY_MASK: Leaf = np.zeros((0, 0), bool)  # of a call without a mask; see `wrong_rows_message`
_NOT_IN_PRODUCTS = ("start_a", "start_b", "seed", "projection")  # of `lora_jax.core.parts.AXES`
_FLAX = "flax.serialization"


class TreeNode(NoArray):
    """A node of an adapted tree: its named trained arrays, and W's shape and dtype."""

    how_to_use = (
        "is a node of an adapted tree, not an array. Call the function that uses it through "
        "lora_jax.adapt: forward = adapt(fn); forward(params, …). To get plain arrays, use "
        "lora_jax.merge(params)"
    )
    base: BaseLike
    n_frozen = 0  # the adapter's parameters that do not train; W is not among them
    is_factored = False  # whether functions run on it as W with factors, rather than on one array

    def part_names(self) -> tuple[str, ...]:
        """Returns the names of all parts, present or not."""
        return ("value",)

    def parts(self) -> Parts:
        """Returns the present parts by name; a node of the base half has none."""
        arrays = {name: getattr(self, name) for name in self.part_names()}
        return {name: array for name, array in arrays.items() if array is not None}

    def part_shape(self, name: str) -> tuple[int, ...] | None:
        """Returns the shape of a part; None if the node does not determine it."""
        return getattr(getattr(self, name), "shape", None)

    def with_parts(self, parts: Mapping[str, Leaf]) -> Self:
        """Returns the node with these parts; with none, the node of the base half."""
        return self.replace(**{name: parts.get(name) for name in self.part_names()})

    @property
    def is_on(self) -> bool:
        """True if the parts are present; a node of the base half stands for W alone."""
        return all(getattr(self, name) is not None for name in self.part_names())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W."""
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        """The number of axes of W."""
        return len(self.base.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of W."""
        dtype: jnp.dtype = self.base.dtype
        return dtype

    @property
    def n_trainable(self) -> int:
        """The number of trained parameters, without padding."""
        return sum(math.prod(part.shape) for part in self.parts().values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={getattr(self.base, 'shape', None)})"


@dataclasses.dataclass(frozen=True)
class Part:
    """A trained array of an adapted weight, which a variant of LoRA adds to A and B.

    Attributes:
      name: the name of the array in the adapter's dictionary and in its file.
      axes: the roles of its axes: "batch", then "rank", then "in" or "out".
      init: (node without the array) -> its first value, of the shape ``node.shape_of(name)``.
        Where `is_drawn`, a PRNG key is its second argument.
      apply: (weight without the part, node, the part's array) -> the weight with the part, as
        products use it. None for an array of `lora_jax.core.parts.AXES`, used as it is.
      is_drawn: whether the first value is random.
      vector: the vector over the columns of W, "gain" or "shift" (see `lora_jax.core.product`),
        that `apply` computes from the array, if that is all that the part changes. A shift is s
        times the array. A bank holds only parts with such a vector.

    See `lora_jax.variants` for an example.
    """

    name: str
    axes: tuple[Role, ...]
    init: Callable[..., jax.Array]
    apply: Callable[[Factored, "LoraWeight", jax.Array], Factored] | None = None
    is_drawn: bool = False
    vector: Literal["gain", "shift"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(eq=False, repr=False)
class LoraWeight(TreeNode):
    """A kernel W with its factors, which stands for W + s·AB or for a variant of it.

    Nothing is checked on construction: None, masks and tracers pass through.

    Attributes:
      base: W itself, the same object as in the tree before: an array, or a
        `lora_jax.core.base.Base`.
      arrays: the arrays beside W, by name, laid out as `lora_jax.core.parts` says. Each is an
        attribute of the node as well (start_a and start_b are the pair `start`), None where it is
        not here. Beside the parts of `extras` (see `lora_jax.variants`) there are:
        a: [batch…, r, in…], A, stored transposed (see `lora_jax.core.product`).
        b: [batch…, r, out…], B.
        scale: [batch…], s, fp32; a leaf, so that another alpha recompiles nothing; never trained.
        start_a, start_b: (A₀, B₀), laid out as a and b, where an initialiser takes the factors out
        of W: the weight stands for W + s·(AB − A₀B₀). Never trained.
        shared_a, shared_b: [r, in…] and [r, out…], in the place of a and b: one pair for all
        layers, and one array for all weights of a size. Never trained.
        seed: (), uint32, that a shared pair or a projection was drawn from.
        projection: [batch…, u, r, r], fixed random matrices; see `lora_jax.variants.tinylora`.
      roles: the axis roles of `base`.
      ranks: r of each layer of the first batch axis, or one r for all. A rank smaller than the
        largest is padded with zeros in both factors, which training leaves at zero.
      dropout: probability of zeroing an element of A's input.
      extras: the parts that train beside A and B.
      frozen: the names of the factors that do not train.
      uses: the uses of W that see the adapter: "all", "lookup" or "product" alone, or "each" with
        its own half of the rank.
      a_of: the weight whose A is this one's, too, and trains there, by the end of its path from
        the module on ("gate_proj/kernel", beside this module); None for an A of its own. In a whole
        tree both hold the same array. See `lora_jax.select.sharing.owner_of_a`.
      invocation: the tokens from whose last occurrence on the adapter acts; None for all tokens.
      ties: the number of the trained vector of each member of the stack: members with one number,
        also of other weights, train one vector, and hold equal values in a whole tree. -1 where
        none is trained; () where each has its own. See `lora_jax.select.ties`.
    """

    base: BaseLike
    arrays: Parts
    roles: AxisRoles = field(metadata=STATIC)
    ranks: tuple[int, ...] = field(metadata=STATIC)
    dropout: float = field(default=0.0, metadata=STATIC)
    extras: tuple[Part, ...] = field(default=(), metadata=STATIC)
    frozen: tuple[str, ...] = field(default=(), metadata=STATIC)
    uses: str = field(default="all", metadata=STATIC)
    a_of: str | None = field(default=None, metadata=STATIC)
    invocation: tuple[int, ...] | None = field(default=None, metadata=STATIC)
    ties: tuple[int, ...] = field(default=(), metadata=STATIC)

    def __getattr__(self, name: str) -> Leaf:
        """Returns an array by its name."""
        if name in AXES or any(name == extra.name for extra in self.extras):
            return self.arrays.get(name)
        raise AttributeError(f"A LoraWeight has no attribute {name!r}.")

    def replace(self, **changes: Leaf) -> Self:
        """Returns a copy with other attributes or arrays; None removes an array."""
        field_names = {field.name for field in dataclasses.fields(self)}
        new_fields: dict[str, Leaf] = {}
        new_arrays: Parts = {}
        for name, value in changes.items():
            if name in field_names:
                new_fields[name] = value
            else:
                new_arrays[name] = value
        arrays = new_fields.get("arrays", self.arrays) | new_arrays
        new_fields["arrays"] = {name: array for name, array in arrays.items() if array is not None}
        return dataclasses.replace(self, **new_fields)

    @property
    def start(self) -> tuple[jax.Array, jax.Array] | None:
        """(A₀, B₀), the initial factors, if they were computed from W; else None."""
        arrays = self.arrays
        return (arrays["start_a"], arrays["start_b"]) if "start_a" in arrays else None

    @property
    def is_compact(self) -> bool:
        """True if A and B follow from W or a seed, and only small arrays around them train."""
        return {"a", "b"} <= set(self.frozen)

    @property
    def has(self) -> tuple[str, ...]:
        """The names of the parts other than A and B."""
        return tuple(extra.name for extra in self.extras)

    def part_names(self) -> tuple[str, ...]:
        other_names = set(self.frozen)
        if self.a_of is not None:
            other_names.add("a")  # it is a part of the owner
        return tuple(name for name in ("a", "b", *self.has) if name not in other_names)

    def with_parts(self, parts: Mapping[str, Leaf]) -> Self:
        node = super().with_parts(parts)
        return node if self.a_of is None else node.replace(a=parts.get("a"))

    @property
    def n_batch(self) -> int:
        """The number of batch axes of W."""
        return self.ndim - len(self.roles.in_axes) - len(self.roles.out_axes)

    @property
    def rank(self) -> int:
        """The rank that the factors are stored with: the largest of `ranks`."""
        return max(self.ranks)

    @property
    def labels(self) -> tuple[Label, ...]:
        """The role of each axis of W."""
        return self.roles.labels(self.ndim)

    def axes_of(self, name: str) -> tuple[Role, ...]:
        """Returns the roles of an array's axes; see `lora_jax.core.parts.AXES`."""
        for extra in self.extras:
            if extra.name == name and extra.axes:
                return extra.axes
        return AXES[name]

    def layout(self, name: str) -> Axes:
        """Returns W's axis for each axis of an array; see `lora_jax.core.parts.layout_of_axes`."""
        return layout_of_axes(self.axes_of(name), self.labels)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Returns the shape of an array, padding included."""
        projection = self.arrays.get("projection")  # [batch…, u, r, r]
        u = 0 if projection is None else projection.shape[self.n_batch]
        return shape_of_axes(self.axes_of(name), self.shape, self.labels, self.rank, u)

    def part_shape(self, name: str) -> tuple[int, ...] | None:
        return self.shape_of(name) if hasattr(self.base, "shape") else None

    def _count_parameters(self, name: str) -> int:
        """Returns the number of parameters of an array, without padding."""
        # Only the axes of the rank differ between layers.
        n_rank_axes = self.axes_of(name).count("rank")
        sizes_of_layers: list[int] = [rank**n_rank_axes for rank in self.ranks if rank]
        padded_size: int = len(self.ranks) * self.rank**n_rank_axes
        return math.prod(self.shape_of(name)) // padded_size * sum(sizes_of_layers)

    @property
    def n_trainable(self) -> int:
        return sum(map(self._count_parameters, self.part_names()))

    @property
    def n_frozen(self) -> int:  # type: ignore[override]
        return sum(self._count_parameters(name) for name in self.frozen if name in self.arrays)

    @property
    def is_on(self) -> bool:
        names = self.part_names() if self.is_compact else ("a", "b")
        return all(self.arrays.get(name) is not None for name in names)

    is_factored = is_on

    def factored(self, path: str = "", key: jax.Array | None = None) -> Factored:
        """Returns the weight in the form that products take; see `lora_jax.core.product`.

        Args:
          path: path of the weight, for messages.
          key: PRNG key of dropout; without one there is no dropout.
        """
        # The order of `AXES`, so that the same weight makes the same program in every process.
        names = [name for name in AXES if name in self.arrays and name not in _NOT_IN_PRODUCTS]
        parts = {name: self.arrays[name] for name in names}
        if self.start is not None:  # AB − A₀B₀ = [A A₀][B; −B₀]
            a0, b0 = self.start
            rank_axis = self.n_batch
            parts["a"] = jnp.concatenate([self.a, a0], axis=rank_axis)
            parts["b"] = jnp.concatenate([self.b, -b0], axis=rank_axis)
        if key is not None:
            parts["key"] = key
        if self.invocation is not None and "active" not in parts:
            parts["active"] = _EMPTY_MASK
        weight = Factored(
            base=self.base,
            parts=parts,
            labels=self.labels,
            dropout=self.dropout,
            path=path,
            uses=self.uses,
        )
        # The parts of variants, such as DoRA's magnitude.
        for extra in self.extras:
            array = self.arrays.get(extra.name)
            if extra.apply and array is not None:
                weight = extra.apply(weight, self, array)
        return weight

    def as_lora(self) -> Self:
        """Returns a compact weight as plain LoRA, with A and B for each layer of a stack."""
        weight = self.factored().formed()
        a = weight.a
        lambda_d = weight.lambda_d
        if lambda_d is not None:
            a = a * jnp.expand_dims(lambda_d, range(lambda_d.ndim, a.ndim)).astype(a.dtype)
        arrays = {"a": a, "b": weight.b.astype(a.dtype), "scale": self.scale}
        return self.replace(arrays=arrays, extras=(), frozen=(), ties=())

    def where_adapted(self, array: jax.Array, otherwise: float) -> jax.Array:
        """Returns an array [batch…, …] with the value `otherwise` in layers of rank 0."""
        if all(self.ranks):
            return array
        is_adapted = np.reshape(self.ranks, (-1, *[1] * (array.ndim - 1))) > 0
        return jnp.where(is_adapted, array, otherwise)

    def merged(self) -> jax.Array:
        """Returns (W + s·AB)·diag(gain), in fp32 and rounded once to W's dtype; without a shift."""
        return self.factored().merged()

    def __repr__(self) -> str:
        shape = getattr(self.base, "shape", None)
        ranks = self.ranks[0] if len(self.ranks) == 1 else self.ranks
        return f"LoraWeight(shape={shape}, ranks={ranks}, {self.roles})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(eq=False, repr=False)
class Trained(TreeNode):
    """A leaf that trains in full. `value` is None in the base half of a tree."""

    value: Leaf

    @property
    def base(self) -> Leaf:
        """The trained value, since no copy of the earlier value is kept."""
        return self.value

    def merged(self) -> Leaf:
        """Returns the value."""
        return self.value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(eq=False, repr=False)
class TrainedRows(TreeNode):
    """A leaf of which only some rows train: tokens of a table, or layers of a stack.

    Attributes:
      base: the leaf itself, [n, …], frozen.
      value: [rows, …], the rows that train, in place of those of `base`; None in the base half.
      rows: the indices of these rows.
      is_table: True for rows of a matrix, which may be looked up or multiplied by; False for layers
        of a stack.
    """

    base: BaseLike
    value: Leaf
    rows: tuple[int, ...] = field(metadata=STATIC)
    is_table: bool = field(metadata=STATIC)

    @property
    def is_factored(self) -> bool:  # type: ignore[override]
        return self.is_on and self.is_table

    def part_shape(self, name: str) -> tuple[int, ...] | None:
        return (len(self.rows), *self.shape[1:]) if hasattr(self.base, "shape") else None

    def merged(self) -> jax.Array:
        """Returns the leaf with its trained rows, in its own dtype."""
        base = as_array(self.base)
        return base.at[np.array(self.rows)].set(self.value.astype(base.dtype))

    def factored(self, path: str = "", key: jax.Array | None = None) -> Factored:
        """Returns the table as W + AB: A selects the trained rows, and B holds their change.

        A look-up then adds a row's change to the row, and a tied head multiplies by the changes
        beside W: neither copies the table, and there is no gradient of it.
        """
        dtype = accumulation_dtype(self.dtype)
        rows = jnp.asarray(self.rows)

        def take_rows(array: jax.Array, axes: Axes) -> jax.Array:
            return jnp.take(array, rows, axis=axes.index(0))

        a = (rows[:, None] == jnp.arange(self.shape[0])).astype(dtype)  # [rows, n], one-hot
        base_rows = jax.lax.stop_gradient(as_array(along(self.base, take_rows, [0])))
        b = self.value.astype(dtype) - base_rows.astype(dtype)
        parts = {"a": a, "b": b, "scale": jnp.ones((), jnp.float32)}
        return Factored(self.base, parts, ("in", "out"), path=path)


Node = LoraWeight | Trained | TrainedRows


def is_node(leaf: Leaf) -> bool:
    """Returns True if `leaf` is a node of an adapted tree.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> lj.is_node(tree["dense"]["kernel"]), lj.is_node(tree["dense"]["bias"])
    (True, False)
    """
    return isinstance(leaf, Node)


def is_leaf(value: Leaf) -> bool:
    """Returns True if `value` is one leaf of an adapted tree: a node, or a base."""
    return isinstance(value, Node) or is_base(value)


def map_leaves(visit: Callable[[str, Leaf], Leaf], tree: Tree) -> Tree:
    """Returns a tree with ``visit(path, leaf)`` in place of each leaf; a node is one leaf."""
    leaves, treedef = leaves_of(tree)
    return restore_alias_form(tree, treedef.unflatten(visit(path, leaf) for path, leaf in leaves))


def leaves_of(tree: Tree) -> tuple[list[tuple[str, Leaf]], jax.tree_util.PyTreeDef]:
    """Returns the leaves of an adapted tree with their paths, and its treedef; nodes are leaves."""
    return flatten_with_paths(tree, is_leaf=is_leaf)


def refuse_bytes() -> None:
    """Makes ``flax.serialization.to_bytes`` of an adapted tree raise an error with a remedy.

    Flax's state dictionaries, which its Orbax checkpoints use, still hold nodes.
    """
    flax = sys.modules.get(_FLAX)
    if flax is None:  # nobody has imported it, so nobody calls it
        return
    for kind in (LoraWeight, Trained, TrainedRows):
        if not flax.is_serializable(kind):
            flax.register_serialization_state(kind, _refuse_to_bytes, lambda node, state: state)


def _refuse_to_bytes(node: Node) -> Node:
    """Replaces a node's entry in a Flax state dictionary by an error.

    Raises:
      TypeError: ``flax.serialization.to_bytes`` asks for the dictionary.
    """
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == (_FLAX, "to_bytes"):
            raise TypeError(
                "to_bytes cannot serialize an adapted tree, because its nodes are not "
                "arrays. To save the adapter with its ranks and scales, call "
                "lora_jax.save_adapter(folder, params). To save only its arrays, call "
                "to_bytes(lora_jax.split(params)[0]), and read them with from_bytes and "
                "lora_jax.join. To save a plain model, call to_bytes(lora_jax.merge(params))."
            )
    return node
