"""Counts of jaxprs, against products counted by hand and against the compiled HLO."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from train.plan.clock.work import work_of
from train.plan.flops.jaxpr import Count, count_flops


def shapes(*sizes):
    return [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]


def counted(fn, *sizes):
    return count_flops(jax.jit(fn).trace(*shapes(*sizes)).jaxpr)


def compiled_flops(fn, *sizes):
    return work_of(jax.jit(fn).lower(*shapes(*sizes)).compile().as_text()).flops


def layers(x, kernels):
    """Eleven layers of one product, and of a loop of three times two."""

    def inner(x, _):
        return jnp.tanh(x @ x.T @ x), None

    def layer(x, kernel):
        x, _ = lax.scan(inner, jnp.tanh(x @ kernel), None, length=3)
        return x, None

    return lax.scan(layer, x, kernels)[0]


LAYERS_FLOPS = 11 * (2 * 5 * 7 * 7 + 3 * (2 * 5 * 5 * 7 + 2 * 5 * 5 * 7))


def test_batched_products():
    scores = functools.partial(jnp.einsum, "bqhd,bkhd->bhqk")
    assert counted(scores, (2, 13, 3, 5), (2, 17, 3, 5)) == Count(2 * 2 * 3 * 13 * 17 * 5)


def test_a_scan_counts_as_often_as_it_runs():
    assert counted(layers, (5, 7), (11, 7, 7)) == Count(LAYERS_FLOPS)
    assert compiled_flops(layers, (5, 7), (11, 7, 7)) == LAYERS_FLOPS


def test_the_control_a_counter_that_forgets_how_often(monkeypatch):
    monkeypatch.setattr("train.plan.flops.jaxpr._multiply_count", lambda n, part: part)
    forgetful = counted(layers, (5, 7), (11, 7, 7)).flops
    assert forgetful == 2 * 5 * 7 * 7 + 2 * 2 * 5 * 5 * 7 != LAYERS_FLOPS


def chain(x, first, second):
    return jnp.sum(jnp.sin(jnp.sin(x @ first) @ second))


SIZES = ((5, 7), (7, 11), (11, 13))
FIRST, SECOND = 2 * 5 * 7 * 11, 2 * 5 * 11 * 13


@pytest.mark.parametrize(
    ("wrt", "remat", "expected"),
    [
        (0, False, 2 * FIRST + 2 * SECOND),
        ((0, 1, 2), False, 3 * FIRST + 3 * SECOND),
        (2, False, FIRST + 2 * SECOND),
        (0, True, 3 * FIRST + 3 * SECOND),
        ((0, 1, 2), True, 4 * FIRST + 4 * SECOND),
    ],
)
def test_gradients_and_what_they_recompute(wrt, remat, expected):
    """Each product forward, back to its input and to its kernel; with remat forward once more."""
    gradient = jax.value_and_grad(jax.checkpoint(chain) if remat else chain, wrt)
    assert counted(gradient, *SIZES) == Count(expected)


@pytest.mark.parametrize("remat", [False, True])
def test_the_gradient_of_a_scan(remat):
    def loss(x, kernels):
        def layer(x, kernel):
            return jnp.sin(jnp.sin(x @ kernel) @ kernel.T), None

        body = jax.checkpoint(layer) if remat else layer
        return jnp.sum(lax.scan(body, x, kernels)[0])

    sizes, once = ((5, 7), (3, 7, 11)), 3 * 2 * (2 * 5 * 7 * 11)
    gradient = jax.value_and_grad(loss, (0, 1))
    assert counted(gradient, *sizes) == Count((3 + remat) * once)
    assert counted(gradient, *sizes).flops == compiled_flops(gradient, *sizes)


def test_a_branch_counts_as_its_costliest_side():
    def either(flag, x):
        return lax.cond(flag[0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert counted(either, (1,), (19, 19)) == Count(2 * 2 * 19**3)


def test_calls_count_once():
    @jax.custom_jvp
    def known(x):
        return x @ x

    @known.defjvp
    def _(primals, tangents):
        (x,), (t,) = primals, tangents
        return known(x), t @ x + x @ t

    @jax.custom_vjp
    def backwards(x):
        return x @ x

    backwards.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))

    def calls(x):
        return known(x) + backwards(x) + jax.jit(known)(x) + jax.checkpoint(known)(x)

    assert counted(calls, (7, 7)) == Count(4 * 2 * 7**3)
    vectors = jax.value_and_grad(lambda x: jnp.sum(backwards(x)))
    assert counted(vectors, (7, 7)) == Count(3 * 2 * 7**3)


WINDOWS = [
    (dict(window_strides=(1,), padding=[(0, 0)]), 21 * 5),
    (dict(window_strides=(2,), padding=[(0, 0)]), 11 * 5),
    (dict(window_strides=(1,), padding=[(2, 2)]), 25 * 5 - 2 * (2 + 1)),
    (dict(window_strides=(1,), padding=[(0, 0)], rhs_dilation=(3,)), 13 * 5),
    (dict(window_strides=(1,), padding=[(0, 0)], lhs_dilation=(2,)), 23 * 3 + 22 * 2),
]


@pytest.mark.parametrize(("window", "pairs"), WINDOWS)
def test_convolutions(window, pairs):
    """Padding and holes are no work; `pairs` is (output, kernel) along the axis, by hand."""
    conv = functools.partial(
        lax.conv_general_dilated, dimension_numbers=("NHC", "HIO", "NHC"), **window
    )
    sizes = ((2, 25, 3), (5, 3, 7))
    assert counted(conv, *sizes) == Count(2 * 2 * 3 * 7 * pairs)
    assert compiled_flops(conv, *sizes) == 2 * 2 * 3 * 7 * pairs
    gradient = jax.grad(lambda x, k: jnp.sum(jnp.sin(conv(x, k))), (0, 1))
    assert counted(gradient, *sizes).flops == compiled_flops(gradient, *sizes)


def test_a_convolution_in_groups():
    conv = functools.partial(
        lax.conv_general_dilated,
        window_strides=(1, 2),
        padding=[(1, 1), (0, 0)],
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        feature_group_count=4,
    )
    sizes = ((2, 12, 6, 9), (8, 3, 3, 5))
    assert counted(conv, *sizes) == Count(2 * 2 * 8 * 3 * (6 * 3 - 2) * (3 * 5))


def test_rows_of_a_ragged_product_count_once():
    def experts(x, kernels):
        return lax.ragged_dot(x, kernels, jnp.array([4, 0, 13], jnp.int32))

    sizes, once = ((17, 5), (3, 5, 7)), 2 * 17 * 5 * 7
    assert counted(experts, *sizes) == Count(once)
    gradient = jax.value_and_grad(lambda x, k: jnp.sum(jnp.sin(experts(x, k))), (0, 1))
    assert counted(gradient, *sizes) == Count(3 * once)


@pytest.mark.parametrize("axes", [("a", "b"), ("a",)])
def test_a_shard_map_counts_on_each_device_of_its_manual_axes(axes):
    """Its body has a part of the rows; over an axis that no row is spread on, work is repeated."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def apart(x, kernel):
        return jax.shard_map(
            lambda x, kernel: x @ kernel,
            mesh=mesh,
            in_specs=(P("a"), P()),
            out_specs=P("a"),
            axis_names=set(axes),
        )(x, kernel)

    repeated = math.prod(mesh.shape[axis] for axis in axes if axis != "a")
    assert counted(apart, (6, 5), (5, 7)) == Count(repeated * 2 * 6 * 5 * 7)


def test_what_runs_nobody_knows_how_often_counts_once():
    def until(x):
        return lax.while_loop(lambda x: jnp.sum(x @ x) < 9, lambda x: x @ x @ x, x)

    assert counted(until, (7, 7)) == Count(3 * 2 * 7**3, exact=False)
    twice = counted(lambda x: lax.scan(lambda x, _: (until(x), None), x, None, length=2)[0], (7, 7))
    assert twice == Count(2 * 3 * 2 * 7**3, exact=False)
    idle = counted(lambda x: lax.while_loop(lambda x: x[0, 0] < 9, jnp.sin, x @ x), (7, 7))
    assert idle == Count(2 * 7**3), "a loop without products leaves the count exact"

    def kernel(x, out):
        out[...] = x[...] @ x[...]

    tiles = pl.pallas_call(kernel, jax.ShapeDtypeStruct((8, 8), jnp.float32), grid=(3,))
    assert counted(tiles, (8, 8)) == Count(2 * 8**3, exact=False)
