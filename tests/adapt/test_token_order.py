"""A mask of tokens is applied to rows in its own order alone: others are followed, or refused."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from tests.support import assert_close, draw, numpy_init, with_random_factors

BATCH, SEQ, IN, OUT, HEADS = 4, 6, 10, 7, 5
SHUFFLED = np.random.default_rng(1).permutation(SEQ)
ALL_SHUFFLED = np.random.default_rng(1).permutation(BATCH * SEQ)


@functools.cache
def inputs():
    params = {"w": draw(1, (IN, OUT), jnp.float64)}
    how = {"in_axes": (0,), "out_axes": (1,), "dtype": jnp.float64, "init": numpy_init}
    tree = with_random_factors(lj.lorafy(params, [lj.LoraRule(targets=["w"], rank=2, **how)]))
    mask = np.random.default_rng(2).random((BATCH, SEQ)) < 0.5
    return params, tree, draw(3, (BATCH, SEQ, IN), jnp.float64), mask


def attended(x):
    """Attention of several heads, whose queries stay where they are."""
    heads = x.reshape(BATCH, SEQ, HEADS, -1)
    scores = jnp.einsum("bqhd,bkhd->bhqk", heads, heads)
    scores = jnp.where(jnp.tril(jnp.ones((SEQ, SEQ), bool)), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), heads).reshape(x.shape)


def step_by_step(x):
    """A recurrent layer, from the last step to the first."""
    step = lambda state, x: (jnp.tanh(state + x), state * x)  # noqa: E731
    ys = lax.scan(step, jnp.zeros((BATCH, IN), x.dtype), x.swapaxes(0, 1), reverse=True)[1]
    return ys.swapaxes(0, 1)


@jax.custom_vjp
def squared(x):
    return x * x


squared.defvjp(lambda x: (x * x, x), lambda x, g: (2 * x * g,))

FOLLOWED = {
    "as they come": lambda x: x,
    "both axes as one": lambda x: x.reshape(-1, IN),
    "moved away and back": lambda x: jnp.sin(x.transpose(2, 1, 0)).T,
    "attention": attended,
    "steps of a scan": step_by_step,
    "sums so far": lambda x: jnp.cumsum(x, axis=1),
    "features that move": lambda x: jnp.sort(x[..., ::-1][..., jnp.arange(IN)], axis=-1),
    "features by index": lambda x: jnp.take_along_axis(x, jnp.argsort(x, axis=-1), axis=-1),
    "features side by side": lambda x: jnp.concatenate([x[..., 3:], x[..., :3] - 1], axis=-1),
    "means of all tokens": lambda x: x - x.mean((0, 1)) / x.max(1, keepdims=True),
    "a table's rows": lambda x: draw(5, (11, IN), x.dtype)[jnp.abs(x[..., 0]).astype(int) % 11],
    "a branch": lambda x: lax.cond(x.sum() > 0, jnp.sin, lambda x: 2 * x, x),
    "a loop": lambda x: lax.fori_loop(0, 3, lambda _, y: jnp.cos(x + y), x),
    "a derivative of its own": lambda x: squared(x),
    "a jitted function, met twice": lambda x: jax.jit(jnp.tanh)(jax.jit(jnp.tanh)(x)),
    "a vmap over the batch": jax.vmap(lambda x: x @ jnp.eye(IN, dtype=x.dtype)),
}


@pytest.mark.parametrize("before", FOLLOWED.values(), ids=FOLLOWED)
def test_followed(before, float64):
    """Each token has what the merged weight or W alone gives it, wherever it was before."""
    params, tree, x, mask = inputs()
    run = lambda params, x: before(x) @ params["w"]  # noqa: E731
    forward = lj.adapt(run, strict=True)

    def both(tree, x):
        ways = [run(weights, x).reshape(BATCH, SEQ, OUT) for weights in (lj.merge(tree), params)]
        ours = forward(lj.activate(tree, mask), x).reshape(BATCH, SEQ, OUT)
        return ours, jnp.where(mask[..., None], *ways)

    def loss(adapter, x, place):
        return jnp.sum(jnp.sin(both(lj.join(adapter, base), x)[place]))

    adapter, base = lj.split(tree)
    gradients = lambda place: jax.grad(loss, (0, 1))(adapter, x, place)  # noqa: E731
    ours, theirs = jax.jit(lambda: [(both(tree, x)[n], gradients(n)) for n in (0, 1)])()
    assert_close(ours, theirs, 1e-9)
    if before is FOLLOWED["as they come"]:
        assert_close(forward(lj.activate(tree, mask), x), ours[0], 1e-9)  # an eager call


def in_a_scan(x):
    return lax.scan(lambda total, x: (total, x[::-1] + total), 0.0, x)[1]


def repeated(x):
    return jnp.repeat(x[:, : SEQ // 2], 2, axis=1)


REFUSED = {
    "transpose": lambda x: x.transpose(1, 0, 2).reshape(-1, IN),
    "rev": lambda x: x[:, ::-1],
    "rev ": lambda x: x.reshape(-1, IN)[::-1],
    "gather": lambda x: x[:, SHUFFLED],
    "gather ": lambda x: x + x.reshape(-1, IN)[jnp.arange(BATCH * SEQ) ^ 1].reshape(x.shape),
    "sort ": lambda x: jnp.take_along_axis(x, jnp.argsort(x, axis=1), axis=1),
    "sort": lambda x: jnp.tanh(jnp.sort(x, axis=1)),
    "slice": repeated,
    "rev  ": in_a_scan,
    "rev   ": lambda x: jax.jit(jax.checkpoint(lambda x: x[:, ::-1]))(x),
    "scatter": lambda x: jnp.zeros_like(x).at[:, SHUFFLED].set(x),
    "slice ": lambda x: jnp.concatenate([x[2:], x[:2]]),
    "reshape": lambda x: x.reshape(BATCH, 2, SEQ // 2, IN).reshape(x.shape),
    "dynamic_slice": lambda x: lax.map(lambda i: x.reshape(-1, IN)[i], ALL_SHUFFLED),
    "transpose ": lambda x: x.reshape(SEQ, BATCH, IN).swapaxes(0, 1),
}


@pytest.mark.parametrize(("primitive", "before"), REFUSED.items(), ids=REFUSED)
def test_refused(primitive, before, float64):
    """The message names the operation after which the tokens are in another order, and its line."""
    _, tree, x, mask = inputs()
    forward = lj.adapt(lambda params, x: before(x) @ params["w"])
    lines, start = inspect.getsourcelines(before)
    places = "|".join(str(start + n) for n in range(len(lines)))
    message = rf"'{primitive.strip()}' at \S*test_token_order\.py:({places})\b"
    for run in (forward, jax.jit(forward)):
        with pytest.raises(lj.TokensError, match=message):
            run(lj.activate(tree, mask), x)


def test_a_function_that_is_met_twice(float64):
    """One jitted layer, first with the tokens in order, then reversed."""
    _, tree, x, mask = inputs()
    layer = jax.jit(lambda w, x: x @ w)
    run = lambda params, x: layer(params["w"], x) + layer(params["w"], x[:, ::-1])  # noqa: E731
    with pytest.raises(lj.TokensError, match=r"'rev' at \S*test_token_order\.py"):
        lj.adapt(run)(lj.activate(tree, mask), x)


def test_what_is_no_input_in_the_order_of_the_mask(float64):
    """Rows of other inputs are refused, also where their number is that of the tokens."""
    _, tree, _, mask = inputs()
    square = lj.activate(tree, mask[:, :BATCH])
    x = draw(3, (BATCH, BATCH, IN), jnp.float64)
    forward = lj.adapt(lambda params, x: x @ params["w"])
    with pytest.raises(lj.TokensError, match="'transpose' at .*test_token_order.py"):
        lj.adapt(lambda params, x: x.swapaxes(0, 1) @ params["w"])(square, x)
    with pytest.raises(lj.TokensError, match="no argument .* first axes"):
        lj.adapt(lambda params, x: jnp.repeat(x, 2, axis=0) @ params["w"])(
            square, x[0].repeat(2, 0)
        )
    with pytest.raises(lj.TokensError, match="no argument .* first axes"):
        lj.adapt(lambda params, x: x[0] @ params["w"])(square, x[None])
    closed_over = lj.adapt(lambda params: x @ params["w"])(square)
    assert_close(closed_over, forward(square, x), 1e-6)
    equal_rows = lj.adapt(lambda params: jnp.full_like(x, 3) @ params["w"])(square)
    assert_close(equal_rows, forward(square, jnp.full_like(x, 3)), 1e-9)
    one = lj.activate(tree, mask[:, :1])  # a token for each row, as in decoding
    for use in (lambda x: x[:, 0], lambda x: x, lambda x: x.swapaxes(0, 1).reshape(-1, IN)):
        lj.adapt(lambda params, x, use=use: use(x) @ params["w"])(one, x[:, :1])
