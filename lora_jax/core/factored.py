"""An adapted weight inside a traced function: `adapt` carries it in place of an array.

A weight's **parts** are the arrays beside its base, by name. A weight is **formed** where A and B
stand among its parts, and **compact** where they follow from smaller parts.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lora_jax.core.axes import AxisRoles, Label
from lora_jax.core.base import Move, as_array, is_base
from lora_jax.core.magnitude import accumulation_dtype
from lora_jax.core.parts import (
    AXES,
    EXAMPLE,
    STATIC,
    Axes,
    align_to_axes,
    layout_of_axes,
    shape_of_axes,
)
from lora_jax.core.types import BaseLike, Leaf, Parts

# Parts that A and B are computed from.
_COMPACT_PARTS = ("shared_a", "shared_b", "latent", "lambda_b")


class ExamplesError(ValueError):
    """Raised if examples with separate adapters cannot be told apart in a batch."""


class TokensError(ValueError):
    """Raised if a use does not show on which tokens a weight's adapter acts.

    The use may also have its tokens in another order than the mask.
    """


class _MessagePath(str):
    """A path, for messages only: it equals every other, so that layers share compiled code."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _MessagePath)

    def __hash__(self) -> int:
        return 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """(W + s·AB)·diag(gain) + shift, as its base and its parts.

    Attributes:
      base: W; see `lora_jax.core.base`. Its axes come in any order.
      parts: the arrays beside W by name, laid out as `lora_jax.core.parts.AXES` says: a, b, scale,
        and optionally key (typed PRNG keys, which turn dropout on), lambda_d (one more factor for
        each column of A), rows (a mask of columns for each example of a batch, so that examples
        have adapters of their own; see `lora_jax.adapt.per_example`), active (the tokens that see
        the adapter; see `lora_jax.activate`), gain and shift. Compact weights have shared_a and
        shared_b in place of a and b, latent (AB is then A·latent·B) or lambda_b (a factor for each
        column of B); `formed` computes a and b from these. Without parts, the weight is W alone.
      labels: the role of each axis of `base`.
      dropout: probability of zeroing an element of A's input.
      path: path of the weight, for messages.
      uses: the uses that see the adapter: "all"; of a tied table also "lookup", "product", or
        "each": look-ups see the first half of the rank, products the second.
      split: inside a `jax.shard_map`, the axes of the mesh along which the in axes of a weight with
        a shift are split. A product with a piece of the weight must not add the shift.
    """

    base: BaseLike
    parts: Parts
    labels: tuple[Label, ...] = field(metadata=STATIC)
    dropout: float = field(default=0.0, metadata=STATIC)
    path: str = field(default="", metadata=STATIC)
    uses: str = field(default="all", metadata=STATIC)
    split: tuple[str, ...] = field(default=(), metadata=STATIC)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", _MessagePath(self.path))

    scale = property(lambda self: self.parts["scale"])
    key = property(lambda self: self.parts.get("key"))
    lambda_d = property(lambda self: self.parts.get("lambda_d"))
    rows = property(lambda self: self.parts.get("rows"))
    active = property(lambda self: self.parts.get("active"))
    gain = property(lambda self: self.parts.get("gain"))
    shift = property(lambda self: self.parts.get("shift"))

    @property
    def a(self) -> jax.Array:
        """A, [batch…, r, in…]; an A that a stack shares is repeated for each of its layers."""
        return self.parts["a"] if "a" in self.parts else self._shared_factor_by_layer("shared_a")

    @property
    def b(self) -> jax.Array:
        """latent·B·diag(lambda_b), [batch…, r, out…]; just B where the weight is not compact."""
        b = self.parts["b"] if "b" in self.parts else self._shared_factor_by_layer("shared_b")
        # LoRA-XS and TinyLoRA: latent [batch…, r, r] times B.
        latent = self.parts.get("latent")
        if latent is not None:
            n_batch = latent.ndim - 2
            batch_axes = tuple(range(n_batch))
            dims = (((n_batch + 1,), (n_batch,)), (batch_axes, batch_axes))
            b = lax.dot_general(latent, b.astype(latent.dtype), dims, lax.Precision.HIGHEST)
        # VeRA: a factor for each column of B, [batch…, out…].
        lambda_b = self.parts.get("lambda_b")
        if lambda_b is not None:
            column_factors = jnp.expand_dims(lambda_b, len(self.axes("batch")))
            b = b.astype(lambda_b.dtype) * column_factors
        return b

    def _shared_factor_by_layer(self, name: str) -> jax.Array:
        """Returns a factor that a stack shares, repeated for each layer: [batch…, r, …]."""
        shared_factor = self.parts[name]
        return jnp.broadcast_to(shared_factor, (*self.sizes("batch"), *shared_factor.shape))

    @property
    def is_compact(self) -> bool:
        """True if a and b are computed from other, smaller parts."""
        return not self.parts.keys().isdisjoint(_COMPACT_PARTS)

    def formed(self) -> "Factored":
        """Returns the weight with a and b computed from the parts that determine them."""
        if not self.is_compact:
            return self
        return self.replace(a=self.a, b=self.b, **dict.fromkeys(_COMPACT_PARTS))

    def replace(
        self, base: BaseLike = None, labels: Any = None, **parts: jax.Array | None
    ) -> "Factored":
        """Returns the weight with another base, labels or parts; None removes a part."""
        merged_parts = {**self.parts, **parts}
        return dataclasses.replace(
            self,
            base=self.base if base is None else base,
            labels=self.labels if labels is None else tuple(labels),
            parts={name: array for name, array in merged_parts.items() if array is not None},
        )

    def _without_adapter(self) -> BaseLike:
        """Returns W, as an array or as a weight without parts."""
        return dataclasses.replace(self, parts={}) if is_base(self.base) else self.base

    def seen_by_use(self, use: str) -> BaseLike:
        """Returns the weight as one use of a tied table sees it, perhaps without its factors.

        Args:
          use: "lookup" or "product".
        """
        if not self.parts or self.uses in ("all", use):
            return self
        has_adapter_of_use = self.uses == "each"
        if not has_adapter_of_use:
            return self._without_adapter()
        # Look-ups see the first half of the rank, products the second half.
        half_rank = self.rank // 2
        start, stop = (0, half_rank) if use == "lookup" else (half_rank, self.rank)
        n_batch = len(self.axes("batch"))
        rank_axes = {"a": n_batch, "b": n_batch, "lambda_d": n_batch, "rows": 1}
        parts_of_use = {
            name: lax.slice_in_dim(self.parts[name], start, stop, axis=axis)
            for name, axis in rank_axes.items()
            if name in self.parts
        }
        return dataclasses.replace(self.replace(**parts_of_use), uses=use)

    def axes(self, label: Label) -> Axes:
        """Returns the base's axes with this role, in order."""
        return layout_of_axes((label,), self.labels)

    def sizes(self, label: Label) -> tuple[int, ...]:
        """Returns the sizes of the base's axes with this role."""
        return tuple(self.base.shape[axis] for axis in self.axes(label))

    @property
    def rank(self) -> int:
        """The rank that the factors are stored with."""
        if "a" not in self.parts:
            return self.parts["shared_a"].shape[0]
        return self.parts["a"].shape[len(self.axes("batch"))]

    @property
    def scales(self) -> jax.Array:
        """The scales of the columns of xA: s [batch…, 1], or s·lambda_d [batch…, r]."""
        scale: jax.Array = jnp.expand_dims(self.scale, self.scale.ndim)
        if self.lambda_d is None:
            return scale
        dtype = accumulation_dtype(self.lambda_d.dtype)
        scales: jax.Array = scale.astype(dtype) * self.lambda_d.astype(dtype)
        return scales

    def layout(self, name: str) -> Axes:
        """Returns the base's axis for each axis of a part; see `parts.layout_of_axes`."""
        return layout_of_axes(AXES[name], self.labels)

    def shape_of(self, name: str, shape: Sequence[int], labels: Sequence[Label]) -> tuple[int, ...]:
        """Returns the shape of a part for a base of another shape, with other labels."""
        return shape_of_axes(AXES[name], shape, labels, self.rank)

    def along(self, base: BaseLike, move: Move) -> "Factored":
        """Returns the weight on another base, with ``move(array, layout)`` for each part."""
        parts = {name: move(array, self.layout(name)) for name, array in self.parts.items()}
        return dataclasses.replace(self, base=base, parts=parts)

    def with_base_and_labels(
        self, base: BaseLike, labels: Sequence[Label], narrow: Sequence[int] | None = None
    ) -> "Factored":
        """Returns the weight with a reshaped base that keeps each role's axis order.

        Args:
          base: the base of the result.
          labels: the role of each axis of `base`.
          narrow: the shape of `base` before its axes of size one were broadcast.
        """
        if not self.parts:
            return dataclasses.replace(self, base=base, labels=tuple(labels))
        narrow_shape = base.shape if narrow is None else narrow

        def reshape_part(name: str, array: jax.Array) -> jax.Array:
            """Reshapes a part like the base."""
            # A mask of examples or tokens has no axes of the base.
            is_mask = EXAMPLE in self.layout(name)
            if is_mask:
                return array
            array = array.reshape(self.shape_of(name, narrow_shape, labels))
            return jnp.broadcast_to(array, self.shape_of(name, base.shape, labels))

        parts = {name: reshape_part(name, array) for name, array in self.parts.items()}
        return dataclasses.replace(self, base=base, parts=parts, labels=tuple(labels))

    def merged(self) -> jax.Array:
        """Returns (W + s·AB)·diag(g), computed in fp32 or wider and rounded once to W's dtype."""
        base = as_array(self.base)
        if not self.parts:
            return base
        dtype = accumulation_dtype(base.dtype)
        total = base.astype(dtype) + self.delta(dtype)
        if self.gain is not None:
            total *= self.columns_in_base_layout(self.gain).astype(dtype)
        return total.astype(base.dtype)

    def columns_in_base_layout(self, vector: jax.Array) -> jax.Array:
        """Returns a gain or a shift in the base's layout, with size one along the in axes."""
        ndim = len(self.labels)
        axes_of_base = {axis: axis for axis in range(ndim)}
        return align_to_axes(vector, self.layout("gain"), axes_of_base, ndim)

    def delta(self, dtype: DTypeLike) -> jax.Array:
        """Returns s·AB in the base's layout.

        Raises:
          ExamplesError: the examples of a batch have a weight each.
          TokensError: some tokens see the adapter, and others do not.
        """
        if self.rows is not None:
            raise ExamplesError(
                f"the weight {self.path!r} has a different adapter for each example, so that it "
                "cannot be merged"
            )
        if self.active is not None:
            raise TokensError(
                f"The weight {self.path!r} has an adapter that acts on some tokens only, so it "
                "cannot be merged. Run the tree through lora_jax.adapt instead."
            )
        n_batch = len(self.axes("batch"))
        batch_axes = tuple(range(n_batch))
        a = self.a.astype(dtype)
        b = self.b.astype(dtype)
        a = a * lax.expand_dims(self.scales.astype(dtype), range(n_batch + 1, a.ndim))
        # Contract the rank: [batch…, in…, out…], then restore the order of the base's axes.
        dims = (((n_batch,), (n_batch,)), (batch_axes, batch_axes))
        ab = lax.dot_general(a, b, dims, lax.Precision.HIGHEST)
        ab_axes = self.axes("batch") + self.axes("in") + self.axes("out")
        return lax.transpose(ab, tuple(ab_axes.index(axis) for axis in range(len(ab_axes))))


def wrong_rows_message(weight: Factored, rows: Sequence[int]) -> str:
    """Returns the message for an activation whose rows do not match a token mask.

    Args:
      weight: the weight, with its mask.
      rows: the sizes of the activation's axes that are neither contracted nor batched.
    """
    is_mask_missing = not weight.active.size
    if is_mask_missing:
        return (
            f"The weight {weight.path!r} belongs to an activated LoRA, and this call does not say "
            "which tokens see the adapter. Pass lora_jax.activate(tree, mask), where "
            "lora_jax.invoked(ids, tokens) computes a mask [batch, seq]. The models of "
            "lora_jax.models compute the mask themselves in calls with whole rows, without a cache."
        )
    return (
        f"The weight {weight.path!r} acts on tokens of a mask {list(weight.active.shape)}, but is "
        f"multiplied by rows {list(rows)}. Multiply it by an activation [batch, seq, …] or "
        "[batch * seq, …] of the size of the mask. Exclude weights (heads, experts) for which this "
        "is not possible from the rules. If a model of lora_jax.models recomputes its layers, it "
        "splits MLPs of rows of 8,192 tokens or more into chunks. Use remat='products' or "
        "Layout(…, keeps_rows=True) to prevent that."
    )


def as_matrices(leaf: Leaf, roles: AxisRoles) -> jax.Array:
    """Returns W as [batch…, in, out], in fp32 (or wider)."""
    order = layout_of_axes(("batch", "in", "out"), roles.labels(len(leaf.shape)))
    batch_shape = roles.sizes(leaf.shape, "batch")
    fan_in = math.prod(roles.sizes(leaf.shape, "in"))
    fan_out = math.prod(roles.sizes(leaf.shape, "out"))
    kernel = jnp.transpose(as_array(leaf), order).reshape(*batch_shape, fan_in, fan_out)
    return kernel.astype(accumulation_dtype(leaf.dtype))


def factor_shapes(shape: tuple[int, ...], roles: AxisRoles, rank: int) -> tuple[Axes, Axes, Axes]:
    """Returns the stored shapes of a, b and scale for a weight of this shape."""
    labels = roles.labels(len(shape))
    a, b, scale = (shape_of_axes(AXES[name], shape, labels, rank) for name in ("a", "b", "scale"))
    return a, b, scale
