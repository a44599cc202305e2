"""`adapt`, `place` and gradients on explicit axes of a mesh, where types have shardings.

The functions say `out_sharding` where plain JAX needs it. The reference is one device, merged.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from tests.support import array, assert_close, draw, numpy_init, with_random_factors

ROWS = P("fsdp", None, None)  # of activations [batch, seq, d_model]
X = draw(9, (4, 6, 10))
IDS = array(np.arange(24).reshape(4, 6) % 14)


class Case(NamedTuple):
    """A function on a mesh.

    Attributes:
      fn: called with parameters and `x`.
      shapes: of the kernels, by name.
      table: for `lj.sharding.place`.
      x: activations, or token ids.
      spec: of `x`.
      axes: (in_axes, out_axes) by kernel, where they are not Flax's.
    """

    fn: Callable[..., jax.Array]
    shapes: dict[str, tuple[int, ...]]
    table: list[tuple[str, P]]
    x: jax.Array = X
    spec: P = ROWS
    axes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}


def on_mesh(spec):
    """`spec` under a mesh, None without one."""
    return None if jax.sharding.get_abstract_mesh().empty else spec


def column(p, x):
    return x @ p["up"]


def row(p, x):
    return jnp.einsum("btf,fd->btd", x, p["down"], out_sharding=on_mesh(ROWS))


def mlp(p, x):
    return row(p, jax.nn.gelu(column(p, x)))


def attention(p, x):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    heads = jnp.einsum("bhts,bshk->bthk", weights, v)
    return jnp.einsum("bthk,hkd->btd", heads, p["o"], out_sharding=on_mesh(ROWS))


def look_up(p, ids):
    return p["table"].at[ids].get(out_sharding=on_mesh(ROWS))


def tied(p, ids):
    return look_up(p, ids) @ p["table"].T


def gathered(p, x):
    """FSDP by hand: each device gathers the kernel before it multiplies."""
    spec = on_mesh(P(None, None))
    return x @ (p["up"] if spec is None else jax.sharding.reshard(p["up"], spec))


def layers(p, x):
    return jax.lax.scan(lambda x, layer: (x + mlp(layer, x), None), x, p)[0]


BY_COLUMNS, BY_ROWS = ("up", P(None, "tensor")), ("down", P("tensor", None))
HEADS = {name: ((0,), (1, 2)) for name in "qkv"} | {"o": ((0, 1), (2,))}
CASES = {
    "column parallel": Case(column, {"up": (10, 12)}, [BY_COLUMNS]),
    "column parallel, rows over fsdp": Case(
        column, {"up": (10, 12)}, [("up", P(None, ("fsdp", "tensor")))], spec=P(None, None, None)
    ),
    "row parallel": Case(row, {"down": (10, 14)}, [BY_ROWS], spec=P("fsdp", None, "tensor")),
    "gathered by hand": Case(gathered, {"up": (10, 12)}, [("up", P("tensor", None))]),
    "mlp": Case(mlp, {"up": (10, 12), "down": (12, 10)}, [BY_COLUMNS, BY_ROWS]),
    "attention": Case(
        attention,
        {"q": (10, 2, 3), "k": (10, 2, 3), "v": (10, 2, 3), "o": (2, 3, 10)},
        [("[qkv]", P(None, "tensor", None)), ("o", P("tensor", None, None))],
        axes=HEADS,
    ),
    "look-up, rows sharded": Case(
        look_up, {"table": (14, 10)}, [("table", P("tensor", None))], IDS, P("fsdp", None)
    ),
    "look-up, columns sharded": Case(
        look_up, {"table": (14, 10)}, [("table", P(None, "tensor"))], IDS, P("fsdp", None)
    ),
    "tied": Case(tied, {"table": (14, 10)}, [("table", P("tensor", None))], IDS, P("fsdp", None)),
    "scan": Case(layers, {"up": (3, 10, 12), "down": (3, 12, 10)}, [BY_COLUMNS, BY_ROWS]),
}


def adapted_params(case: Case) -> Any:
    params = {name: draw(i, shape) for i, (name, shape) in enumerate(case.shapes.items())}
    rules = []
    for name in params:
        in_axes, out_axes = case.axes.get(name, ((-2,), (-1,)))
        rule = lj.LoraRule(
            targets=[name],
            rank=2,
            alpha=3.0,
            init=numpy_init,
            in_axes=in_axes,
            out_axes=out_axes,
        )
        rules.append(rule)
    return with_random_factors(lj.lorafy(params, rules))


def loss(fn):
    return lambda adapter, base, x: jnp.sum(jnp.sin(fn(lj.join(adapter, base), x)))


@pytest.mark.parametrize("name", CASES)
def test_adapt_on_explicit_axes_equals_one_device(name):
    case = CASES[name]
    tree = adapted_params(case)
    on_merged = lambda tree, x: case.fn(lj.merge(tree), x)  # noqa: E731
    adapted = lj.adapt(case.fn, strict=True)
    expected = on_merged(tree, case.x)
    expected_gradients = jax.grad(loss(on_merged))(*lj.split(tree), case.x)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(case.x, NamedSharding(mesh, case.spec))
        placed = lj.sharding.place(tree, case.table, mesh)
        plain = lj.sharding.place(lj.strip(tree), case.table, mesh)
        output = jax.jit(adapted)(placed, x)
        assert jax.typeof(output) == jax.typeof(jax.jit(case.fn)(plain, x))
        eager_output = adapted(placed, x)
        gradients = jax.jit(jax.grad(loss(adapted)))(*lj.split(placed), x)
    assert_close(output, expected, 1e-5)
    assert_close(eager_output, expected, 1e-5)
    assert_close(gradients, expected_gradients, 1e-5)
