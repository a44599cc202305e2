"""A bias on B where a function takes the in axes of W in parts: added once, or refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.core.names import SUMMED_OVER
from tests.adapt.test_primitives import gathered_weight, mesh_of_four, rule, tensor_parallel
from tests.support import assert_close, draw, lorafied, with_random_factors

ROWS, IN, OUT = 4, 12, 8

ROWS_OF_W, ROWS_OF_X, COLUMNS_OF_X = P("m", None), P("m"), P(None, "m")


def mapped(body, w_spec=ROWS_OF_W, x_spec=ROWS_OF_X, out_spec=ROWS_OF_X):
    """A function that a mesh of four devices computes in parts."""

    def run(w, x):
        specs = (w_spec, x_spec)
        return jax.shard_map(body, mesh=mesh_of_four(), in_specs=specs, out_specs=out_spec)(w, x)

    return run


def sent_on(w, x):
    """Each device multiplies by each part of W, which the devices pass on in a ring."""
    total, here = 0, lax.axis_index("m")
    for step in range(4):
        columns = lax.dynamic_slice_in_dim(x, (here - step) % 4 * (IN // 4), IN // 4, 1)
        total = total + columns @ w
        w = lax.ppermute(w, "m", [(n, (n + 1) % 4) for n in range(4)])
    return total


def blocks_of_rows(w, x):
    def add(total, block):
        x, w = block
        return total + x @ w, None

    blocks = x.reshape(ROWS, 3, IN // 3).swapaxes(0, 1), w.reshape(3, IN // 3, OUT)
    return lax.scan(add, jnp.zeros((ROWS, OUT), x.dtype), blocks)[0]


def row_by_row(w, x):
    add = lambda k, total: total + lax.dynamic_slice_in_dim(x, k, 1, 1) * w[k]  # noqa: E731
    return lax.fori_loop(0, IN, add, jnp.zeros((ROWS, OUT), x.dtype))


def named_sums(w, x):
    """Returns sums of parts; the kernel's name says so, as in a mixture of experts."""
    return lax.psum(x @ checkpoint_name(w, SUMMED_OVER + "m"), "m")


ONCE = {
    "sums of parts with a name": mapped(named_sums, x_spec=COLUMNS_OF_X, out_spec=P()),
    "gathered over the in axis": gathered_weight,
    "gathered over the out axis": mapped(
        lambda w, x: x @ lax.all_gather(w, "m", axis=1, tiled=True), P(None, "m")
    ),
    "whole on each device": mapped(lambda w, x: x @ w, P()),
    "gathered in a loop": mapped(
        lambda w, x: lax.map(lambda x: x @ lax.all_gather(w, "m", axis=0, tiled=True), x)
    ),
}
REFUSED = {
    "sums of parts": (tensor_parallel, "dot_general"),
    "scattered sums": (
        mapped(lambda w, x: lax.psum_scatter(x @ w, "m", tiled=True), x_spec=COLUMNS_OF_X),
        "dot_general",
    ),
    "a ring": (mapped(sent_on), "dot_general"),
    "a scan over blocks of rows": (blocks_of_rows, "scan"),
    "a loop over rows": (row_by_row, "dynamic_slice"),
    "two rows": (lambda w, x: x[:, :1] * w[0] + x[:, 1:2] * w[1], "slice"),
    "a sum of products": (
        mapped(
            lambda w, x: lax.psum(jnp.sum(x[..., None] * w, axis=1), "m"),
            x_spec=COLUMNS_OF_X,
            out_spec=P(),
        ),
        "reduce_sum",
    ),
    "a convolution": (
        mapped(
            lambda w, x: lax.psum(
                lax.conv_general_dilated(
                    x[:, None], w[None], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
                )[:, 0],
                "m",
            ),
            x_spec=COLUMNS_OF_X,
            out_spec=P(),
        ),
        "conv_general_dilated",
    ),
}


@functools.cache
def halves():
    params = {
        "a": {"kernel": draw(1, (IN, OUT), jnp.float64), "bias": draw(2, (OUT,), jnp.float64)}
    }
    return lj.split(
        with_random_factors(lorafied(params, [rule(bias_on_b=True, dtype=jnp.float64)]))
    )


def program(use):
    return lambda tree, x: use(tree["a"]["kernel"], x) + tree["a"]["bias"]


@pytest.mark.parametrize("use", ONCE.values(), ids=ONCE)
def test_added_once(use, float64):
    """Values and gradients are those of one product with the merged weight."""
    adapter, base = halves()
    x = draw(3, (ROWS, IN), jnp.float64)

    def values(run):
        loss = lambda adapter, x: jnp.sum(jnp.sin(run(lj.join(adapter, base), x)))  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))

    whole = program(lambda w, x: x @ w)
    ours = values(lj.adapt(program(use), strict=True))
    both = jax.jit(lambda *args: (ours(*args), values(lambda t, x: whole(lj.merge(t), x))(*args)))
    assert_close(*both(adapter, x), 1e-9)


@pytest.mark.parametrize(("use", "primitive"), REFUSED.values(), ids=REFUSED)
def test_refused(use, primitive, float64):
    """A weight whose parts are multiplied one by one would add its bias for each."""
    tree, x = lj.join(*halves()), draw(3, (ROWS, IN), jnp.float64)
    for forward in (lj.adapt(program(use)), jax.jit(lj.adapt(program(use)))):
        with pytest.raises(lj.MergeError, match=f"meets '{primitive}.*no place for a bias on B"):
            forward(tree, x)


def test_a_scan_over_rows_of_a_weight_without_a_bias_does_not_form_it():
    """A formed weight would need the memory that LoRA saves."""
    tree = with_random_factors(lorafied({"a": {"kernel": draw(1, (IN, OUT))}}, [rule()]))
    x = draw(3, (ROWS, IN))
    run = lambda tree, x: blocks_of_rows(tree["a"]["kernel"], x)  # noqa: E731
    ours = jax.jit(lj.adapt(run, strict=True))(tree, x)
    assert_close(ours, np.asarray(x) @ np.asarray(lj.merge(tree)["a"]["kernel"]), 1e-5)


def test_refused_beside_a_weight_without_a_bias():
    """Two kernels side by side are one weight, of which one half has a bias."""
    kernels = {name: {"kernel": draw(n, (IN, OUT))} for n, name in enumerate("ab")}
    tree = lj.lorafy(kernels, [rule(["a"]), rule(["b"], bias_on_b=True)])

    def joined(kernels, x):
        both = jnp.concatenate([kernels["a"]["kernel"], kernels["b"]["kernel"]], axis=1)
        return lax.psum(x @ both, "m")

    forward = lj.adapt(mapped(joined, x_spec=COLUMNS_OF_X, out_spec=P()))
    with pytest.raises(lj.MergeError, match="meets 'dot_general'.*no place for a bias on B"):
        forward(tree, draw(3, (ROWS, IN)))
