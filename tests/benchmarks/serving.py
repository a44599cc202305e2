"""Measures how fast `train.serve` draws: against `models.generate`, and with many adapters.

    python tests/benchmarks/serving.py --rows 32

Prints tokens a second of completions drawn side by side by SmolLM2-135M: of one adapter by
`models.generate` in one compiled loop, and by the engine, of one and of eight adapters; then the
time to the first token of a short prompt, alone and beside a long one.
"""

import argparse
import threading
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax import models
from lora_jax.training.layout import one_device
from train.serve.engine.base import Base, Training
from train.serve.engine.engine import Engine
from train.serve.engine.sizes import Sizes
from train.serve.requests import AdapterSpec, Sample

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = 64


def asked(engine: Engine, requests: Sequence[Sample]) -> float:
    """Returns the seconds until all samples are there."""
    results, all_there = [], threading.Event()

    def done(result):
        results.append(result)
        if len(results) == len(requests):
            all_there.set()

    began = time.perf_counter()
    for request in requests:
        engine.sample(request, done)
    all_there.wait()
    assert not any(isinstance(result, Exception) for result in results), results
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--times", type=int, default=3)
    given = parser.parse_args()
    model, params = models.from_pretrained(MODEL)
    base = Base(model, params, MODEL, given.rank)
    sizes = Sizes(max_length=512, tokens=512, sequences=given.rows, chunk=64)
    engine = Engine(base, sizes, one_device(), eos=(), text_of=lambda ids: "", slots=8)
    for i in range(8):
        adapter = base.begin(AdapterSpec(rank=given.rank, seed=i), i)
        noise = jax.tree.map(lambda x: x + 0.001, adapter.factors)
        engine._named[f"a{i}"] = type(adapter)(adapter.spec, noise, adapter.scales)
    began = time.perf_counter()
    engine._sampler.warm_up()
    print(f"compiled in {time.perf_counter() - began:.0f} s")
    engine.start()
    rng = np.random.default_rng(0)
    prompts = rng.integers(5, 40_000, (given.rows, PROMPT))
    forward = lj.adapt(model.apply)
    tree = base.tree(engine._named["a0"].factors, engine._named["a0"].scales, base.shell)
    state = Training.begin(engine._named["a0"])
    print(f"adapter: {state.adapter.size / 1e6:.1f} MB")

    def generated() -> float:
        began = time.perf_counter()
        out = models.generate(
            model,
            tree,
            jnp.array(prompts),
            max_new_tokens=given.tokens,
            eos_token_id=[],
            apply=forward,
        )
        jax.block_until_ready(out)
        return time.perf_counter() - began

    def served(n: int) -> float:
        return asked(
            engine,
            [
                Sample(
                    adapter=f"a{i % n}",
                    prompt=prompts[i].tolist(),
                    max_tokens=given.tokens,
                    temperature=0.0,
                )
                for i in range(given.rows)
            ],
        )

    generated()
    total = given.rows * given.tokens
    for _ in range(given.times):
        seconds = {"generate": generated(), "one adapter": served(1), "eight adapters": served(8)}
        rates = {name: total / s for name, s in seconds.items()}
        print("  ".join(f"{name} {rate:.0f}/s" for name, rate in rates.items()), end="  ")
        print(f"served/generate {rates['one adapter'] / rates['generate']:.2f}", end="  ")
        print(f"eight/one {rates['eight adapters'] / rates['one adapter']:.2f}")
    short = Sample(adapter="a0", prompt=prompts[0, :16].tolist(), max_tokens=1)
    long = Sample(adapter="a1", prompt=rng.integers(5, 40_000, 480).tolist(), max_tokens=1)
    for _ in range(given.times):
        alone = asked(engine, [short])
        other = threading.Thread(target=asked, args=(engine, [long]))
        other.start()
        time.sleep(0.05)
        beside = asked(engine, [short])
        other.join()
        print(f"first token: {alone:.3f} s alone, {beside:.3f} s beside a long prompt", end="  ")
        print(f"{beside / alone:.1f}x")
    engine.close()


if __name__ == "__main__":
    main()
