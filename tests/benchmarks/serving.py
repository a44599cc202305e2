"""Measures how fast `train.serve` draws: against `models.generate`, and with many adapters.

    python tests/benchmarks/serving.py --rows 32

Prints tokens a second of completions drawn side by side by SmolLM2-135M: of one adapter by
`models.generate` in one compiled loop, and by the engine, of one adapter with one slot and with
eight, and of eight: in all, and while all rows decode. Then the time to the first token of a short
prompt, alone and beside a long one.
"""

import argparse
import dataclasses
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax import models
from lora_jax.training.layout import layout_of_one_device
from train.serve.engine.adapter import Adapter, TrainingState
from train.serve.engine.base import ServedBase
from train.serve.engine.engine import Engine
from train.serve.engine.sizes import Sizes
from train.serve.protocol.requests import AdapterSpec, SampleRequest, Save

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = 64


def asked(engine: Engine, requests: Sequence[SampleRequest]) -> tuple[float, float]:
    """Returns the seconds until all samples are there, and tokens a second while all are drawn."""
    results, times, all_there = [], [[] for _ in requests], threading.Event()

    def done(result):
        results.append(result)
        if len(results) == len(requests):
            all_there.set()

    began = time.perf_counter()
    for request, mine in zip(requests, times, strict=True):
        engine.sample(request, done, lambda _, mine=mine: mine.append(time.perf_counter()))
    all_there.wait()
    end = time.perf_counter()
    assert not any(isinstance(result, Exception) for result in results), results
    full, first_end = max(mine[0] for mine in times), min(mine[-1] for mine in times)
    n_drawn = sum(full < at <= first_end for mine in times for at in mine)
    return end - began, n_drawn / max(first_end - full, 1e-9)


def started(base: ServedBase, folders: Sequence[Path], slots: int, rows: int) -> Engine:
    """Returns an engine that computes, with an adapter of each folder, a0 and so on."""
    sizes = Sizes(max_length=512, tokens=512, sequences=rows, chunk=64)
    engine = Engine(
        base, sizes, layout_of_one_device(), eos=(), text_of=lambda ids: "", slots=slots
    )
    engine.start()
    for i, folder in enumerate(folders):
        engine.adopt(f"a{i}", folder, lambda result: None)
    return engine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--times", type=int, default=3)
    given = parser.parse_args()
    model, params = models.from_pretrained(MODEL)
    base = ServedBase(model, params, MODEL, given.rank)
    adapter = base.begin(AdapterSpec(rank=given.rank, seed=0), 0)
    noise = jax.tree.map(lambda x: x + 0.001, adapter.factors)
    adapter = dataclasses.replace(adapter, factors=noise)
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(i) for i in range(8)]
        for folder in folders:
            base.write(TrainingState.begin(adapter), Save(folder, optimizer=False))
        measure(base, adapter, folders, given)


def measure(base: ServedBase, adapter: Adapter, folders: Sequence[Path], given: Any) -> None:
    """Prints the rates; see the module."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(5, 40_000, (given.rows, PROMPT))
    forward = lj.adapt(base.model.apply)
    tree = base.tree(adapter.factors, adapter.scales, base.shell)
    alone = started(base, folders[:1], 1, given.rows)
    engine = started(base, folders, 8, given.rows)

    def generated() -> tuple[float, float]:
        ends = [time.perf_counter()]
        for n in (1, given.tokens):
            out = models.generate(
                base.model,
                tree,
                jnp.array(prompts),
                max_new_tokens=n,
                eos_token_id=[],
                apply=forward,
            )
            jax.block_until_ready(out)
            ends.append(time.perf_counter())
        first, whole = np.diff(ends)
        return whole, given.rows * (given.tokens - 1) / (whole - first)

    def served(engine: Engine, n: int) -> tuple[float, float]:
        return asked(
            engine,
            [
                SampleRequest(
                    adapter=f"a{i % n}",
                    prompt=prompts[i].tolist(),
                    max_tokens=given.tokens,
                    temperature=0.0,
                )
                for i in range(given.rows)
            ],
        )

    total = given.rows * given.tokens
    ways = ("generate", "one adapter, --slots 1", "one, --slots 8", "eight")
    for time_ in range(given.times + 1):
        found = [generated(), served(alone, 1), served(engine, 1), served(engine, 8)]
        if time_ == 0:
            continue  # it compiled
        whole = [total / seconds for seconds, _ in found]
        for what, rates in (("in all", whole), ("decoding", [rate for _, rate in found])):
            each = "  ".join(f"{way} {r:.0f}/s" for way, r in zip(ways, rates, strict=True))
            print(f"{what}: {each}")
            print(
                f"  served/generate {rates[1] / rates[0]:.2f} {rates[2] / rates[0]:.2f}", end="  "
            )
            print(f"eight/one {rates[3] / rates[2]:.2f}", flush=True)
    short = SampleRequest(adapter="a0", prompt=prompts[0, :16].tolist(), max_tokens=1)
    long = SampleRequest(adapter="a1", prompt=rng.integers(5, 40_000, 480).tolist(), max_tokens=1)
    asked(engine, [long])
    for _ in range(given.times):
        by_itself, _ = asked(engine, [short])
        other = threading.Thread(target=asked, args=(engine, [long]))
        other.start()
        time.sleep(0.05)
        beside, _ = asked(engine, [short])
        other.join()
        print(
            f"first token: {by_itself:.3f} s alone, {beside:.3f} s beside a long prompt", end="  "
        )
        print(f"{beside / by_itself:.1f}x", flush=True)
    alone.close()
    engine.close()


if __name__ == "__main__":
    main()
