"""Times the projections of `lora_jax.subspace`, and the parts that they were chosen for.

    python -m tests.benchmarks.subspace

Prints medians in milliseconds on this machine; leave it idle.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.subspace import fastfood
from lora_jax.subspace.fastfood import hadamard_transform

ROUNDS = 15
D = 5000
LARGE = 2**23


def milliseconds(fn: Callable[..., Any], *args: Any) -> float:
    """Returns the median time of a call, compiled."""
    compiled, found = jax.jit(fn), []
    jax.block_until_ready(compiled(*args))
    for _ in range(ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        found.append(1e3 * (time.perf_counter() - began))
    return statistics.median(found)


def butterfly(x: jax.Array) -> jax.Array:
    """Returns Hx by passes of sums and differences, as a comparison."""
    n, width = x.size, 1
    while width < n:
        pairs = x.reshape(-1, 2, width)
        x = jnp.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).reshape(n)
        width *= 2
    return x


def shuffled(key: jax.Array) -> jax.Array:
    """Returns a permutation by sorting random numbers, as a comparison."""
    return jnp.argsort(jax.random.bits(key, (LARGE,)))


def main() -> None:
    """Prints the table."""
    key, theta = jax.random.key(0), jnp.ones(D)
    for size in (10**6, 10**7):
        weights = jnp.ones(size)

        def project(theta: jax.Array, size: int = size) -> jax.Array:
            return fastfood.project(theta, key, size)

        def backward(theta: jax.Array, weights: jax.Array, project: Any = project) -> jax.Array:
            (transposed,) = jax.linear_transpose(project, theta)(weights)
            return transposed

        there, back = milliseconds(project, theta), milliseconds(backward, theta, weights)
        print(f"{size:>10,} entries, d = {D}: P {there:.0f} ms, its transpose {back:.0f} ms")
    x = jnp.ones(LARGE)
    products, passes = milliseconds(hadamard_transform, x), milliseconds(butterfly, x)
    print(f"Walsh-Hadamard at 2^23: products {products:.0f} ms, butterfly {passes:.0f} ms")
    bijection = milliseconds(lambda key: fastfood._draw_permutations(key, 1, LARGE), key)
    by_sorting = milliseconds(shuffled, key)
    print(f"permutation at 2^23: bijection {bijection:.0f} ms, argsort {by_sorting:.0f} ms")
    few, places = jnp.ones((1, 1024)), fastfood._draw_permutations(key, 1, LARGE)
    cached, read = (
        milliseconds(permute, few, places)
        for permute in (fastfood._permute_on_cpu, fastfood._permute)
    )
    print(f"permuting 2^23, of which 1,024 differ: cached {cached:.0f} ms, at random {read:.0f} ms")


if __name__ == "__main__":
    main()
