"""A training step on SmolLM2-135M: LoRA here, LoRA in PEFT, and full fine-tuning.

    python tests/benchmarks/train_step.py [--peft]
    python tests/benchmarks/train_step.py --batch 1 --seq 2048 --rounds 0 [--attention dense]

Batch 4 × 128 by default, r = 8 on all linear layers, fp32, AdamW. The variants take turns, so that
the ratios of one run compare (its seconds do not); compiled temporaries and arguments beside them.
``--rounds 0`` prints compiled memory alone. ``--peft`` needs the extra "parity".
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
from lora_jax import models

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
RULES = [lj.LoraRule(targets="all-linear", rank=8, alpha=16)]


def ours(model: Any, params: Any, rules: Any, ids: jax.Array, merged: bool = False) -> Any:
    """(a function that runs one step, a line on compiled memory)."""
    adapter, base = lj.split(lj.lorafy(params, rules))
    forward = lj.adapt(model.apply, strict=True)
    optimizer = optax.adamw(1e-4)

    def loss_of(adapter: Any, base: Any, ids: jax.Array) -> jax.Array:
        tree = lj.join(adapter, base)
        run, tree = (model.apply, lj.merge(tree)) if merged else (forward, tree)
        logits = run({"params": tree}, ids)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    def step(adapter: Any, state: Any, base: Any, ids: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(adapter, base, ids)
        updates, state = optimizer.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    carry = [adapter, optimizer.init(adapter)]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, base, ids).compile()
    memory = compiled.memory_analysis()

    def run() -> None:
        *carry[:], loss = compiled(*carry, base, ids)
        loss.block_until_ready()

    sizes = memory.temp_size_in_bytes, memory.argument_size_in_bytes
    return run, "{:5.0f} MB temporaries, {:5.0f} MB arguments".format(*(s / 1e6 for s in sizes))


def peft(params: Any, ids: np.ndarray) -> tuple[Callable[[], None], str]:
    """The same step in PEFT on torch, on a Llama of the same sizes with random weights."""
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
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(LlamaForCausalLM(config), adapters)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.from_numpy(ids)

    def run() -> None:
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peft", action="store_true", help="time PEFT on torch as well")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--seq", type=int, default=128, help="tokens a row")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each; 0 for none")
    parser.add_argument("--attention", default="auto", help="auto, dense or blockwise")
    arguments = parser.parse_args()
    models.fetch(MODEL)
    model, params = models.from_pretrained(MODEL, attention=arguments.attention)
    tokens = np.random.default_rng(0).integers(0, 49152, (arguments.batch, arguments.seq))
    ids = jnp.asarray(tokens, jnp.int32)
    variants = {
        "full fine-tuning": ours(model, params, [lj.TrainRule(targets=".*")], ids),
        "LoRA": ours(model, params, RULES, ids),
        "LoRA, rematerialised": ours(model.clone(remat=True), params, RULES, ids),
        "LoRA, W + sAB formed": ours(model, params, RULES, ids, merged=True),
    }
    if arguments.peft:
        variants["PEFT, LoRA"] = peft(params, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, (run, _) in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items() if times[1:]}
    for name, (_, memory) in variants.items():
        took = ""
        if medians:
            ratio = medians[name] / medians["full fine-tuning"]
            took = f"{ratio:.2f}x full ({medians[name]:.2f} s)  "
        print(f"{name:22s} {took}{memory}")


if __name__ == "__main__":
    main()
