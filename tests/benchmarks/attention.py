"""One layer's attention: ours, ``jax.nn.dot_product_attention`` and torch's, by length.

    python tests/benchmarks/attention.py [--seq 512 2048] [--block 64:4 128:8] [--bidirectional]

SmolLM2-135M's heads (9 of queries, 3 of keys and values, 64 wide), batch 1, fp32, causal. All take
turns: compare the ratios within a run, not seconds across runs. ``--block`` tries other blocks and
spans of ``Blockwise``. Compiled temporaries are those of forward and backward. Torch comes with the
extra "parity".
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lora_jax.models.layers.attend import attend
from lora_jax.models.layers.attention import AttentionInputs
from lora_jax.models.layers.blockwise import Blockwise
from lora_jax.models.layers.masks import Mask, MaskTokens

HEADS, KV_HEADS, HEAD_DIM, ROUNDS = 9, 3, 64, 7
DENSE_UP_TO = 4096  # tokens; 1.8 GB of scores and as much again for their gradients
Arrays = tuple[np.ndarray, ...]
Runs = tuple[Callable[[], Any], Callable[[], Any], str]


def ours(arrays: Arrays, causal: bool, how: Any) -> Runs:
    """Ours, with segments as in training: (forward, forward and backward, memory)."""
    slots = jnp.arange(arrays[0].shape[1], dtype=jnp.int32)
    tokens = MaskTokens(slots, slots[None], jnp.ones_like(slots)[None])

    def run(*arrays: jax.Array, tokens: MaskTokens) -> jax.Array:
        mask = Mask(queries=tokens, keys=tokens, causal=causal, aligned=True)
        return attend(AttentionInputs(*arrays, mask), attention=how)

    return both(run, arrays, tokens=tokens)


def jax_nn(arrays: Arrays, causal: bool) -> Runs:
    return both(functools.partial(jax.nn.dot_product_attention, is_causal=causal), arrays)


def both(run: Callable[..., jax.Array], arrays: Arrays, **rest: Any) -> Runs:
    def loss(*arrays: jax.Array, **rest: Any) -> jax.Array:
        return jnp.sum(run(*arrays, **rest))

    given = tuple(map(jnp.asarray, arrays))
    forward, back = (
        jax.jit(f).lower(*given, **rest).compile() for f in (run, jax.grad(loss, (0, 1, 2)))
    )
    size = back.memory_analysis().temp_size_in_bytes
    calls = [lambda f=f: jax.block_until_ready(f(*given, **rest)) for f in (forward, back)]
    return calls[0], calls[1], f"{size / 1e6:6.0f} MB"


def sdpa(arrays: Arrays, causal: bool) -> Runs:
    given = [torch.from_numpy(x.transpose(0, 2, 1, 3).copy()) for x in arrays]

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return attended()

    def attended() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            *given, is_causal=causal, enable_gqa=True
        )

    def back() -> Any:
        for x in given:
            x.requires_grad_(True)
        gradients = torch.autograd.grad(attended().sum(), given)
        for x in given:
            x.requires_grad_(False)
        return gradients

    return forward, back, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--block", nargs="*", default=[], help="block:spans, such as 64:4")
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    causal = not arguments.bidirectional
    for seq in arguments.seq:
        rng = np.random.default_rng(0)
        arrays = tuple(
            rng.standard_normal((1, seq, n, HEAD_DIM), np.float32)
            for n in (HEADS, KV_HEADS, KV_HEADS)
        )
        variants = {
            "torch SDPA": sdpa(arrays, causal),
            "blockwise": ours(arrays, causal, "blockwise"),
        }
        for text in arguments.block:
            variants[f"blockwise {text}"] = ours(
                arrays, causal, Blockwise(*map(int, text.split(":")))
            )
        if seq <= DENSE_UP_TO:
            variants["dense"] = ours(arrays, causal, "dense")
            variants["jax.nn"] = jax_nn(arrays, causal)
        report(seq, variants, arguments.rounds)


def report(seq: int, variants: dict[str, Runs], rounds: int) -> None:
    """Times all variants in turn, and prints medians and their ratios to torch's."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds + 1):
        for name, runs in variants.items():
            for i in (0, 1):
                start = time.perf_counter()
                runs[i]()
                seconds.setdefault((name, i), []).append(time.perf_counter() - start)
    medians = {key: statistics.median(times[1:]) for key, times in seconds.items()}
    print(f"{seq:,} tokens: forward, and forward and backward, beside torch")
    for name, runs in variants.items():
        took = [(medians[name, i], medians["torch SDPA", i]) for i in (0, 1)]
        columns = [f"{ours / theirs:6.2f}x ({1e3 * ours:7.1f} ms)" for ours, theirs in took]
        print(f"  {name:16s} {columns[0]} {columns[1]} {runs[2]}", flush=True)


if __name__ == "__main__":
    main()
