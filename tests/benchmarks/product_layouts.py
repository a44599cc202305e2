"""Measures ways to store A and B and to write the factored product, to choose one.

    python tests/benchmarks/product_layouts.py

Times one forward and backward pass (to A and B) through scanned layers with the sizes of
SmolLM2-135M, for each way to store and to write the product, and prints it as a multiple of the
same pass without adapters (to x); compiled temporaries beside it. Compare the ratios within a
run, not seconds across runs.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LAYERS, BATCH, SEQ, D_MODEL, D_MLP, D_KV, RANK = 30, 4, 128, 576, 1536, 192, 8
KERNELS = {
    "q": (D_MODEL, D_MODEL),
    "k": (D_MODEL, D_KV),
    "v": (D_MODEL, D_KV),
    "o": (D_MODEL, D_MODEL),
    "gate": (D_MODEL, D_MLP),
    "up": (D_MODEL, D_MLP),
    "down": (D_MLP, D_MODEL),
}
FLATTENED = ("nothing", "z", "x and z")


def contract(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    """x's last axis with one of w's."""
    return lax.dot_general(x, w, (((x.ndim - 1,), (axis,)), ((), ())))


def product(a_order: str, b_order: str, flattened: str) -> Callable[..., jax.Array]:
    """xW + s·(xA)B for one way to store A ("ri" is [r, in]) and B, and to flatten operands."""

    def run(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        shape = x.shape[:-1]
        if flattened == "x and z":
            x = x.reshape(-1, x.shape[-1])
        y = contract(x, w, 0)
        z = contract(x, a, a_order.index("i")) * 2.0
        if flattened == "z":
            z = z.reshape(-1, RANK)
        delta = contract(z, b, b_order.index("r"))
        return y.reshape(*shape, -1) + delta.reshape(*shape, -1)

    return run


def factors(a_order: str, b_order: str) -> dict[str, Any]:
    keys = iter(jax.random.split(jax.random.key(0), 2 * len(KERNELS)))

    def draw(order: str, long: int) -> jax.Array:
        shape = (LAYERS, *(RANK if axis == "r" else long for axis in order))
        return jax.random.normal(next(keys), shape) * 0.05

    return {
        name: {"a": draw(a_order, n_in), "b": draw(b_order, n_out)}
        for name, (n_in, n_out) in KERNELS.items()
    }


def network(apply: Callable[[str, jax.Array, Any], jax.Array]) -> Callable[..., jax.Array]:
    def norm(x: jax.Array) -> jax.Array:
        return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        h = norm(x)
        q, k, v = (apply(name, h, weights) for name in "qkv")
        x = x + apply("o", q + jnp.concatenate([k, v, k], -1), weights)
        h = norm(x)
        hidden = jax.nn.silu(apply("gate", h, weights)) * apply("up", h, weights)
        return x + apply("down", hidden, weights), None

    return lambda x, weights: (lax.scan(layer, x, weights)[0] ** 2).mean()


def measure(step: Callable[..., Any], *args: Any) -> tuple[float, float]:
    """(median seconds of 7, megabytes of compiled temporaries)."""
    compiled = jax.jit(step).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), compiled.memory_analysis().temp_size_in_bytes / 1e6


def main() -> None:
    key = jax.random.key(1)
    base = {
        n: jax.random.normal(jax.random.fold_in(key, i), (LAYERS, *s)) / s[0] ** 0.5
        for i, (n, s) in enumerate(KERNELS.items())
    }
    x = jax.random.normal(key, (BATCH, SEQ, D_MODEL))

    plain = network(lambda name, x, weights: contract(x, weights[name], 0))
    seconds, memory = measure(lambda x, base: jax.grad(plain)(x, base), x, base)
    print(f"{'without adapters, to x':32s} 1.00x  ({seconds:.2f} s)  {memory:5.0f} MB")
    full, memory = measure(lambda x, base: jax.grad(plain, argnums=1)(x, base), x, base)
    print(f"{'full fine-tuning, to W':32s} {full / seconds:.2f}x            {memory:5.0f} MB")
    for a_order, b_order, flattened in itertools.product(("ri", "ir"), ("ro", "or"), FLATTENED):
        multiply = product(a_order, b_order, flattened)
        adapted = network(
            lambda name, x, weights, multiply=multiply: multiply(
                x, weights[0][name], weights[1][name]["a"], weights[1][name]["b"]
            )
        )
        adapter = factors(a_order, b_order)

        def step(adapter: Any, base: Any, x: jax.Array, adapted: Any = adapted) -> Any:
            return jax.grad(lambda adapter: adapted(x, (base, adapter)))(adapter)

        each, memory = measure(step, adapter, base, x)
        name = f"A [{a_order}], B [{b_order}], flat: {flattened}"
        print(f"{name:32s} {each / seconds:.2f}x            {memory:5.0f} MB")


if __name__ == "__main__":
    main()
