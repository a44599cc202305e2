"""A batch of which each example has an adapter of its own: evaluated at once, and one by one."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import lora_jax as lj
from lora_jax.adapt.interpreter import Interpreter
from lora_jax.adapt.per_example.axes import ExampleAxes
from lora_jax.adapt.transform import RULES, run
from lora_jax.core.weight import leaves_of
from lora_jax.lorafy import map_nodes
from tests.support import assert_close, lorafied, with_random_factors


def slots(params: Any, rules: Sequence[Any], n: int = 3) -> list[Any]:
    """Returns adapted trees over one base, with random factors and scales of their own."""
    fresh = lorafied(params, rules)
    trees = [with_random_factors(fresh, seed=i) for i in range(n)]
    scaled = lambda by: lambda _, node: node.replace(scale=np.asarray(node.scale) * np.float32(by))  # noqa: E731
    return [map_nodes(scaled(1 + i / 2), tree) for i, tree in enumerate(trees)]


def bank(trees: Sequence[Any], ids: Any) -> Any:
    """Returns one tree: the A and B of all slots side by side, and whose columns each row sees."""
    flat = [leaves_of(tree) for tree in trees]
    own = np.arange(len(trees)) == np.asarray(ids)[:, None]  # [n, slots]

    def one(nodes: Sequence[Any]) -> Any:
        first = nodes[0]
        if not lj.is_node(first):
            return first
        join = lambda name: np.concatenate([getattr(v, name) for v in nodes], first.n_batch)  # noqa: E731
        factors = [np.repeat(np.asarray(v.scale)[..., None], first.rank, -1) for v in nodes]
        arrays = {
            "a": join("a"),
            "b": join("b"),
            "scale": np.ones(first.scale.shape, first.scale.dtype),
            "lambda_d": np.concatenate(factors, -1),
            "rows": np.repeat(own, first.rank, -1).astype(np.float32),
        }
        ranks = (len(trees) * first.rank,) * len(first.ranks)
        return first.replace(arrays=jax.tree.map(jax.device_put, arrays), ranks=ranks)

    nodes = zip(*([leaf for _, leaf in leaves] for leaves, _ in flat), strict=True)
    return flat[0][1].unflatten(list(map(one, nodes)))


def at_once(fn: Callable[..., Any], axes: ExampleAxes, tree: Any, *args: Any, **kwargs: Any) -> Any:
    """Returns ``fn(tree, *args)``, each example with its own adapter."""
    return run(fn, Interpreter(RULES, strict=True), (tree, *args), kwargs, None, axes=axes)


def check(
    fn: Callable[..., Any],
    trees: Sequence[Any],
    ids: Sequence[int],
    args: Sequence[Any],
    in_axes: Sequence[Any],
    out_axes: Any = 0,
    tolerance: float = 1e-5,
) -> None:
    """Compares a batch evaluated at once with runs of one adapter, of which each gives its rows.

    Args:
      fn: called with a tree and `args`.
      trees: one for each slot.
      ids: the slot of each example.
      args: of the function, batched.
      in_axes, out_axes: of the examples; `out_axes` is a prefix of the result, without None.
    """
    axes = ExampleAxes((None, *in_axes), out_axes)
    ours = jax.jit(lambda tree, *args: at_once(fn, axes, tree, *args))(bank(trees, ids), *args)
    single = jax.jit(lj.adapt(fn))
    each = [single(tree, *args) for tree in trees]

    def picked(axis: int, *outputs: Any) -> Any:
        rows = [np.take(outputs[slot], [i], axis) for i, slot in enumerate(ids)]
        return np.concatenate(rows, axis)

    whole = jax.tree.broadcast(out_axes, each[0])
    theirs = jax.tree.map(picked, whole, *each)
    assert_close(ours, theirs, tolerance)
    first = jax.tree.map(lambda x: np.asarray(x), each[ids[0]])
    assert not all(map(np.allclose, jax.tree.leaves(ours), jax.tree.leaves(first))), "no difference"
