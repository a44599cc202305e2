"""Measures the time before the first step: `lorafy(trace=)`, tracing and compiling, as ratios.

    python tests/benchmarks/trace_time.py

On abstract weights with the shapes of SmolLM2-135M, scanned, and of a plain function of 30 layers
written out one after the other. Prints medians; compare the ratios within a run.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lj
from lora_jax import models

ROUNDS = 7
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def unscanned(params: Any, x: jax.Array) -> jax.Array:
    for layer in params["layers"]:
        hidden = jax.nn.silu(x @ layer["gate"]["kernel"]) * (x @ layer["up"]["kernel"])
        x = x + hidden @ layer["down"]["kernel"]
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
    return x


def measure(make: Callable[[], Callable[..., Any]], *args: Any) -> tuple[float, float]:
    """(milliseconds to trace, seconds to compile), medians; a new function each time."""
    traces, compiles = [], []
    for _ in range(ROUNDS):
        jax.clear_caches()
        fn = jax.jit(make())
        start = time.perf_counter()
        traced = fn.trace(*args)
        traces.append(1e3 * (time.perf_counter() - start))
        lowered = traced.lower()
        start = time.perf_counter()
        lowered.compile()
        compiles.append(time.perf_counter() - start)
    return statistics.median(traces), statistics.median(compiles)


def measure_lorafy(fn: Callable[..., Any], params: Any, x: Any) -> tuple[float, float]:
    """(milliseconds of `lorafy(trace=)`, milliseconds of `jax.make_jaxpr`), medians."""
    rules = [lj.LoraRule(targets="all-linear", rank=8)]
    key = jax.random.key(0)  # made here, because JAX compiles a program for its first key
    selections, jaxprs = [], []
    for _ in range(ROUNDS):
        # A new function each time: JAX keeps the jaxprs of known ones.
        jax.clear_caches()
        start = time.perf_counter()
        jax.make_jaxpr(lambda p, x: fn(p, x))(params, x)
        jaxprs.append(1e3 * (time.perf_counter() - start))
        jax.clear_caches()
        start = time.perf_counter()
        lj.lorafy(params, rules, key=key, trace=(lambda p, x: fn(p, x), params, x))
        selections.append(1e3 * (time.perf_counter() - start))
    return statistics.median(selections), statistics.median(jaxprs)


def report(name: str, fn: Callable[..., Any], params: Any, x: Any) -> None:
    tree = lj.lorafy(params, [lj.LoraRule(targets="all-linear", rank=8)])
    selection, jaxpr = measure_lorafy(fn, params, x)
    print(
        f"{name:20s} lorafy(trace=) {selection:4.0f} ms, make_jaxpr {jaxpr:4.0f} ms "
        f"({selection / jaxpr:.2f}x)"
    )
    plain = measure(lambda: lambda p, x: fn(p, x), params, x)
    adapted = measure(lambda: lj.adapt(lambda p, x: fn(p, x), strict=True), tree, x)
    ratios = [ours / theirs for ours, theirs in zip(adapted, plain, strict=True)]
    print(
        f"{name:20s} trace {adapted[0]:4.0f} ms, plain {plain[0]:4.0f} ms ({ratios[0]:.2f}x)"
        f"   compile {adapted[1]:.2f} s, plain {plain[1]:.2f} s ({ratios[1]:.2f}x)"
    )


def main() -> None:
    model = models.Decoder(models.DecoderConfig.from_hf(SMOLLM2))
    ids = jax.ShapeDtypeStruct((4, 128), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    report("SmolLM2, scanned", lambda p, x: model.apply({"params": p}, x), params, ids)

    def kernel(rows: int, columns: int) -> Any:
        return {"kernel": jax.ShapeDtypeStruct((rows, columns), jnp.float32)}

    layers = [
        {"gate": kernel(576, 1536), "up": kernel(576, 1536), "down": kernel(1536, 576)}
        for _ in range(30)
    ]
    x = jax.ShapeDtypeStruct((4, 128, 576), jnp.float32)
    report("30 layers, unscanned", unscanned, {"layers": layers}, x)


if __name__ == "__main__":
    main()
