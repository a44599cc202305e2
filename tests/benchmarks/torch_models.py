"""Which decoders of the installed transformers train by `lora_jax.torch`: a table, made by hand.

    python -m tests.benchmarks.torch_models --results models.jsonl
    python -m tests.benchmarks.torch_models --results experts.jsonl --experts
    python -m tests.benchmarks.torch_models --results models.jsonl --table
    python -m tests.benchmarks.torch_models --beside

Each model_type has a process of its own, at a tiny size with random weights: its files are read,
its logits and the gradients of a LoRA are compared with PEFT's on torch, a step is taken and
written for PEFT, and tokens are generated. `--experts` compares an adapter of experts and routers
instead, of each model that has such. Those that the file of results holds are not run again.
`--beside` compiles a Llama's step for TPUs that need not be there, as our own code and as torch's.
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PRELOAD = ["torch", "transformers", "peft", "jax", "tests.torch.checks"]
_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def decoders() -> list[str]:
    """Returns the model_types of all causal language models of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _run(model_type: str, out: str, experts: bool) -> None:
    from tests.torch.checks import compare, compare_experts, is_exact

    log = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)
    facts: dict[str, Any] = {"model_type": model_type}
    with tempfile.TemporaryDirectory() as folder:
        try:
            if experts:
                facts |= compare_experts(model_type, Path(folder))
                facts["exact"] = max(facts["logits"], facts["gradients"]) <= 1e-4
            else:
                facts |= compare(model_type, Path(folder))
                facts["exact"] = is_exact(facts)
        except Exception as error:
            first = str(error).strip().splitlines() or [""]
            facts["reason"] = f"{type(error).__name__}: {first[0][:300]}"
    Path(out).write_text(json.dumps(facts), encoding="utf-8")


def check(model_type: str, timeout: float, experts: bool = False) -> dict[str, Any]:
    """Returns the result of one model_type, which is tried in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "facts.json"
        process = context.Process(target=_run, args=(model_type, str(out), experts))
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


def markdown(results: list[dict[str, Any]], experts: dict[str, Any]) -> str:
    """Returns the tables: what trains exactly, what does not, and what was not tried.

    Args:
      results: the results of `compare`.
      experts: the results of `compare_experts`, by model_type.
    """
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "jax"))
    results = sorted(results, key=lambda facts: facts["model_type"])
    exact = [facts for facts in results if facts.get("exact")]
    lines = [
        f"Of {len(decoders())} decoders, {len(exact)} train exactly ({versions}).",
        "",
        "| model_type | logits | gradients | after a step | greedy tokens | layers | experts "
        "| kept while generating |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for facts in exact:
        layers = "stacked" if facts["stacks"] else "one by one"
        greedy = {True: "equal", False: "differ", None: "-"}[facts.get("greedy")]
        name = facts["model_type"]
        facts_of_row = (name, _numbers(facts), greedy, layers, _experts(name, experts))
        lines.append(f"| {' | '.join(facts_of_row)} | {_kept(facts.get('cache', '-'))} |")
    reasons: dict[bool, list[str]] = {True: [], False: []}  # by whether the model was compared
    for facts in results:
        if not facts.get("exact"):
            why = re.sub(r"\S*/(base|adapter)\S*", "the file", facts.get("reason", ""))
            why = why.partition(", which no compiled program")[0].replace("|", "/").rstrip(": ")
            was_compared = not why or why.startswith(_ERRORS_OF_OURS)
            why = why or f"differs: logits, gradients, after a step: {_numbers(facts, ', ')}"
            reasons[was_compared].append(f"| {facts['model_type']} | {why} |")
    lines += ["", "| model_type | why it cannot train exactly |", "|---|---|", *reasons[True]]
    lines += ["", "| model_type | why it was not tried |", "|---|---|", *reasons[False]]
    return "\n".join(lines) + "\n"


# Errors that say what lora_jax cannot do. Others come from the tiny configuration or the inputs.
_ERRORS_OF_OURS = ("TorchModelError", "WeightsError", "PeftError")


_NOT_COMPARED = ("no result", "NoMatchingPeftModuleError")  # a model without experts, for PEFT


def _experts(model_type: str, experts: dict[str, Any]) -> str:
    """Returns whether the experts and routers of a model train exactly; "-" if unknown."""
    facts = experts.get(model_type)
    if facts is None or facts.get("reason", "").startswith(_NOT_COMPARED):
        return "-"
    return "train" if facts.get("exact") else "no"


def _kept(line: str) -> str:
    """Returns the cached state of a generating model, from its `cache_line`."""
    if "cached keys and values" in line:
        return "keys and values"
    reason = line.rpartition("computed again, because ")[2].replace("|", "/")
    return "-" if line == "-" else f"whole rows: {reason}"


def _numbers(facts: dict[str, Any], between: str = " | ") -> str:
    return between.join(f"{facts[key]:.0e}" for key in ("logits", "gradients", "step"))


# The shapes of Llama-3.2-1B.
_LLAMA: dict[str, Any] = {
    **{"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "rms_norm_eps": 1e-5},
    **{"intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
}
_MACHINE = ["--topology", "v5e:2x2", "--mesh", "fsdp=4", "--batch-size", "8", "--seq-len", "2048"]


def beside() -> str:
    """Returns a table: a LoRA step of a Llama's as our own code and as torch's, by the compiler."""
    lines = [
        "| Llama | TFLOP a chip | temporaries, GiB | links, GB | the clock, ms | processor, s |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(_LLAMA), encoding="utf-8")
        command = [sys.executable, "-m", "train.plan", "--model", str(config), *_MACHINE]
        for code in ("ours", "torch"):
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            whole = [*command, "--alone", "--json", "--model-code", code]
            done = subprocess.run(whole, capture_output=True, text=True, check=True)
            took = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
            facts = json.loads(done.stdout)
            flops = facts["flops_per_chip"] / 1e12
            memory = facts["per_chip_bytes"]["temporaries"] / 2**30
            links = sum(facts["collective_bytes"].values()) / 1e9
            clock = 1e3 * facts["clocks"]["step"]["seconds"]
            numbers = f"{flops:.2f} | {memory:.2f} | {links:.2f} | {clock:.0f} | {took:.0f}"
            lines.append(f"| `--model-code {code}` | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="a file of JSON lines")
    parser.add_argument("--beside", action="store_true", help="compare a Llama's step with ours")
    parser.add_argument("--experts", action="store_true", help="compare adapters of experts")
    parser.add_argument("--of-experts", type=Path, help="the results of --experts, for the table")
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
        lines = asked.of_experts.read_text(encoding="utf-8") if asked.of_experts else ""
        experts = {facts["model_type"]: facts for facts in map(json.loads, lines.splitlines())}
        print(markdown(list(results.values()), experts))
        return
    for name in asked.types or decoders():
        if name in results:
            continue
        facts = results[name] = check(name, asked.timeout, asked.experts)
        with asked.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")
        word = "exact" if facts.get("exact") else facts.get("reason", "differs")
        print(f"{len(results)}: {name}: {word}", flush=True)


if __name__ == "__main__":
    main()
