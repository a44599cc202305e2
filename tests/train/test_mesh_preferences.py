"""`train.dpo` and `train.grpo` on eight devices, in any order: one device's run."""

import json

import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from tests.support import assert_close, thorough
from tests.train.test_mesh import DENSE, run
from tests.train.tiny import write_jsonl, write_model
from train.run.log import read_metrics

MESHES = ["data=2,fsdp=2,tensor=2", "fsdp=8", "data=8", "tensor=2,fsdp=4"]
ORDERS = ["0,1,2,3,4,5,6,7", "5,2,7,0,1,6,3,4", "7,6,5,4,3,2,1,0"]
ENDS = (*range(100, 124), 258)  # so many that completions end in time
WORDS = ["ab", "hello", "more of it", "z" * 20]
PAIRS = [
    {"prompt": f"{i} {WORDS[i % 4]}?", "chosen": WORDS[-1 - i % 4], "rejected": WORDS[i % 3] + "."}
    for i in range(16)
]
OWN = {
    "dpo": ["--batch-size", 8, "--lr", 5e-3],
    "grpo": ["--reward", "length", "--group", 4, "--batch-size", 32, "--max-new-tokens", 12]
    + ["--eval-questions", 0, "--lr", 1e-2],
}


@pytest.mark.slow
@thorough
@pytest.mark.parametrize("script", OWN)
def test_every_mesh_and_order_is_as_one_device(script, tmp_path):
    model = write_model(tmp_path / "model", scale=0.5, **DENSE, eos_token_id=ENDS)
    shared = ["--model", model, "--dataset", write_jsonl(tmp_path / "rows.jsonl", PAIRS)]
    shared += ["--steps", 8, "--rank", 3, "--alpha", 7, "--eps", 1e-6, "--warmup", 1]
    shared += ["--targets", "all-linear", "--report-to", "none", *OWN[script]]
    places = [("one", ["order=0"])]
    for mesh in MESHES:
        places += [(f"{mesh}/{order}", [f"order={order}", "--mesh", mesh]) for order in ORDERS]
    run(
        shared,
        [[*options, "--output", tmp_path / name] for name, options in places],
        devices=8,
        script=script,
    )
    _, params = models.from_pretrained(model)

    def left(name):
        lines = read_metrics(tmp_path / name)
        adapter = lj.load_adapter(tmp_path / name / "adapter", params)
        return np.array([line["loss"] for line in lines]), lj.split(adapter)[0]

    def drawn(name):
        path = tmp_path / name / "samples.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["answer"] for line in lines]

    losses, adapter = left("one")
    assert all(np.abs(parts["b"]).max() > 1e-2 for parts in adapter.values())
    assert (len(drawn("one")) == 8 * 32) == (script == "grpo")
    furthest = 0.0
    for name, _ in places[1:]:
        ours = left(name)
        assert drawn(name) == drawn("one"), name
        assert np.abs(ours[0] - losses).max() <= 1e-5, name
        furthest = max(furthest, np.abs(ours[0] - losses).max())
        assert_close(ours[1], adapter, 1e-5)
    print(f"{script}: losses {losses[0]:.4f} to {losses[-1]:.4f}, apart by {furthest:.1e} at most")
