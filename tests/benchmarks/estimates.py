"""Estimates steps and tokens of several models on TPUs by the compiler's clock.

    python -m tests.benchmarks.estimates [CASE …]

Prints the rows of tables, in ms, as `train.plan --json` has them; no chip measured them. A row
takes some minutes. Needs the extra "tpu".
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.models.test_published import PUBLISHED

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
GPT_OSS_20B = PUBLISHED["gpt-oss-20b"] | {
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            *("model.layers.*.self_attn", "model.layers.*.mlp.router"),
            *("model.embed_tokens", "lm_head"),
        ],
    }
}


class Case(NamedTuple):
    """A step or a token to estimate: what it is in words, the model, and `train.plan`'s options."""

    title: str
    model: dict[str, Any]
    options: str


ALL = "--targets all-linear"
SLICE = f"--topology v5e:4x4 --mesh fsdp=16 {ALL}"
CHIP = f"--topology v5e:1x1 --batch-size 1 {ALL}"
TOKEN = f"{CHIP} --quantize int8 --seq-len 1024 --decode-rows 8 --decode-adapters"
STEPS = {
    "8b-2048": Case(
        "Llama-3.1-8B, bf16, v5e 4×4, fsdp=16, 16 × 2,048",
        LLAMA_8B,
        f"{SLICE} --batch-size 16 --seq-len 2048",
    ),
    "8b-8192": Case(
        "Llama-3.1-8B, bf16, v5e 4×4, fsdp=16, 16 × 8,192",
        LLAMA_8B,
        f"{SLICE} --batch-size 16 --seq-len 8192",
    ),
    "nf4-2048": Case(
        "Llama-3.1-8B, nf4, one v5e, 1 × 2,048", LLAMA_8B, f"{CHIP} --quantize nf4 --seq-len 2048"
    ),
    "nf4-8192": Case(
        "Llama-3.1-8B, nf4, one v5e, 1 × 8,192", LLAMA_8B, f"{CHIP} --quantize nf4 --seq-len 8192"
    ),
    "qwen3-30b": Case(
        "Qwen3-30B-A3B, bf16, v5e 4×4, expert=4, fsdp=4, 16 × 2,048",
        QWEN3_30B,
        f"--topology v5e:4x4 --mesh expert=4,fsdp=4 --batch-size 16 --seq-len 2048 {ALL}",
    ),
    "gpt-oss-20b": Case(
        "gpt-oss-20b as shipped (MXFP4), one v5e, 1 × 2,048, attention's layers",
        GPT_OSS_20B,
        "--topology v5e:1x1 --batch-size 1 --seq-len 2048 --targets q_proj k_proj v_proj o_proj",
    ),
    "grpo": Case(
        "GRPO, Llama-3.1-8B, bf16, v5e 4×4, fsdp=16, 128 completions of 128, groups of 8 over 512",
        LLAMA_8B,
        f"{SLICE} --task grpo --group 8 --max-new-tokens 128 --batch-size 128 --seq-len 640",
    ),
}
TOKENS = {
    "token-base": Case("the base alone", LLAMA_8B, f"{TOKEN} 0"),
    "token-one": Case("one adapter", LLAMA_8B, f"{TOKEN} 1"),
    "token-eight": Case("eight adapters, mixed", LLAMA_8B, f"{TOKEN} 8"),
}
TIMES = ("fusions", "kernels", "uncovered", "seconds")


def planned(case: Case) -> dict[str, Any]:
    """Returns a case's plan, as `train.plan --json` has it; {} if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(case.model))
        words = ("--model", folder, "--rank", "16", "--remat", "auto", "--alone", "--json")
        command = [sys.executable, "-m", "train.plan", *words, *case.options.split()]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return dict(json.loads(run.stdout)) if run.stdout.strip() else {}


def step_row(case: Case, made: dict[str, Any]) -> str:
    """Returns a line of the table of steps: policy, memory, times, MFU, and the largest groups."""
    clock = made.get("clocks", {}).get("step")
    if not clock:
        return f"| {case.title} | {made.get('refused') or 'no estimate'} |"
    groups: dict[str, float] = {}
    for part in clock["groups"]:
        groups[part["group"]] = groups.get(part["group"], 0.0) + part["seconds"]
    largest = sorted(groups.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{name} {1e3 * seconds:,.0f}" for name, seconds in largest)
    policy = next(rung["remat"] for rung in made["ladder"] if rung["chosen"])
    cells = [
        case.title,
        f"{policy}, {made['per_chip_bytes']['total'] / 2**30:.2f}",
        *(f"{1e3 * clock[name]:,.0f}" for name in TIMES),
        "–" if clock["mfu"] is None else f"{100 * clock['mfu']:.1f} %",
        shares,
    ]
    return f"| {' | '.join(cells)} |"


def token_row(case: Case, made: dict[str, Any]) -> str:
    """Returns a line of the table of tokens: GB read, floor, estimate, kernels, and the ratio."""
    token = made.get("token")
    if not token or not token["seconds"]:
        return f"| {case.title} | {(token or {}).get('refused') or 'no estimate'} |"
    floor, seconds = token["floor_seconds"], token["seconds"]
    kernels = 1e3 * token["clock"]["kernels"]
    numbers = (token["bytes"] / 1e9, 1e3 * floor, 1e3 * seconds, kernels, seconds / floor)
    return f"| {case.title} | {' | '.join(f'{number:.2f}' for number in numbers)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join([*STEPS, *TOKENS]))
    asked = parser.parse_args().cases or [*STEPS, *TOKENS]
    if unknown := set(asked) - {*STEPS, *TOKENS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; {', '.join([*STEPS, *TOKENS])}")
    steps, tokens = ([name for name in asked if name in of] for of in (STEPS, TOKENS))
    if steps:
        columns = "remat, GiB | fusions | kernels, assumed | links uncovered, assumed | together"
        print(f"| a step, ms a device | {columns} | MFU | by groups |\n|{'---|' * 8}")
    for name in steps:
        print(step_row(STEPS[name], planned(STEPS[name])), flush=True)
    if tokens:
        columns = "GB read | floor | estimate | of it kernels, assumed | times the floor"
        print(f"\n| a token of 8 rows, int8, ms | {columns} |\n|{'---|' * 6}")
    for name in tokens:
        print(token_row(TOKENS[name], planned(TOKENS[name])), flush=True)


if __name__ == "__main__":
    main()
