"""Axis roles by looking, and `explain`."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.adapt.explain import uses
from lora_jax.adapt.roles import infer_roles
from lora_jax.axes import AxisRoles
from lora_jax.paths import flatten_with_paths
from tests.support import PROGRAMS, LinenModel, NnxModel, assert_close, draw, with_random_factors

X = draw(9, (13, 5))


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
        (
            lambda w, x: (w[jnp.array([1, 2])] * x[0]) @ w.T,
            (11, 5),
            ((-2,), (-1,)),
        ),
        (lambda w, x: jnp.tanh(x @ w) @ w.T, (5, 7), ((-2,), (-1,))),
        (
            lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True)),
            (5, 7),
            ((-2,), (-1,)),
        ),
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
        (
            lambda w, x: lax.cond(x.sum() > 0, lambda: x @ w, lambda: -x @ w),
            (5, 7),
            ((-2,), (-1,)),
        ),
        (
            lambda w, x: lax.fori_loop(0, 3, lambda _, y: jnp.sin(y @ w), x),
            (5, 5),
            ((-2,), (-1,)),
        ),
    ],
)
def test_infer_roles(fn, shape, expected):
    assert looked(fn, shape, X) == expected


@pytest.mark.parametrize(
    ("fn", "shape", "message"),
    [
        (lambda w, x: x + w[0, 0], (5, 7), "never multiplies by it"),
        (lambda w, x: x + w.sum(), (5, 7), "'reduce_sum' at .*test_roles.py:.* loses its axes"),
        (
            lambda w, x: x @ lax.cond(x.sum() > 0, lambda: w, lambda: -w),
            (5, 7),
            "'cond .as an output.' at .*test_roles.py:.* loses its axes",
        ),
        (
            lambda w, x: x @ jnp.concatenate([w.reshape(-1), w.reshape(-1)])[:35].reshape(5, 7),
            (5, 7),
            "one axis, or parts of one.*test_roles.py.*ravel_pytree",
        ),
        (lambda w, x: x @ (w * W), (1, 7), "no axis of it is contracted"),
        (lambda w, x: (x @ w.reshape(5, 21), x[:, :3] @ w[0]), (5, 3, 7), "contradict each other"),
        (lambda w, x: x.reshape(-1)[:35] @ w.reshape(-1), (5, 7), "no axis of it comes out"),
    ],
)
def test_why_there_are_no_roles(fn, shape, message):
    assert re.search(message, looked(fn, shape, X))


IDS = jnp.array([[3, 0, 9], [10, 3, 1]])
BATCH = draw(8, (2, 13, 5))
W = draw(1, (5, 7))
BACK = draw(2, (7, 5))


def taken(fn, params, *args, targets="all-linear"):
    """The paths that a rule takes, with the roles that are read by looking."""
    tree = lj.lorafy(params, [lj.LoraRule(targets=targets, rank=2)], trace=(fn, params, *args))
    leaves, _ = flatten_with_paths(tree, is_leaf=lj.is_node)
    return {path: leaf.roles for path, leaf in leaves if lj.is_node(leaf)}


def norm(w):
    return jnp.linalg.norm(w, axis=0, keepdims=True)


def in_steps(p, ids):
    return lax.scan(lambda c, i: (c, p["x"][i] @ p["w"]), 0, ids[0])[1]


def walk(p, x):
    return lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ p["w"] @ p["back"]) + p["x"][i], x)


def dead(p, x):
    def step(y, i):
        return jnp.tanh(y @ p["w"] @ p["back"]), p["x"][i + jnp.arange(2)]

    return lax.scan(step, x, jnp.arange(3))[0]


NO_KERNELS = {
    "looked up": (lambda p, ids: p["x"][ids] @ p["w"], (11, 5), IDS),
    "taken": (lambda p, ids: jnp.take(p["x"], ids, axis=0) @ p["w"], (11, 5), IDS),
    "looked up under vmap": (
        lambda p, ids: jax.vmap(lambda i: p["x"][i])(ids[0]) @ p["w"],
        (11, 5),
        IDS,
    ),
    "looked up one by one": (in_steps, (11, 5), IDS),
    "looked up and tied": (
        lambda p, ids: jnp.tanh(p["x"][ids] @ p["w"] @ p["back"]) @ p["x"].T,
        (11, 5),
        IDS,
    ),
    "a codebook": (
        lambda p, x: p["x"][jnp.argmax(x @ p["x"].T, -1)] @ p["w"],
        (11, 5),
        X,
    ),
    "gain of columns": (lambda p, x: x @ (p["x"] * p["w"] / norm(p["w"])), (1, 7), X),
    "gain of rows": (lambda p, x: x @ (p["x"] * p["w"]), (5, 1), X),
    "one output": (lambda p, x: (x @ p["w"], x @ p["x"]), (5, 1), X),
    "biases of layers": (walk, (3, 5), X),
    "biases of layers, scanned": (
        lambda p, x: lax.scan(lambda y, b: (jnp.tanh(y @ p["w"] @ p["back"] + b), None), x, p["x"]),
        (3, 5),
        X,
    ),
    "dead code": (dead, (3, 5), X),
    "positions": (lambda p, x: jax.nn.standardize(x + p["x"]) @ p["w"], (1, 13, 5), BATCH),
    "positions without a batch": (lambda p, x: jnp.tanh(x + p["x"]) @ p["w"], (13, 5), X),
    "positions, sliced": (lambda p, x: (p["x"][:13] + x) @ p["w"], (17, 5), BATCH),
    "positions of an arange": (
        lambda p, x: (x + p["x"][jnp.arange(13)]) @ p["w"],
        (17, 5),
        BATCH,
    ),
    "positions that multiply": (lambda p, x: (x * p["x"]) @ p["w"], (13, 5), X),
    "positions on the right": (
        lambda p, x: jnp.einsum("io,bti->bto", p["w"], x + p["x"]),
        (13, 5),
        BATCH,
    ),
    "biases of attention": (
        lambda p, x: jax.nn.softmax(x @ x.swapaxes(1, 2) + p["x"]) @ (x @ p["w"]),
        (13, 13),
        BATCH,
    ),
    "tokens before the input": (
        lambda p, x: jnp.concatenate([jnp.broadcast_to(p["x"], (2, 3, 5)), x], 1) @ p["w"],
        (3, 5),
        BATCH,
    ),
    "latents": (lambda p, x: x[:, :3] * (jnp.stack([p["x"]] * 2) @ p["w"]).sum(), (3, 5), BATCH),
    "an initial state": (
        lambda p, x: lax.scan(lambda h, x: (jnp.tanh(x @ p["w"] + h), None), p["x"], x[:, None])[0],
        (1, 7),
        X,
    ),
}


@pytest.mark.parametrize("name", NO_KERNELS)
def test_all_linear_leaves_alone_what_is_no_kernel(name):
    fn, shape, x = NO_KERNELS[name]
    params = {"w": W, "back": BACK, "x": draw(3, shape)}
    assert taken(fn, params, x).keys() - {"back"} == {"w"}
    assert taken(fn, params, x)["w"] == AxisRoles((-2,), (-1,))


def test_all_linear_leaves_alone_a_gain_that_has_axes_of_both_kinds():
    params = {"w": draw(1, (3, 5, 7)), "gain": draw(2, (3, 1, 7))}
    fn = lambda p, x: jnp.einsum("bhi,hio->bo", x, p["gain"] * p["w"])  # noqa: E731
    assert taken(fn, params, draw(3, (2, 3, 5))) == {"w": AxisRoles((-3, -2), (-1,))}


KERNELS = {
    "a full mask": (lambda p, x: x @ (p["w"] * p["m"]), {"w": (5, 7), "m": (5, 7)}),
    "a constant mask": (lambda p, x: x @ (p["w"] * jnp.tri(5, 7)), {"w": (5, 7)}),
    "standardised": (
        lambda p, x: x @ ((p["w"] - p["w"].mean(0)) / p["w"].std(0, keepdims=True)),
        {"w": (5, 7)},
    ),
    "before a bias": (
        lambda p, x: jnp.einsum("ok,to->tk", p["v"], x @ p["w"] + p["bias"]),
        {"w": (5, 7), "v": (7, 3), "bias": (7,)},
    ),
    "multiplied by each other first": (
        lambda p, x: x @ ((p["a"] @ p["w"]) @ p["c"]),
        {"a": (5, 2), "w": (2, 3), "c": (3, 7)},
    ),
    "an einsum of three": (
        lambda p, x: jnp.einsum("ti,io,ok->tk", x, p["w"], p["v"]),
        {"w": (5, 7), "v": (7, 3)},
    ),
    "regularised": (
        lambda p, x: (x @ p["w"]).sum() + jnp.sum(p["w"].T @ p["w"] - jnp.eye(7)),
        {"w": (5, 7)},
    ),
    "quantised straight through": (
        lambda p, x: x @ (p["w"] + lax.stop_gradient(jnp.round(p["w"]) - p["w"])),
        {"w": (5, 7)},
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_all_linear_takes_kernels_however_they_are_made(name):
    fn, shapes = KERNELS[name]
    params = {path: draw(i, shape) for i, (path, shape) in enumerate(shapes.items())}
    expected = {path: AxisRoles((-2,), (-1,)) for path in shapes if path != "bias"}
    assert taken(fn, params, X) == expected


class Normed(nn.Module):
    """A layer inside a norm of its kernel."""

    norm: Any

    @nn.compact
    def __call__(self, x):
        update = {"update_stats": True} if self.norm is nn.SpectralNorm else {}
        return nn.BatchNorm(use_running_average=True)(self.norm(nn.Conv(7, (3,)))(x, **update))


@pytest.mark.parametrize("norm", [nn.WeightNorm, nn.SpectralNorm])
def test_norms_of_kernels(norm):
    module = Normed(norm)
    variables = module.init(jax.random.key(1), BATCH)
    run = lambda v, x: module.apply(v, x, mutable=["batch_stats"])  # noqa: E731
    (found,) = taken(run, variables, BATCH).items()
    assert found == ("params/Conv_0/kernel", AxisRoles((-3, -2), (-1,)))


def test_a_norm_by_fixed_vectors_does_not_say_which_axes_are_in():
    fn = lambda p, x: x @ (p["w"] / (jnp.ones(7) @ p["w"].T @ jnp.ones(5))).T.T  # noqa: E731
    assert taken(fn, {"w": W}, X) == {"w": AxisRoles((-2,), (-1,))}


def test_a_table_is_taken_by_name(float64):
    params = {"table": draw(1, (11, 5), jnp.float64), "fc": draw(2, (5, 7), jnp.float64)}
    fn = lambda p, ids: jnp.tanh(p["table"][ids]) @ p["fc"]  # noqa: E731
    rule = lj.LoraRule(targets=["table"], rank=2, alpha=3.0, dtype=jnp.float64)
    tree = with_random_factors(lj.lorafy(params, [rule], trace=(fn, params, IDS)))
    assert tree["table"].roles == AxisRoles((-2,), (-1,))
    assert_close(lj.adapt(fn, strict=True)(tree, IDS), fn(lj.merge(tree), IDS), 1e-9)


def test_all_linear_says_why_it_takes_nothing():
    params = {"table": draw(1, (11, 5)), "gain": draw(2, (1, 5)), "embed": {"w": draw(3, (5, 7))}}
    fn = lambda p, ids: (p["table"][ids] * p["gain"]) @ p["embed"]["w"]  # noqa: E731
    with pytest.raises(ValueError, match="(?s)trace shows no kernel") as error:
        taken(fn, params, IDS)
    text = str(error.value)
    assert "'table': it is looked up: gather looks up along [0] at" in text
    assert "test_roles.py" in text
    assert "'gain': " in text
    assert "'embed/w': an embedding or a head, by its name" in text
    copies = jax.tree.map(jnp.copy, params)
    with pytest.raises(ValueError, match="(?s)no kernel.*'table': it is no argument"):
        lj.lorafy(copies, [lj.LoraRule(targets="all-linear")], trace=(fn, params, IDS))


def test_trace_of_modules_and_lists():
    by_call = lambda module, x: module(x)  # noqa: E731
    model = NnxModel(nnx.Rngs(1))
    assert taken(by_call, model, X).keys() == {"up/kernel", "down/kernel"}
    layers = [draw(1, (5, 7)), draw(2, (7,)), draw(3, (7, 3)), draw(4, (3,))]
    run = lambda v, x: jnp.tanh(x @ v[0] + v[1]) @ v[2] + v[3]  # noqa: E731
    assert taken(run, layers, X).keys() == {"0", "2"}
    flagged = lambda v, x, mode, scale: (x @ v if mode == "up" else x, mode, scale)  # noqa: E731
    assert taken(flagged, W, X, "up", 2.0) == {"": AxisRoles((-2,), (-1,))}
    partial = functools.partial(flagged, mode="up", scale=2.0)
    assert taken(partial, W, X) == {"": AxisRoles((-2,), (-1,))}
    with pytest.raises(TypeError, match="trace is a tuple of a function and its arguments"):
        lj.lorafy(W, [lj.LoraRule(targets="all-linear")], trace=lambda w: w)


def test_a_kernel_with_the_name_of_a_bias():
    params = {"lin": {"a": draw(1, (5, 3)), "b": draw(2, (3, 7))}, "bias": draw(3, (2, 7))}
    fn = lambda p, x: x @ p["lin"]["a"] @ p["lin"]["b"] + p["bias"][1]  # noqa: E731
    assert taken(fn, params, X).keys() == {"lin/a", "lin/b"}
    assert taken(fn, params, X, targets=".*").keys() == {"lin/a", "lin/b"}
    with pytest.raises(ValueError, match="since trace shows none: the function never multiplies"):
        taken(fn, params, X, targets=["bias"])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv(7, (3,)), (2, 13, 5)), (nn.ConvTranspose(7, (3, 2)), (2, 7, 6, 5))],
)
def test_a_convolution_with_the_roles_of_its_name_tells_of_trace(layer, shape):
    x = draw(9, shape)
    params = layer.init(jax.random.key(1), x)["params"]
    run = lambda p, x: layer.apply({"params": p}, x)  # noqa: E731
    tree = lj.lorafy(params, [lj.LoraRule(targets="all-linear", rank=2)])
    with pytest.raises(lj.RoleError, match=r"(?s)'kernel'.*batch.*trace=\(fn, params, x\)"):
        lj.adapt(run)(tree, x)


def test_recurrent_kernels_have_the_roles_of_their_names():
    rnn = nn.RNN(nn.OptimizedLSTMCell(7))
    params = rnn.init(jax.random.key(1), BATCH)["params"]
    run = lambda p, x: rnn.apply({"params": p}, x)  # noqa: E731
    tree = lj.lorafy(params, [lj.LoraRule(targets="all-linear", rank=2)])
    seen = taken(run, params, BATCH)
    assert {path: AxisRoles((-2,), (-1,)) for path in lj.split(tree)[0]} == seen
    assert len(seen) == 8


def test_lorafy_takes_what_trace_shows():
    params = {"lin": {"weight": draw(1, (7, 5))}, "bias": draw(2, (7,))}  # [out, in]

    def fn(params, x):
        return x @ params["lin"]["weight"].T + params["bias"]

    rules = [lj.LoraRule(targets="all-linear", rank=2, alpha=3.0)]
    tree = with_random_factors(lj.lorafy(params, rules, trace=(fn, params, X)))
    assert tree["lin"]["weight"].a.shape == (2, 5)
    assert_close(lj.adapt(fn, strict=True)(tree, X), fn(lj.merge(tree), X), 1e-5)
    with pytest.raises(ValueError, match="never multiplies by it.*in_axes"):
        lj.lorafy(
            params, [lj.LoraRule(targets=["lin"])], trace=(lambda p, x: x + p["bias"][0], params, X)
        )
    with pytest.raises(ValueError, match="matched by identity"):
        lj.lorafy(
            jax.tree.map(jnp.copy, params), [lj.LoraRule(targets=["lin"])], trace=(fn, params, X)
        )


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
    tree = lj.lorafy(params, [lj.LoraRule(targets=["layers"], rank=2)])

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

    rule = lj.LoraRule(targets=["w"], rank=2, alpha=3.0, dtype=jnp.float64)
    tree = with_random_factors(lj.lorafy({"w": draw(1, (5, 7), jnp.float64)}, [rule]))
    fn = lambda p, x: matmul(x, p["w"])  # noqa: E731
    x = draw(2, (3, 5), jnp.float64)
    run = lj.adapt(fn, strict=True, primitives={"matmul": factored})
    assert_close(run(tree, x), fn(lj.merge(tree), x), 1e-9)
    with pytest.raises(lj.MergeError, match="custom_vjp"):
        lj.adapt(fn, strict=True)(tree, x)
    by_name = lambda x, w, **params: [x @ w.merged()]  # noqa: E731
    run = lj.adapt(lambda p, x: x @ p["w"], primitives={"dot_general": by_name})
    assert np.allclose(run(tree, x), x @ lj.merge(tree)["w"])
