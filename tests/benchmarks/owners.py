"""Measures what an owner waits beside another one's 64 completions.

    python tests/benchmarks/owners.py

The model has the shapes of SmolLM2-135M, and no trained weights: times do not depend on these.
Prints the seconds to the first token of a prompt, and between two tokens, by itself and beside the
other owner, and their ratios; at most 2.5 is wanted.
"""

import argparse
import statistics
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import models
from lora_jax.training.layout import layout_of_one_device
from train.serve.engine.base import ServedBase
from train.serve.engine.engine import Engine
from train.serve.engine.sizes import Sizes
from train.serve.protocol.requests import Client, SampleRequest

CONFIG = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def made_base(rank: int, layers: int) -> ServedBase:
    """Returns a base of small random weights."""
    model = models.Decoder(models.read_config(CONFIG | {"num_hidden_layers": layers}))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape).astype(x.dtype) * 0.02), shapes
    )
    return ServedBase(model, params, "untrained", rank)


def timed(engine: Engine, request: SampleRequest) -> list[float]:
    """Returns the seconds until each token, from the request on."""
    times: list[float] = []
    there = threading.Event()
    began = time.perf_counter()
    engine.sample(
        request, lambda result: there.set(), lambda _: times.append(time.perf_counter() - began)
    )
    there.wait()
    return times


def waits(engine: Engine, request: SampleRequest, times: int) -> tuple[float, float]:
    """Returns the median seconds to the first token, and between two tokens."""
    found = [timed(engine, request) for _ in range(times)]
    firsts = [one[0] for one in found]
    between = [float(gap) for one in found for gap in np.diff(one)]
    return statistics.median(firsts), statistics.median(between)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--times", type=int, default=5)
    given = parser.parse_args()
    sizes = Sizes(max_length=given.length, tokens=given.length, sequences=given.rows, chunk=64)
    how = {"eos": (), "text_of": lambda ids: "", "slots": given.slots}
    engine = Engine(made_base(given.rank, given.layers), sizes, layout_of_one_device(), **how)
    engine.warm_up()
    engine.start()
    rng = np.random.default_rng(0)
    prompt = rng.integers(5, 40_000, given.prompt).tolist()
    few = SampleRequest(adapter=None, prompt=prompt, max_tokens=24, client=Client("ben"))
    timed(engine, few)
    alone = waits(engine, few, given.times)
    ended = threading.Event()
    many = SampleRequest(
        adapter=None,
        prompt=prompt[::-1],
        n=64,
        max_tokens=given.length - given.prompt,
        client=Client("anna"),
    )
    end = engine.sample(many, lambda result: ended.set())
    while engine.status().drawing < given.rows:
        time.sleep(0.1)
    beside = waits(engine, few, given.times)
    assert not ended.is_set(), "the other owner's completions ended too early"
    end()
    engine.close()
    for what, one, two in zip(("first token", "between two tokens"), alone, beside, strict=True):
        print(f"{what}: {one:.3f} s alone, {two:.3f} s beside 64 completions, {two / one:.2f} x")


if __name__ == "__main__":
    main()
