"""Leaves that "all-linear" selects if the axis roles come from `trace`."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import lora_jax as lj
from lora_jax.core.axes import AxisRoles
from lora_jax.core.paths import flatten_with_paths
from tests.support import (
    NnxModel,
    array,
    assert_close,
    draw,
    numpy_init,
    variables_of,
    with_random_factors,
)

X = draw(9, (13, 5))
IDS = array([[3, 0, 9], [10, 3, 1]])
BATCH = draw(8, (2, 13, 5))
W = draw(1, (5, 7))
BACK = draw(2, (7, 5))


def taken(fn, params, *args, targets="all-linear"):
    """The paths that a rule takes, with the roles that are read by looking."""
    rule = lj.LoraRule(targets=targets, rank=2, init=numpy_init)
    tree = lj.lorafy(params, [rule], trace=(fn, params, *args))
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
    "a codebook": (lambda p, x: p["x"][jnp.argmax(x @ p["x"].T, -1)] @ p["w"], (11, 5), X),
    "gain of columns": (lambda p, x: x @ (p["x"] * p["w"] / norm(p["w"])), (1, 7), X),
    "gain of rows": (lambda p, x: x @ (p["x"] * p["w"]), (5, 1), X),
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
    "positions of an arange": (lambda p, x: (x + p["x"][jnp.arange(13)]) @ p["w"], (17, 5), BATCH),
    "positions that multiply": (lambda p, x: (x * p["x"]) @ p["w"], (13, 5), X),
    "positions after a norm": (
        lambda p, x: (jax.nn.standardize(x) * p["back"][0] + p["x"]) @ p["w"],
        (1, 13, 5),
        BATCH,
    ),
    "positions beside others": (
        lambda p, x: ((x + p["x"]).mean(1, keepdims=True) + p["x"]) @ p["w"],
        (13, 5),
        BATCH,
    ),
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
    found = taken(fn, params, x)
    assert found.keys() - {"back"} == {"w"}
    assert found["w"] == AxisRoles((-2,), (-1,))


def test_a_stack_that_python_walks_is_a_kernel():
    fn = lambda p, x: functools.reduce(jnp.dot, p["w"], x)  # noqa: E731
    assert taken(fn, {"w": draw(1, (3, 5, 5))}, X) == {"w": AxisRoles((-2,), (-1,))}


KERNELS = {
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
    variables = variables_of(module, BATCH)
    run = lambda v, x: module.apply(v, x, mutable=["batch_stats"])  # noqa: E731
    (found,) = taken(run, variables, BATCH).items()
    assert found == ("params/Conv_0/kernel", AxisRoles((-3, -2), (-1,)))


def test_a_norm_by_fixed_vectors_does_not_say_which_axes_are_in():
    fn = lambda p, x: x @ (p["w"] / (jnp.ones(7) @ p["w"].T @ jnp.ones(5))).T.T  # noqa: E731
    assert taken(fn, {"w": W}, X) == {"w": AxisRoles((-2,), (-1,))}


def test_a_table_is_taken_by_name(float64):
    params = {"table": draw(1, (11, 5), jnp.float64), "fc": draw(2, (5, 7), jnp.float64)}
    fn = lambda p, ids: jnp.tanh(p["table"][ids]) @ p["fc"]  # noqa: E731
    rule = lj.LoraRule(targets=["table"], rank=2, alpha=3.0, dtype=jnp.float64, init=numpy_init)
    tree = with_random_factors(lj.lorafy(params, [rule], trace=(fn, params, IDS)))
    assert tree["table"].roles == AxisRoles((-2,), (-1,))
    assert_close(lj.adapt(fn, strict=True)(tree, IDS), fn(lj.merge(tree), IDS), 1e-9)


def test_all_linear_says_why_it_takes_nothing():
    params = {"table": draw(1, (11, 5)), "gain": draw(2, (1, 5)), "embed": {"w": draw(3, (5, 7))}}
    fn = lambda p, ids: (p["table"][ids] * p["gain"]) @ p["embed"]["w"]  # noqa: E731
    with pytest.raises(ValueError, match="(?s)traced function shows no kernel") as error:
        taken(fn, params, IDS)
    text = str(error.value)
    assert "'table': the function looks up rows of this leaf, where gather looks up along" in text
    assert "test_all_linear.py" in text
    assert "'gain': " in text
    assert "'embed/w': head: no other weight's product follows that of 'embed/w'" in text
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
    with pytest.raises(TypeError, match="trace must be a tuple of a function and its arguments"):
        lj.lorafy(W, [lj.LoraRule(targets="all-linear")], trace=lambda w: w)


def test_a_kernel_with_the_name_of_a_bias():
    params = {"lin": {"a": draw(1, (5, 3)), "b": draw(2, (3, 7))}, "bias": draw(3, (2, 7))}
    fn = lambda p, x: x @ p["lin"]["a"] @ p["lin"]["b"] + p["bias"][1]  # noqa: E731
    assert taken(fn, params, X).keys() == {"lin/a", "lin/b"}
    assert taken(fn, params, X, targets=".*").keys() == {"lin/a", "lin/b"}
    with pytest.raises(ValueError, match="does not show these axes: the function never multi"):
        taken(fn, params, X, targets=["bias"])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv(7, (3,)), (2, 13, 5)), (nn.ConvTranspose(7, (3, 2)), (2, 7, 6, 5))],
)
def test_a_convolution_with_the_roles_of_its_name_tells_of_trace(layer, shape):
    x = draw(9, shape)
    params = variables_of(layer, x)["params"]
    run = lambda p, x: layer.apply({"params": p}, x)  # noqa: E731
    tree = lj.lorafy(params, [lj.LoraRule(targets="all-linear", rank=2, init=numpy_init)])
    with pytest.raises(lj.RoleError, match=r"(?s)'kernel'.*batch.*trace=\(fn, params, x\)"):
        lj.adapt(run)(tree, x)


def test_recurrent_kernels_have_the_roles_of_their_names():
    rnn = nn.RNN(nn.OptimizedLSTMCell(7))
    params = variables_of(rnn, BATCH)["params"]
    run = lambda p, x: rnn.apply({"params": p}, x)  # noqa: E731
    tree = lj.lorafy(params, [lj.LoraRule(targets="all-linear", rank=2, init=numpy_init)])
    seen = taken(run, params, BATCH)
    assert {path: AxisRoles((-2,), (-1,)) for path in lj.split(tree)[0]} == seen
    assert len(seen) == 8


def test_a_layer_of_one_output_is_a_kernel():
    params = {"up": draw(1, (5, 7)), "down": draw(2, (7, 1))}
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]  # noqa: E731
    rules = [lj.LoraRule(targets="all-linear", rank=2, init=numpy_init)]
    tree = lj.lorafy(params, rules, trace=(fn, params, X))
    assert {name for name, leaf in tree.items() if lj.is_node(leaf)} == {"up", "down"}
