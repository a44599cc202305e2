"""Measures eager calls of `adapt` beside the plain function: forward, and the gradient.

    python -m tests.benchmarks.eager_calls

Prints milliseconds (medians of calls taken in turns) and their ratio, within one run.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import lora_jax as lj

RULES = [lj.LoraRule(targets="all-linear", rank=4, alpha=8.0)]
X = jnp.ones((2, 16, 32))


def layers(params: Any, x: jax.Array) -> jax.Array:
    """Eight dense layers in jnp."""
    for layer in params:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x


def attention(params: Any, x: jax.Array) -> jax.Array:
    """Four blocks of attention and MLP in jnp: some hundred operations."""
    for block in params:
        h = x - x.mean(-1, keepdims=True)
        q, k, v = (jnp.einsum("bsd,dhk->bshk", h, block[n]["kernel"]) for n in "qkv")
        scores = nn.softmax(jnp.einsum("bshk,bthk->bhst", q, k), -1)
        mixed = jnp.einsum("bhst,bthk->bshk", scores, v)
        x = x + jnp.einsum("bshk,hkd->bsd", mixed, block["o"]["kernel"])
        x = x + nn.gelu(x @ block["up"]["kernel"]) @ block["down"]["kernel"]
    return x


class Block(nn.Module):
    """A block of attention and MLP in Linen."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
        return x + nn.Dense(32)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))


def programs() -> dict[str, tuple[Callable[..., Any], Any]]:
    """Returns functions of (params, x), with their params."""
    key = jax.random.key(0)
    dense = [{"kernel": jnp.ones((32, 32)) / 32, "bias": jnp.zeros(32)} for _ in range(8)]
    shapes = {"q": (32, 4, 8), "k": (32, 4, 8), "v": (32, 4, 8), "o": (4, 8, 32)}
    shapes |= {"up": (32, 128), "down": (128, 32)}
    blocks = [
        {name: {"kernel": jax.random.normal(key, shape) / 8} for name, shape in shapes.items()}
        for _ in range(4)
    ]
    linen = nn.Sequential([Block() for _ in range(4)])
    module = nnx.Sequential(*[nnx.Linear(32, 32, rngs=nnx.Rngs(i)) for i in range(8)])
    return {
        "8 dense layers, jnp": (layers, dense),
        "4 attention blocks, jnp": (attention, blocks),
        "4 attention blocks, Linen": (linen.apply, linen.init(key, X)),
        "8 dense layers, NNX module": (lambda model, x: model(x), module),
    }


def medians(*calls: Callable[[], Any], rounds: int = 30) -> list[float]:
    """Returns the median times of calls in milliseconds; each is called twice before."""
    times: list[list[float]] = [[] for _ in calls]
    for n in range(rounds + 2):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            if n >= 2:
                found.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(found) for found in times]


def main() -> None:
    """Prints the table."""
    print(f"{'':28}{'plain':>9}{'adapt':>9}{'ratio':>7}   {'gradient':>9}{'adapt':>9}{'ratio':>7}")
    for name, (fn, params) in programs().items():
        tree = lj.lorafy(params, RULES, trace=(fn, params, X))
        run = lj.adapt(fn, strict=True)
        adapter, base = lj.split(tree)
        of_all = jax.grad(lambda p, fn=fn: fn(p, X).sum(), allow_int=True)
        of_adapter = jax.grad(lambda a, run=run, base=base: run(lj.join(a, base), X).sum())
        plain, ours = medians(lambda: fn(params, X), lambda: run(tree, X))  # noqa: B023
        grad, our_grad = medians(
            lambda: of_all(params),  # noqa: B023
            lambda: of_adapter(adapter),  # noqa: B023
            rounds=10,
        )
        print(
            f"{name:28}{plain:9.2f}{ours:9.2f}{ours / plain:7.2f}   "
            f"{grad:9.2f}{our_grad:9.2f}{our_grad / grad:7.2f}"
        )


if __name__ == "__main__":
    main()
