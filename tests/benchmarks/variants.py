"""Measures each variant of LoRA on SmolLM2-135M: step time and compiled temporaries over LoRA's.

    python tests/benchmarks/variants.py [--memory-only] [--peft] [--rounds N]

Batch 4 × 128, r = 8 on all linear layers, fp32, AdamW, without and with rematerialisation. The
variants take turns: compare the ratios within a run, not seconds across runs. ``--peft`` also
times DoRA over LoRA in PEFT on torch, and needs the extra "parity".
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax import init, models

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BATCH, SEQ = 4, 128
EMBEDDING = lj.LoraRule(targets=["embed_tokens"], rank=8, alpha=16)


def rule(**changes: Any) -> lj.LoraRule:
    return lj.LoraRule(**{"targets": "all-linear", "rank": 8, "alpha": 16} | changes)


VARIANTS: dict[str, list[Any]] = {
    "LoRA": [rule()],
    "LoRA+": [rule()],
    "rsLoRA": [rule(scaling="alpha/sqrt(rank)")],
    "DoRA": [rule(dora=True)],
    "LoRA-FA": [rule(freeze_a=True)],
    "LoRA-XS": [rule(xs=True)],
    "VeRA": [rule(vera=True, alpha=None)],
    "TinyLoRA": [rule(tinylora=True, rank=2, alpha=None)],
    "PiSSA, OLoRA": [rule(init=init.fast_pissa())],
    "norms": [lj.TrainRule(targets=r".*norm/scale"), rule()],
    "100 tokens": [lj.TrainRule(targets=["embed_tokens"], rows=range(100)), rule()],
    "embedding": [EMBEDDING, rule()],
    "full fine-tuning": [lj.TrainRule(targets=".*")],
}


def optimizer_of(name: str, tree: Any) -> optax.GradientTransformation:
    adamw = optax.adamw(1e-4)
    if name == "LoRA+":
        return optax.chain(adamw, lj.optim.lora_plus())
    return optax.chain(lj.optim.project_b(tree), adamw) if name == "LoRA-FA" else adamw


def ours(model: Any, params: Any, name: str, ids: jax.Array) -> tuple[Callable[[], None], int]:
    """(a function that runs one step, the compiled temporaries in bytes)."""
    tree = lj.lorafy(params, VARIANTS[name])
    adapter, base = lj.split(tree)
    forward = lj.adapt(model.apply, strict=True)
    optimizer = optimizer_of(name, tree)

    def loss_of(adapter: Any, base: Any, ids: jax.Array) -> jax.Array:
        logits = forward({"params": lj.join(adapter, base)}, ids)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    def step(adapter: Any, state: Any, base: Any, ids: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(adapter, base, ids)
        updates, state = optimizer.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    carry = [adapter, optimizer.init(adapter)]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, base, ids).compile()

    def run() -> None:
        *carry[:], loss = compiled(*carry, base, ids)
        loss.block_until_ready()

    return run, compiled.memory_analysis().temp_size_in_bytes


def peft(ids: np.ndarray, use_dora: bool) -> Callable[[], None]:
    """A step in PEFT on torch, on a Llama of the same sizes with random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=use_dora)
    model = get_peft_model(LlamaForCausalLM(config), adapters)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.from_numpy(ids)

    def run() -> None:
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def timed(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The median seconds of each, in turns, the first round left out."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory-only", action="store_true", help="compile, and time nothing")
    parser.add_argument("--peft", action="store_true", help="DoRA over LoRA in PEFT as well")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="these variants")
    arguments = parser.parse_args()
    models.fetch(MODEL)
    model, params = models.from_pretrained(MODEL)
    tokens = np.random.default_rng(0).integers(0, 49152, (BATCH, SEQ))
    ids = jnp.asarray(tokens, jnp.int32)
    for remat in (False, True):
        print("rematerialised:" if remat else "activations kept:")
        built = {name: ours(model.clone(remat=remat), params, name, ids) for name in arguments.only}
        runs = {name: run for name, (run, _) in built.items()}
        medians = {} if arguments.memory_only else timed(runs, arguments.rounds)
        for name, (_, size) in built.items():
            line = f"  {name:18s} temporaries {size / 1e6:5.0f} MB ({size / built['LoRA'][1]:.2f}x)"
            if medians:
                line += f", step {medians[name]:.2f} s ({medians[name] / medians['LoRA']:.2f}x)"
            print(line, flush=True)
    if arguments.peft:
        medians = timed({n: peft(tokens, n == "DoRA") for n in ("LoRA", "DoRA")}, arguments.rounds)
        ratio = medians["DoRA"] / medians["LoRA"]
        print(f"PEFT: DoRA {medians['DoRA']:.2f} s, LoRA {medians['LoRA']:.2f} s ({ratio:.2f}x)")


if __name__ == "__main__":
    main()
