"""Runs and adapters that one JAX wrote go on under another, each way: two interpreters.

Within one version a resumed run is the whole one's bit for bit (`test_sft.py`). Between two the
compilers round differently: what goes on is held to a run without a break within `TOLERANCE`.
"""

import os
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.training.run.checkpoints import Checkpoints
from tests.train.tiny import write_model, write_rows
from train.run.log import read_metrics
from train.sft import main

pytestmark = pytest.mark.versions
TOLERANCE = 1e-5
OPTIONS = "--batch-size 4 --rank 2 --alpha 20 --targets q_proj v_proj --lr 3e-3 --warmup 1"
OPTIONS += " --schedule constant --dropout 0.1 --model model --dataset rows.jsonl"
# What the other interpreter does: runs with these options, a line each, then it reads an adapter.
OTHER = """
import sys
import jax, numpy as np
import lora_jax as lj
from lora_jax import models
from train.sft import main
adapter, *runs = sys.argv[1:]
for run in runs:
    main(run.split())
_, params = models.from_pretrained("model")
parts = lj.split(lj.load_adapter(adapter, params))[0]
np.savez("read.npz", *jax.tree.leaves(parts))
print("JAX", jax.__version__)
"""


def options(output, steps, *more):
    return f"{OPTIONS} --output {output} --steps {steps} {' '.join(more)}"


def other(adapter, *runs):
    """Runs scripts, then reads an adapter, by the other interpreter; returns its JAX."""
    if (python := os.environ.get("LORA_JAX_OTHER_PYTHON")) is None:
        pytest.fail("name a Python that has another JAX: LORA_JAX_OTHER_PYTHON=path/bin/python")
    # Its compiler may not know this one's flags, and ends the process then.
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [python, "-c", OTHER, adapter, *runs], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1].removeprefix("JAX ")


def losses(folder):
    return np.array([line["loss"] for line in read_metrics(folder)])


def adapter_of(folder):
    """The leaves of the adapter that a run left, on its base."""
    _, params = models.from_pretrained("model")
    return jax.tree.leaves(lj.split(lj.load_adapter(folder / "adapter", params))[0])


def distance(leaves, expected):
    """The largest difference, in relation to the largest number of each leaf."""
    return max(
        np.max(np.abs(one - whole)) / np.max(np.abs(whole))
        for one, whole in zip(leaves, expected, strict=True)
    )


def lose(part):
    """A `Checkpoints.restore` after which a part of the state is another."""
    restore = Checkpoints.restore

    def lossy(self, like):
        state, run = restore(self, like)
        other = {"opt_state": like.opt_state, "key": jax.random.key(99)}[part]
        return state._replace(**{part: other}), run

    return lossy


def test_runs_go_on_under_the_other_jax_each_way(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_model(Path("model"))
    write_rows(Path("rows.jsonl"))
    main(options("whole", 6).split())
    main(options("from-here", 3).split())
    version = other("whole/adapter", options("from-there", 3), options("from-here", 6, "--resume"))
    assert version != jax.__version__, "two versions, or this shows nothing"
    for part in ("opt_state", "key"):
        shutil.copytree("from-there", f"lost-{part}")
    main(options("from-there", 6, "--resume").split())

    expected, adapter = losses(Path("whole")), adapter_of(Path("whole"))
    with np.load("read.npz") as read:  # the other reads what this one wrote, to the bit
        assert all(map(np.array_equal, read.values(), adapter))
    for folder in (Path("from-here"), Path("from-there")):
        np.testing.assert_allclose(losses(folder), expected, rtol=TOLERANCE)
        assert distance(adapter_of(folder), adapter) <= TOLERANCE
    for part in ("opt_state", "key"):
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "restore", lose(part))
            main(options(f"lost-{part}", 6, "--resume").split())
        lost = distance(adapter_of(Path(f"lost-{part}")), adapter)
        assert lost > 100 * TOLERANCE, f"the control: {part} is lost"
