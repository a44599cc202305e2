"""Which decoders of the installed transformers train by `lora_jax.torch`: a table, made by hand.

    python -m tests.benchmarks.torch_models --results models.jsonl
    python -m tests.benchmarks.torch_models --results models.jsonl --table
    python -m tests.benchmarks.torch_models --beside

Each model_type has a process of its own, at a tiny size with random weights: its files are read,
its logits and the gradients of a LoRA are compared with PEFT's on torch, a step is taken and
written for PEFT, and tokens are generated. Those that the file of results holds are not run again.
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

_PRELOAD = ["torch", "transformers", "peft", "jax", "tests.torch.checks"]
_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def decoders() -> list[str]:
    """Returns the model_types of all causal language models of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _run(model_type: str, out: str) -> None:
    from tests.torch.checks import compare, is_exact

    log = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)
    facts: dict[str, Any] = {"model_type": model_type}
    with tempfile.TemporaryDirectory() as folder:
        try:
            facts |= compare(model_type, Path(folder))
            facts["exact"] = is_exact(facts)
        except Exception as error:
            first = str(error).strip().splitlines() or [""]
            facts["reason"] = f"{type(error).__name__}: {first[0][:300]}"
    Path(out).write_text(json.dumps(facts), encoding="utf-8")


def check(model_type: str, timeout: float) -> dict[str, Any]:
    """Returns the result of one model_type, which is tried in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "facts.json"
        process = context.Process(target=_run, args=(model_type, str(out)))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            return {"model_type": model_type, "reason": f"no result after {timeout:.0f} s"}
        if not out.exists():
            return {"model_type": model_type, "reason": f"the process died ({process.exitcode})"}
        facts: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return facts


def markdown(results: list[dict[str, Any]]) -> str:
    """Returns the table, with its count."""
    exact = [facts for facts in results if facts.get("exact")]
    lines = [
        f"{len(exact)} of {len(results)} model types train exactly.",
        "",
        "| model_type | logits | gradients | after a step | greedy tokens | layers |",
        "|---|---|---|---|---|---|",
    ]
    for facts in sorted(results, key=lambda facts: (not facts.get("exact"), facts["model_type"])):
        name = facts["model_type"]
        if "reason" in facts:
            lines.append(f"| {name} | {facts['reason'].replace('|', '/')} | | | | |")
            continue
        numbers = " | ".join(f"{facts[key]:.0e}" for key in ("logits", "gradients", "step"))
        layers = "stacked" if facts["stacks"] else "one by one"
        greedy = {True: "equal", False: "differ", None: "-"}[facts.get("greedy")]
        lines.append(f"| {name} | {numbers} | {greedy} | {layers} |")
    return "\n".join(lines) + "\n"


def beside() -> str:
    """Returns a table: a LoRA step of SmolLM2-135M's shapes as our own Llama and as torch's."""
    import jax
    import jax.numpy as jnp

    import lora_jax as lj
    from lora_jax import models
    from lora_jax.hf.load import shapes_of
    from lora_jax.models.families import module_of
    from lora_jax.torch import TorchConfig, TorchModel

    fields = {
        **{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "rms_norm_eps": 1e-5},
        **{"intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
        **{"num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True},
    }
    ours, theirs = models.read_config(fields), TorchConfig.from_hf(fields)
    lines = ["| | GFLOP | temporaries, MB | s to trace | s to compile |", "|---|---|---|---|---|"]
    ids = jax.ShapeDtypeStruct((4, 128), jnp.int32)
    for remat in (False, True):
        for name, model in (
            ("our Llama", module_of(ours, jnp.float32, jnp.float32, remat=remat)),
            ("transformers' Llama", TorchModel(theirs, remat=remat)),
            (
                "the same, unrolled",
                TorchModel(dataclasses.replace(theirs, scan=False), remat=remat),
            ),
        ):
            shapes = shapes_of(models.key_table(model.config), jnp.float32)
            rules = [lj.LoraRule(targets="all-linear", rank=8)]
            abstract = jax.eval_shape(functools.partial(lj.lorafy, rules=rules), shapes)
            adapter, base = lj.split(abstract)
            forward = lj.adapt(model.apply)

            def loss(adapter: Any, base: Any, ids: Any, forward: Any = forward) -> Any:
                logits = forward({"params": lj.join(adapter, base)}, ids)
                logp = jax.nn.log_softmax(logits[:, :-1])
                return -jnp.mean(jnp.take_along_axis(logp, ids[:, 1:, None], axis=2))

            began = time.perf_counter()
            lowered = jax.jit(jax.grad(loss)).lower(adapter, base, ids)
            traced = time.perf_counter() - began
            compiled = lowered.compile()
            took = time.perf_counter() - began - traced
            flops = float(lowered.cost_analysis()["flops"]) / 1e9
            memory = compiled.memory_analysis().temp_size_in_bytes / 1e6
            word = f"{name}{', recomputed' if remat else ''}"
            lines.append(f"| {word} | {flops:.0f} | {memory:.0f} | {traced:.1f} | {took:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="a file of JSON lines")
    parser.add_argument("--beside", action="store_true", help="compare a Llama's step with ours")
    parser.add_argument("--types", nargs="*", help="model_types; all by default")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for each")
    parser.add_argument("--table", action="store_true", help="print the table of the results")
    asked = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", _FLAGS)
    if asked.beside:
        print(beside())
        return
    text = asked.results.read_text(encoding="utf-8") if asked.results.exists() else ""
    results = {facts["model_type"]: facts for facts in map(json.loads, text.splitlines())}
    if asked.table:
        print(markdown(list(results.values())))
        return
    for name in asked.types or decoders():
        if name in results:
            continue
        facts = results[name] = check(name, asked.timeout)
        with asked.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")
        word = "exact" if facts.get("exact") else facts.get("reason", "differs")
        print(f"{len(results)}: {name}: {word}", flush=True)


if __name__ == "__main__":
    main()
