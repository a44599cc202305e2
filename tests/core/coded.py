"""A base that is not an array (codes with scales), to test the protocol of `lora_jax.core.base`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.core.base import as_array, is_base
from lora_jax.core.paths import flatten_with_paths
from lora_jax.select.resolve import Adaptation, resolve
from tests.laws import test_laws as laws
from tests.support import assert_close

STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coded:
    """W = codes · scales.

    Attributes:
      codes: int8, of W's shape.
      scales: with W's number of axes, of size one along the last axis but one: one scale for all.
      dtype: of W.
      movable: whether `along` works; otherwise W is formed wherever an axis is cut.
    """

    codes: Any
    scales: Any
    dtype: Any = dataclasses.field(metadata=STATIC)
    movable: bool = dataclasses.field(default=True, metadata=STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def as_array(self) -> jax.Array:
        return self.codes.astype(self.dtype) * self.scales

    def along(self, move: Any, touched: frozenset[int]) -> "Coded | None":
        if not self.movable and touched:
            return None
        codes, scales = self.codes, self.scales
        axes = tuple(range(codes.ndim))
        if touched:
            sizes = [(codes if axis in touched else scales).shape[axis] for axis in axes]
            scales = jnp.broadcast_to(scales, sizes)
        places = tuple(a if codes.shape[a] == scales.shape[a] else -1 for a in axes)
        return dataclasses.replace(self, codes=move(codes, axes), scales=move(scales, places))


def coded(array: jax.Array, *, movable: bool = True) -> Coded:
    """Returns an array rounded to codes, by NumPy."""
    values = np.asarray(array)
    scales = np.abs(values).max(axis=-2, keepdims=True) / 127
    codes = np.round(values / scales).astype(np.int8)
    return Coded(jax.device_put(codes), jax.device_put(scales), values.dtype, movable)


def fixed(leaf: Any, _: Any) -> Coded:
    """Codes whose every cut forms the array."""
    return coded(leaf, movable=False)


def with_coded_kernels(params: Any, rules: Any, encode: Any = None) -> Any:
    """Returns a tree with ``encode(leaf, its axis roles)`` for each leaf that the rules adapt."""
    encode = (lambda leaf, _: coded(leaf)) if encode is None else encode
    leaves, treedef = flatten_with_paths(params)
    chosen = resolve(leaves, rules)
    return treedef.unflatten(
        encode(leaf, chosen[path].roles) if isinstance(chosen.get(path), Adaptation) else leaf
        for path, leaf in leaves
    )


def decoded(tree: Any) -> Any:
    """Returns a tree with arrays in place of coded leaves, those of adapted weights included."""
    return jax.tree.map(as_array, tree, is_leaf=is_base)


def coded_program(program: Any, encode: Any = None) -> Any:
    """Returns a program with coded kernels; called by itself, it forms them first."""

    def params(dtype: Any) -> Any:
        return with_coded_kernels(program.params(dtype), program.rules, encode)

    def run(params: Any, x: jax.Array) -> jax.Array:
        return program.run(decoded(params), x)

    return dataclasses.replace(program, params=params, run=run)


def is_on(tree: Any) -> bool:
    """Returns whether a tree has an adapted weight whose base is coded."""
    nodes = jax.tree.leaves(tree, is_leaf=lj.is_node)
    return any(lj.is_node(n) and is_base(n.base) for n in nodes)


def check_variant(program: Any, changes: dict[str, Any]) -> None:
    """Compares values and gradients over codes with those over the arrays they stand for.

    Args:
        program: one whose kernels are in codes, in float64.
        changes: the fields of its rules to change.
    """
    rules = tuple(dataclasses.replace(rule, **changes) for rule in program.rules)
    _, tree, x = dataclasses.replace(program, rules=rules).inputs(jnp.float64)
    key = jax.random.key(3) if "dropout" in changes else None

    def values(tree):
        adapter, base = lj.split(tree)

        def loss(adapter):
            y = laws.adapted(program)(lj.join(adapter, base), x, dropout_key=key)
            return jnp.sum(jnp.sin(y))

        return jax.value_and_grad(loss)(adapter)

    assert_close(*jax.jit(lambda tree: (values(tree), values(decoded(tree))))(tree), 1e-9)
