"""Times a DPO step beside TRL's, with prompts that completions share and without.

    python -m tests.benchmarks.preferences [--rounds N] [--tiny]

SmolLM2-135M's shapes with random weights, 4 pairs of 250 + 58 tokens, r = 16 on all linear layers,
fp32, AdamW, on this machine's CPU. TRL's step computes the reference's log-probabilities, as its
default is; ours are cached, as is train.dpo's, and the reference's pass is timed by itself. The
ways take turns in one process: compare the ratios within a run. Needs the extra "parity".
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import lora_jax as lj
from lora_jax import models, training
from lora_jax.training import losses
from lora_jax.training.step import init_state, make_step
from tests.benchmarks.shapes import SMOLLM2
from tests.train.tiny import CONFIG, tokenizer, write_model

SHAPES = CONFIG | SMOLLM2
PAIRS, PROMPT, COMPLETION, RANK = 4, 250, 58, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Run = Callable[[], float]


def rows() -> list[dict[str, str]]:
    """Returns pairs; a token is a letter, and a completion ends with a token more."""
    rng = np.random.default_rng(0)

    def text(n: int) -> str:
        return "".join(rng.choice(list("abcdefgh "), n - 1)) + "."

    sides = ("chosen", "rejected")
    return [
        {"prompt": text(PROMPT), **{side: f"{side[0]}{text(COMPLETION - 2)}" for side in sides}}
        for _ in range(PAIRS)
    ]


def ours(folder: Path) -> dict[str, Run]:
    """Returns functions that take a step, or run the reference, and return the loss."""
    model, params = models.from_pretrained(folder)
    tree = lj.lorafy(params, [lj.LoraRule(targets=TARGETS, rank=RANK, alpha=2 * RANK)])
    adapter, base = lj.split(tree)
    schedule = optax.constant_schedule(1e-4)
    optimizer, forward = optax.adamw(schedule), lj.adapt(model.apply)
    loss = losses.pair_loss("sigmoid", chunk=None)
    step = make_step(forward, optimizer, schedule, dropout=False, loss=loss)
    runs: dict[str, Run] = {}
    for name, share_prompt in (("prompts shared", True), ("unshared", False)):
        how = {"seq_len": PROMPT + COMPLETION, "share_prompt": share_prompt}
        examples = training.pairs(rows(), tokenizer(None), **how)
        batch = {k: jax.numpy.asarray(x) for k, x in examples.take(np.arange(PAIRS)).items()}
        reference = jax.jit(
            lambda params, batch: losses.sequence_logps(model.apply, params, batch, chunk=None)
        )
        batch["reference"] = reference(params, batch).policy.reshape(PAIRS, 2)
        copy = jax.tree.map(jax.numpy.copy, adapter)  # each way donates its own
        carry = [init_state(copy, optimizer, jax.random.key(0))]
        parts = {key: x[None] for key, x in batch.items()}
        compiled = jax.jit(step, donate_argnums=0).lower(carry[0], base, parts).compile()

        def run(carry: Any = carry, compiled: Any = compiled, parts: Any = parts) -> float:
            carry[0], metrics = compiled(carry[0], base, parts)
            return float(metrics["loss"])

        def refer(reference: Any = reference, batch: Any = batch) -> float:
            return float(reference(params, batch).policy.sum())

        runs |= {name: run, f"reference, {name}": refer}
    return runs


def theirs(folder: Path) -> Run:
    """Returns a function that takes a step of TRL's trainer, and returns the loss."""
    import peft
    import torch
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    how = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": []}
    trainer = DPOTrainer(
        model,
        args=DPOConfig(folder / "trl", per_device_train_batch_size=PAIRS, **how),
        train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer(None),
        peft_config=peft.LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM"
        ),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trains = [x for x in trainer.model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=1e-4)

    def run() -> float:
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that it runs")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    fields = {} if options.tiny else SHAPES
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), None, scale=0.5, **fields)
        runs = {**ours(Path(folder)), "TRL": theirs(Path(folder))}
    first = {name: run() for name, run in runs.items()}
    print("losses of the first step:", {k: round(x, 6) for k, x in first.items() if "," not in k})
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    for name, each in seconds.items():
        ratios = [x / y for x, y in zip(each, seconds["TRL"], strict=True)]
        print(
            f"{name:28s} {statistics.median(each):8.2f} s, {statistics.median(ratios):.2f} of "
            f"TRL's ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
