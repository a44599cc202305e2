"""The products with A and B in a layer that is recomputed, by the TPU compiler's estimate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.tpu_compiler
@pytest.mark.usefixtures("tpu_compiler")
def test_a_shared_product_that_is_kept_costs_less() -> None:
    """Estimates of the compiler; no chip measured them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.plan.factor_estimates"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    shared, alone = json.loads(done.stdout)
    print(shared, alone)
    assert shared["base FLOPs"] == alone["base FLOPs"] > 0
    assert 0 < shared["FLOPs of A and B recomputed"] < 0.7 * alone["FLOPs of A and B recomputed"]
    assert shared["of A and B"] <= 0.85 * alone["of A and B"]
    assert shared["seconds"] <= alone["seconds"]
