"""Plans against measurements on this machine: FLOPs of the two ways, and memory of real steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import thorough
from tests.train.plan.closed_form import plan_flops
from tests.train.plan.test_plan_tpu import LLAMA
from train.plan import __main__ as plan
from train.plan import compile as planned

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow
WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8}
WIDE |= {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 16000}
DEEP = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12}
DEEP |= {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 16000}
JOBS = {
    "a large base": (WIDE, ["--batch-size", 2, "--seq-len", 128]),
    "many tokens": (WIDE, ["--batch-size", 8, "--seq-len", 128]),
    "full": (DEEP, ["--batch-size", 4, "--seq-len", 128, "--full"]),
}


def test_lora_needs_two_thirds_of_the_flops(tmp_path):
    """Of Llama-2-7B, without rematerialisation."""
    model = tmp_path / "config.json"
    model.write_text(json.dumps(LLAMA))
    words = ["--model", model, "--topology", "cpu:1", "--batch-size", 1, "--seq-len", 2048]
    words += ["--remat", "none", "--alone"]
    made = []
    for more in (["--rank", 8], ["--full"]):
        options = plan.parse([str(word) for word in (*words, *more)])
        job, optim = plan.make_job(options.plan)
        variant = plan.variants_to_plan(options)[0]
        made.append(planned.plan(job, variant, optim))
        by_hand = plan_flops(job, variant)
        np.testing.assert_allclose(made[-1].flops_per_step, by_hand, rtol=0.01)
    lora, full = (one.flops_per_step for one in made)
    print(f"LoRA {lora:.4e}, full {full:.4e}: {lora / full:.3f}")
    assert lora <= 0.70 * full


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("many tokens", "none"),
        pytest.param("many tokens", "full", marks=thorough),
        pytest.param("a large base", "full", marks=thorough),
        pytest.param("full", "none", marks=thorough),
    ],
)
def test_the_plan_is_what_a_step_takes(name, remat, tmp_path):
    """Within 15 %, of the increase over a process that has loaded JAX; compiled in another."""
    fields, options = JOBS[name]
    model = tmp_path / "config.json"
    model.write_text(json.dumps(LLAMA | fields))
    words = [tmp_path / "cache", "--model", model, "--topology", "cpu:1", "--dtype", "float32"]
    words += ["--remat", remat, "--alone", *options]

    def run(mode):
        script = ROOT / "tests/train/plan/peak_memory.py"
        done = subprocess.run(
            [sys.executable, str(script), mode, *map(str, words)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    planned_bytes = run("compile")["total"]
    peak = run("run")["peak"]
    print(f"{name}, remat {remat}: planned {planned_bytes / 1e6:,.0f} MB, took {peak / 1e6:,.0f}")
    assert abs(peak - planned_bytes) <= 0.15 * peak
