"""Estimates a step of MaxText with qwix's LoRA beside ours, by the TPU compiler's clock.

    python3.12 -m venv other && other/bin/pip install "maxtext[tpu]==0.2.5" qwix==0.1.8
    python -m tests.benchmarks.estimates_maxtext --python other/bin/python

Llama-3.1-8B, bf16, r = 16 on all linear layers, v5e 4x4, fsdp=16, 16 rows of 2,048 and of 8,192
tokens: MaxText with remat full, its flash attention and AdamW; ours as a run takes it. Both have
JAX's splash kernels for attention, whose time is assumed. No chip measured anything. Needs the
extra "tpu"; some minutes a row.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.estimates import STEPS, planned
from train.plan.clock.groups import COLLECTIVES
from train.plan.clock.read import Estimate, read_clock

PROGRAM = Path(__file__).with_name("maxtext_step.py")


class Side(NamedTuple):
    """A step by the clock: seconds, and bytes that a device sends."""

    fusions: float
    kernels: float
    uncovered: float
    sent: int

    def cells(self) -> str:
        """Returns the cells of a table: ms, and GB."""
        times = (self.fusions, self.kernels, self.uncovered)
        return " | ".join([*(f"{1e3 * each:,.0f}" for each in times), f"{self.sent / 1e9:.1f}"])


def theirs(python: str, tokens: int) -> Side:
    """Compiles MaxText's step in its environment, and reads its HLO."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.hlo"
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
        environment |= {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"}
        subprocess.run(
            [python, "-P", str(PROGRAM), str(out), str(tokens)],
            cwd=folder,
            env=environment,
            stdout=sys.stderr,
            check=True,
        )
        made: Estimate = read_clock(out.read_text())
    return Side(made.fusions, made.kernels, made.uncovered, made.cost(COLLECTIVES).bytes)


def ours(tokens: int) -> Side:
    """Plans our step."""
    plan: dict[str, Any] = planned(STEPS[f"8b-{tokens}"])
    clock = plan["clocks"]["step"]
    sent = sum(part["bytes"] for part in clock["groups"] if part["group"] == COLLECTIVES)
    return Side(clock["fusions"], clock["kernels"], clock["uncovered"], sent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="of an environment with MaxText")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    asked = parser.parse_args()
    print("| 16 rows, a device | fusions, ms | kernels, assumed | links uncovered | GB sent |")
    print(f"|{'---|' * 5}")
    ratios = {}
    for tokens in asked.tokens:
        other, own = theirs(asked.python, tokens), ours(tokens)
        print(f"| MaxText, {tokens:,} tokens | {other.cells()} |")
        print(f"| lora_jax, {tokens:,} tokens | {own.cells()} |", flush=True)
        ratios[tokens] = {
            "fusions": round(own.fusions / other.fusions, 3),
            "sent": round(own.sent / other.sent, 3),
        }
    print(f"\nours over theirs: {json.dumps(ratios)}")


if __name__ == "__main__":
    main()
