"""Random functions that move, mix and multiply the examples of a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax import lax


@st.composite
def functions(pick: Any) -> tuple[Callable[..., Any], str]:
    """Random functions of (weights [4, 4], x) that move, mix and multiply activations.

    All axes have the size of the batch, or divide it, so that only their order tells them apart.
    """
    one = st.tuples(st.sampled_from(_NAMES), st.integers(0, 3), st.integers(0, 3))
    steps = pick(st.lists(one, min_size=2, max_size=6))

    def fn(p: Any, x: jax.Array) -> jax.Array:
        y = x
        for name, i, j in steps:
            y = _STEPS[name](p, x, y, i % y.ndim, j % y.ndim) / 2
        return jnp.tanh(y)

    return fn, str(steps)


def _by(p: Any, y: jax.Array, i: int) -> jax.Array:
    """Returns y times a weight along an axis of size 4; y where it has another size."""
    if y.shape[i] != 4:
        return y
    return jnp.moveaxis(jnp.tensordot(y, p["one"], ((i,), (0,))), -1, i)


def _merged(y: jax.Array, i: int) -> jax.Array:
    at = min(i, y.ndim - 2)
    return y if y.ndim < 2 else y.reshape(*y.shape[:at], -1, *y.shape[at + 2 :])


def _split(y: jax.Array, i: int, by: int) -> jax.Array:
    n = y.shape[i]
    return y if n % by or y.ndim > 4 else y.reshape(*y.shape[:i], by, n // by, *y.shape[i + 1 :])


def _taken(y: jax.Array, i: int, j: int) -> jax.Array:
    """Looks up along one axis by indices that vary along another."""
    n = y.shape[i]
    index = jnp.argmax(jnp.moveaxis(y, j, 0).reshape(y.shape[j], -1), 1) % n
    if i == j:
        return jnp.take(y, index, axis=i)
    shape = [y.shape[j] if axis == j else 1 for axis in range(y.ndim)]
    return jnp.take_along_axis(y, index.reshape(shape), axis=i)


def _stepped(p: Any, y: jax.Array, i: int, j: int) -> jax.Array:
    """Scans over an axis with a state that starts as zeros."""
    rows = jnp.moveaxis(y, i, 0)

    def step(state: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jnp.tanh(row + (_by(p, state, j % state.ndim) if state.ndim else state))
        return state, state

    return jnp.moveaxis(lax.scan(step, jnp.zeros_like(rows[0]), rows)[1], 0, i)


def _updated(y: jax.Array, i: int, j: int) -> jax.Array:
    part = lax.slice_in_dim(y, 0, max(1, y.shape[i] // 2), axis=i)
    start = [jnp.int32(axis == i) for axis in range(y.ndim)]
    return lax.dynamic_update_slice(y, jnp.flip(part, j), start)


def _with_itself(what: Callable[..., jax.Array], y: jax.Array, i: int, j: int) -> jax.Array:
    """Returns a function of y and of y with two axes swapped, if they have one shape."""
    other = jnp.swapaxes(y, i, j)
    return what(y, other) if y.ndim == 3 and other.shape == y.shape else y


def _multiplied(y: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.einsum("abc,adc->abd", y, other)


def _looked_up(y: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.take_along_axis(y, jnp.int32(9 * jnp.abs(other)) % y.shape[1], axis=1)


def _scattered(y: jax.Array, other: jax.Array) -> jax.Array:
    places = jnp.int32(9 * jnp.abs(other[:, :, 0])) % y.shape[1]
    return jax.vmap(lambda to, at, by: to.at[at].add(by))(y, places, other)


_STEPS: dict[str, Callable[..., jax.Array]] = {
    "times a weight": lambda p, x, y, i, j: _by(p, y, i),
    "weight first": lambda p, x, y, i, j: (
        jnp.tensordot(p["one"], y, ((1,), (i,))) if y.shape[i] == 4 else y
    ),
    "looked up": lambda p, x, y, i, j: (
        y if y.ndim > 3 else p["table"].at[jnp.int32(9 * y) % 5].get(mode="clip")
    ),
    "swapped": lambda p, x, y, i, j: jnp.swapaxes(y, i, j),
    "merged": lambda p, x, y, i, j: _merged(y, i),
    "split by 4": lambda p, x, y, i, j: _split(y, i, 4),
    "split by 2": lambda p, x, y, i, j: _split(y, i, 2),
    "normalised": lambda p, x, y, i, j: y - y.mean(i, keepdims=True),
    "summed": lambda p, x, y, i, j: y.sum(i) if y.ndim > 1 else y,
    "sorted": lambda p, x, y, i, j: jnp.sort(y, axis=i),
    "accumulated": lambda p, x, y, i, j: jnp.cumsum(y, axis=i),
    "flipped": lambda p, x, y, i, j: jnp.flip(y, i),
    "rolled": lambda p, x, y, i, j: jnp.roll(y, 1, axis=i),
    "doubled": lambda p, x, y, i, j: jnp.concatenate([y, y], i) if y.shape[i] < 9 else y,
    "halved": lambda p, x, y, i, j: lax.slice_in_dim(y, 0, max(1, y.shape[i] // 2), axis=i),
    "attended": lambda p, x, y, i, j: (
        jnp.moveaxis(jnp.tensordot(y, y, ((i,), (i,))).reshape(*y.sum(i).shape, -1), -1, i)
        if y.ndim < 3
        else y
    ),
    "batched": lambda p, x, y, i, j: jax.vmap(lambda a: a @ a.T if a.ndim == 2 else a, i, i)(y),
    "added to itself": lambda p, x, y, i, j: (
        y + jnp.swapaxes(y, i, j) if y.shape[i] == y.shape[j] else y
    ),
    "added to the input": lambda p, x, y, i, j: y + x if y.shape == x.shape else y,
    "added to a constant": lambda p, x, y, i, j: y + jnp.arange(y.size).reshape(y.shape) / y.size,
    "taken": lambda p, x, y, i, j: _taken(y, i, j),
    "updated": lambda p, x, y, i, j: _updated(y, i, j),
    "set": lambda p, x, y, i, j: jnp.moveaxis(jnp.moveaxis(y, i, 0).at[1:].add(0.5), 0, i),
    "in steps": lambda p, x, y, i, j: _stepped(p, y, i, j),
    "multiplied by itself": lambda p, x, y, i, j: _with_itself(_multiplied, y, i, j),
    "looked up by itself": lambda p, x, y, i, j: _with_itself(_looked_up, y, i, j),
    "scattered by itself": lambda p, x, y, i, j: _with_itself(_scattered, y, i, j),
    "expanded": lambda p, x, y, i, j: jnp.expand_dims(y, i) if y.ndim < 5 else y,
}
# Often what keeps examples apart, so that not all is declined.
_NAMES = [*_STEPS, *("times a weight", "weight first", "looked up", "swapped", "merged") * 3]
_NAMES += [name for name in _STEPS if name.endswith("by itself")] * 2
_NAMES += ["split by 4", "split by 2", "in steps", "added to the input", "expanded"] * 2
