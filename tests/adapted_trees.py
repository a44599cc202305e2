"""Adapted trees for tests: drawn by few programs, with factors that are seen."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

import lora_jax as lj
from lora_jax.core.parts import RANK
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.weight import is_leaf, is_node

Params = Any


@functools.cache
def _lorafy(rules: tuple[Any, ...]) -> Callable[[Params], Params]:
    return jax.jit(lambda params: lj.lorafy(params, rules))


def _kaiming(key: Any, shape: lj.init.FactorShape, dtype: Any) -> lj.init.Factors:
    """Draws as `lj.init.kaiming` does, but by NumPy: JAX's generator takes long to compile."""
    bound = 1 / math.sqrt(shape.fan_in)
    drawn = np.random.default_rng(shape.a).uniform(-bound, bound, shape.a)
    return jax.device_put(drawn.astype(dtype)), jax.device_put(np.zeros(shape.b, dtype))


def _by_numpy(rule: Any) -> Any:
    """Returns a rule with `_kaiming` for the default: unless a variant draws A, or it draws two."""
    if getattr(rule, "init", None) is not lj.init.kaiming or rule.uses == "each":
        return rule
    is_drawn = not any(variant.alone for variant in rule.variants)
    return dataclasses.replace(rule, init=_kaiming) if is_drawn else rule


def lorafied(params: Params, rules: Iterable[Any]) -> Params:
    """Returns `lj.lorafy(params, rules)` with a default A of NumPy's, drawn by one program."""
    return _with_base(_lorafy(tuple(map(_by_numpy, rules)))(params), params)


def _with_base(tree: Params, params: Params) -> Params:
    """Returns an adapted tree with `params` as its base."""

    def replaced(node: Any, leaf: Any) -> Any:
        if not is_node(node):
            return leaf
        return node if isinstance(node, lj.Trained) else node.replace(base=leaf)

    return jax.tree.map(replaced, tree, params, is_leaf=is_leaf)


def adapted(params: Params, rule: lj.LoraRule) -> Params:
    """Returns a tree of plain LoRA with random factors, for which nothing is compiled."""
    shapes = jax.eval_shape(lambda base: lj.lorafy(base, [rule]), params)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    scale = np.float32(rule.alpha / rule.rank)
    scaled = jax.tree.map(
        lambda node: node.replace(scale=scale) if is_node(node) else node, zeros, is_leaf=is_node
    )
    return with_random_factors(_with_base(scaled, params))


def merged_by_numpy(node: lj.LoraWeight, scale: float) -> np.ndarray:
    """Returns the merged kernel of one matrix, W + scale·AᵀB."""
    base, a, b = (np.asarray(value) for value in (node.base, node.a, node.b))
    return base + np.float32(scale) * a.T @ b


def with_random_factors(params: Params, seed: int = 7) -> Params:
    """An adapted tree whose A and B are random and far from zero, so that the adapter is seen.

    (What pads the ranks of a stack stays zero, as training leaves it. Sums in NumPy compile no
    program for each shape.)
    """
    adapter, base = lj.split(params)
    nodes, _ = flatten_with_paths(params, is_leaf=is_node)
    weights = {path: node for path, node in nodes if path in adapter}

    def changed(path: str, name: str, value: jax.Array) -> jax.Array:
        rng = np.random.default_rng([seed, len(path) * 31 + ord(name[0])])
        noise = 0.3 * rng.standard_normal(value.shape)
        node = weights[path]
        if isinstance(node, lj.LoraWeight) and len(node.ranks) > 1:
            used = np.arange(node.rank) < np.asarray(node.ranks)[:, None]
            for axis in [i for i, role in enumerate(node.layout(name)) if role == RANK]:
                shape = [1] * value.ndim
                shape[0], shape[axis] = used.shape  # layers, [experts,] rank
                noise = noise * used.reshape(shape)
        changed = np.asarray(value) + noise.astype(value.dtype)
        placed = isinstance(value, jax.Array) and value.committed
        return jax.device_put(changed, value.sharding if placed else None)

    adapter = {
        path: {name: changed(path, name, value) for name, value in parts.items()}
        for path, parts in adapter.items()
    }
    return lj.join(adapter, base)
