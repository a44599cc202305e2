"""Axis roles from `trace`, and `explain`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.adapt.roles import infer_roles
from lora_jax.adapt.uses import uses
from lora_jax.core.paths import flatten_with_paths
from tests.support import PROGRAMS, LinenModel, assert_close, draw, numpy_init, with_random_factors

X = draw(9, (13, 5))
BASE = draw(1, (5, 7))


@jax.custom_vjp
def own_vjp(x, w):
    return x @ w


own_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


@jax.custom_jvp
def own_jvp(x, w):
    return x @ w


own_jvp.defjvp(lambda xs, ts: (xs[0] @ xs[1], ts[0] @ xs[1] + xs[0] @ ts[1]))


def looked(fn, shape, *args):
    weight = jax.ShapeDtypeStruct(shape, jnp.float32)
    seen = infer_roles(fn, (weight, *args), {id(weight): "w"})["w"]
    return seen if isinstance(seen, str) else (seen.roles.in_axes, seen.roles.out_axes)


@pytest.mark.parametrize(
    ("fn", "shape", "expected"),
    [
        (lambda w, x: x @ w, (5, 7), ((-2,), (-1,))),
        (lambda w, x: x @ w.T, (7, 5), ((-1,), (-2,))),
        (lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), (5, 3, 7), ((-3,), (-2, -1))),
        (lambda w, x: x @ w.reshape(5, 21), (5, 3, 7), ((-3,), (-2, -1))),
        (lambda w, x: x @ w.reshape(5, 3, 7)[:, 1], (5, 21), ((-2,), (-1,))),
        (lambda w, x: lax.scan(lambda c, w: (c @ w, c), x, w)[0], (3, 5, 5), ((-2,), (-1,))),
        (lambda w, x: x @ w[1], (3, 5, 7), ((-2,), (-1,))),
        # One x for all of a stack: nothing tells the stack from a second out axis.
        (lambda w, x: jax.vmap(lambda w: x @ w)(w), (3, 5, 7), ((-2,), (-3, -1))),
        (lambda w, x: jax.vmap(jnp.matmul)(jnp.stack([x] * 3), w), (3, 5, 7), ((-2,), (-1,))),
        (
            lambda w, x: jnp.einsum("bi,bio->bo", x, w[jnp.zeros(13, int)]),
            (3, 5, 7),
            ((-2,), (-1,)),
        ),
        (
            lambda w, x: lax.ragged_dot(x, w, jnp.array([4, 9], jnp.int32)),
            (2, 5, 7),
            ((-2,), (-1,)),
        ),
        (lambda w, x: w[jnp.array([1, 2])] * x[0], (11, 5), ((-2,), (-1,))),
        (lambda w, x: jax.vmap(lambda i: w[i])(jnp.array([1, 2])) * x[0], (11, 5), ((-2,), (-1,))),
        (
            lambda w, x: jax.vmap(lambda i, x: x @ w[i])(jnp.zeros(13, int), x),
            (3, 5, 7),
            ((-2,), (-1,)),
        ),
        (lambda w, x: (w[jnp.array([1, 2])] * x[0]) @ w.T, (11, 5), ((-2,), (-1,))),
        (lambda w, x: jnp.tanh(x @ w) @ w.T, (5, 7), ((-2,), (-1,))),
        (lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True)), (5, 7), ((-2,), (-1,))),
        (lambda w, x: x @ jnp.concatenate([w, w], 1), (5, 7), ((-2,), (-1,))),
        (lambda w, x: jax.jit(jax.checkpoint(lambda w: x @ w))(w), (5, 7), ((-2,), (-1,))),
        (
            lambda w, x: lax.conv_general_dilated(
                x[None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            ),
            (3, 5, 7),
            ((-3, -2), (-1,)),
        ),
        (lambda w, x: own_vjp(x, w), (5, 7), ((-2,), (-1,))),
        (lambda w, x: own_jvp(x, w), (5, 7), ((-2,), (-1,))),
        (lambda w, x: lax.map(lambda row: row @ w, x, batch_size=4), (5, 7), ((-2,), (-1,))),
        (lambda w, x: lax.map(lambda w: x @ w, w), (3, 5, 7), ((-2,), (-1,))),
        (lambda w, x: lax.associative_scan(jnp.add, x @ w), (5, 7), ((-2,), (-1,))),
        (
            lambda w, x: jnp.vectorize(lambda w, x: w @ x, signature="(o,i),(i)->(o)")(w, x),
            (7, 5),
            ((-1,), (-2,)),
        ),
        (lambda w, x: jnp.einsum("ti,ijo,tj->to", x, w, x), (5, 5, 7), ((-3, -2), (-1,))),
        (lambda w, x: w @ x.T, (7, 5), ((-1,), (-2,))),
        (
            lambda w, x: lax.conv_transpose(x[None], w, (2,), "SAME", transpose_kernel=True),
            (3, 7, 5),
            ((-3, -1), (-2,)),
        ),
        (
            lambda w, x: lax.ragged_dot(x, w.swapaxes(1, 2), jnp.array([4, 9], jnp.int32)),
            (2, 7, 5),
            ((-1,), (-2,)),
        ),
        (
            lambda w, x: jax.shard_map(
                lambda w, x: x @ lax.all_gather(w, "i", tiled=True),
                mesh=jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,)),
                in_specs=(P("i"), P()),
                out_specs=P(),
                check_vma=False,
            )(w, x),
            (5, 7),
            ((-2,), (-1,)),
        ),
        (lambda w, x: lax.cond(x.sum() > 0, lambda: x @ w, lambda: -x @ w), (5, 7), ((-2,), (-1,))),
        (lambda w, x: lax.fori_loop(0, 3, lambda _, y: jnp.sin(y @ w), x), (5, 5), ((-2,), (-1,))),
    ],
)
def test_infer_roles(fn, shape, expected):
    assert looked(fn, shape, X) == expected


@pytest.mark.parametrize(
    ("fn", "shape", "message"),
    [
        (lambda w, x: x + w[0, 0], (5, 7), "never multiplies by this leaf"),
        (lambda w, x: x + w.sum(), (5, 7), "'reduce_sum' at .*test_roles.py:.* loses its axes"),
        (
            lambda w, x: x @ lax.cond(x.sum() > 0, lambda: w, lambda: -w),
            (5, 7),
            "'cond .as an output.' at .*test_roles.py:.* loses its axes",
        ),
        (
            lambda w, x: x @ jnp.concatenate([w.reshape(-1), w.reshape(-1)])[:35].reshape(5, 7),
            (5, 7),
            "flattened to one axis.*test_roles.py.*ravel_pytree",
        ),
        (lambda w, x: x @ (w * BASE), (1, 7), "no axis of this leaf is contracted"),
        (lambda w, x: (x @ w.reshape(5, 21), x[:, :3] @ w[0]), (5, 3, 7), "contradict each other"),
        (lambda w, x: x.reshape(-1)[:35] @ w.reshape(-1), (5, 7), "no axis .* comes out"),
    ],
)
def test_why_there_are_no_roles(fn, shape, message):
    assert re.search(message, looked(fn, shape, X))


def test_lorafy_takes_what_trace_shows():
    params = {"lin": {"weight": draw(1, (7, 5))}, "bias": draw(2, (7,))}  # [out, in]

    def fn(params, x):
        return x @ params["lin"]["weight"].T + params["bias"]

    rules = [lj.LoraRule(targets="all-linear", rank=2, alpha=3.0, init=numpy_init)]
    tree = with_random_factors(lj.lorafy(params, rules, trace=(fn, params, X)))
    assert tree["lin"]["weight"].a.shape == (2, 5)
    assert_close(lj.adapt(fn, strict=True)(tree, X), fn(lj.merge(tree), X), 1e-5)
    with pytest.raises(ValueError, match="never multiplies by this leaf.*in_axes"):
        lj.lorafy(
            params, [lj.LoraRule(targets=["lin"])], trace=(lambda p, x: x + p["bias"][0], params, X)
        )
    with pytest.raises(ValueError, match="matched by identity"):
        lj.lorafy(
            jax.tree.map(jnp.copy, params), [lj.LoraRule(targets=["lin"])], trace=(fn, params, X)
        )


def test_the_traced_function_is_called_once():
    """Walks for roles, heads and merges read one jaxpr, and trace loops alone again."""
    params = {"stack": draw(1, (3, 5, 5)), "squared": draw(2, (5, 5)), "head": draw(3, (5, 7))}
    calls = []

    def fn(params, x):
        calls.append("fn")
        x, _ = lax.scan(lambda x, kernel: (jax.nn.relu(x @ kernel), None), x, params["stack"])
        return jax.jit(jnp.matmul)(x @ (params["squared"] ** 2), params["head"])

    with pytest.warns(lj.LeftOutWarning, match="every use: squared"):
        lj.lorafy(params, [lj.LoraRule(targets="all-linear", rank=2)], trace=(fn, params, X))
    assert calls == ["fn"]


def test_trace_of_a_linen_model_and_on_abstract_arrays():
    model = LinenModel()
    params = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    tree = lj.lorafy(
        params,
        [lj.LoraRule(targets="all-linear", rank=2)],
        trace=(lambda p, x: model.apply({"params": p}, x), params, X),
    )
    leaves, _ = flatten_with_paths(tree, is_leaf=lj.is_node)
    nodes = {path: leaf for path, leaf in leaves if lj.is_node(leaf)}
    roles = {path: (node.roles.in_axes, node.roles.out_axes) for path, node in nodes.items()}
    assert roles == {
        "layers/wide/kernel": ((-3,), (-2, -1)),
        "layers/back/kernel": ((-3, -2), (-1,)),
    }


def test_explain(capsys):
    program = PROGRAMS[1]
    _, tree, x = program.inputs()

    def fn(params, x):
        kernel = params["layers"]["up"]["kernel"]
        return program.run(params, x) * jnp.sin(kernel).sum()

    lj.explain(fn, tree, x)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["path", "primitive", "place", "how", "why"]
    assert any({"layers/up/kernel", "dot_general", "factored"} <= set(t.split()) for t in lines)
    (merged,) = [line for line in lines if "merged" in line]
    assert "sin" in merged and "test_roles.py" in merged


def test_explain_names_each_layer_of_a_shared_function_and_unused_weights():
    layer = jax.jit(lambda w, x: jnp.sin(x @ w))
    params = {"layers": [{"kernel": draw(i, (5, 5))} for i in range(3)]}
    tree = lj.lorafy(params, [lj.LoraRule(targets=["layers"], rank=2, init=numpy_init)])

    def fn(params, x):
        for weights in params["layers"][:2]:
            x = layer(weights["kernel"], x)
        return x

    found = {record.path: record.how for record in uses(fn, tree, X)}
    assert found == {
        "layers/0/kernel": "factored",
        "layers/1/kernel": "factored",
        "layers/2/kernel": "unused",
    }


def test_rules_of_ones_own(float64):
    @jax.custom_vjp
    def matmul(x, w):
        return x @ w

    matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

    def factored(x, weight, **_):
        return [matmul(x, weight.base) + weight.scale.astype(x.dtype) * (x @ weight.a.T) @ weight.b]

    rule = lj.LoraRule(targets=["w"], rank=2, alpha=3.0, dtype=jnp.float64, init=numpy_init)
    tree = with_random_factors(lj.lorafy({"w": draw(1, (5, 7), jnp.float64)}, [rule]))
    fn = lambda p, x: matmul(x, p["w"])  # noqa: E731
    x = draw(2, (3, 5), jnp.float64)
    run = lj.adapt(fn, strict=True, primitives={"matmul": factored})
    assert_close(run(tree, x), fn(lj.merge(tree), x), 1e-9)
    with pytest.raises(lj.MergeError, match="custom_vjp"):
        lj.adapt(fn, strict=True)(tree, x)
    declined = lj.adapt(fn, strict=True, primitives={"matmul": lambda x, weight, **_: None})
    with pytest.raises(lj.MergeError, match="custom_vjp"):
        declined(tree, x)
    by_name = lambda x, w, **params: [x @ w.merged()]  # noqa: E731
    run = lj.adapt(lambda p, x: x @ p["w"], primitives={"dot_general": by_name})
    assert np.allclose(run(tree, x), x @ lj.merge(tree)["w"])
