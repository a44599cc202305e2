"""The time of an answer, what a model is given to read, and the options of a timed run."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from tests.hf.trees import encoder
from tests.support import variables_of
from tests.train.test_classify_images import FIELDS
from train import sft
from train.compare import costs
from train.compare.result import Arm

ARM = Arm("lora", 2, ("all-linear",), 4.0, 1e-3, 8)


def reading_shapes(params, inputs, apply):
    """Runs a model on shapes alone, in the place of a timed one."""
    jax.eval_shape(apply, {"params": params}, inputs)
    return lambda: [2.0]


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        pytest.param("bert", "8 texts of 29 tokens", id="bert"),
        pytest.param("vit", "8 images", id="vit", marks=pytest.mark.slow),
    ],
)
def test_a_classifier_reads_what_it_can(kind, what, monkeypatch):
    """A text has no more tokens than the model has positions; a ViT reads images."""
    monkeypatch.setattr(costs, "_make_forward_timer", reading_shapes)
    if kind == "bert":
        model, params = encoder("bert", "classification")
    else:
        model = models.VisionEncoder(models.read_config(FIELDS))
        pixels = np.zeros((1, 3, *model.config.image_size), np.float32)
        params = variables_of(model, pixels)["params"]
    rules = [lj.LoraRule(targets="all-linear", rank=2)]
    adapted = lj.lorafy(params, rules, kinds=models.kinds(model.config))
    latency = costs.measure_answer_latency(ARM, model, params, adapted, decodes=False)
    assert latency.what == what and latency.base == latency.merged == latency.live == 2.0


def test_a_timed_run_measures_no_held_out_rows(tmp_path, monkeypatch):
    """As the command of the process takes it: --eval-dataset alone would be an error."""
    asked = []

    def run_command(command):
        asked.append(sft.SCRIPT.parse(command[command.index("train.sft") + 1 :]))
        sft.SCRIPT.check(asked[-1])
        output = Path(asked[-1].run.output)
        output.mkdir()
        report = {"median_step_seconds": 2.0, "step_seconds_quartiles": None}
        (output / "report.json").write_text(
            json.dumps(report | {"compiled_bytes": None, "peak_bytes": 3})
        )

    monkeypatch.setattr(costs, "_run_command", run_command)
    line = ["--dataset", "rows.jsonl", "--eval-dataset", "others.jsonl", "--eval-every", "2"]
    trial = SimpleNamespace(script="train.sft", name="a", config=sft.SCRIPT.parse(line))
    cost = costs.measure_step_cost(trial, tmp_path, None)
    assert (cost["step_seconds"], cost["peak_bytes"]) == (2.0, 3)
    (config,) = asked
    assert config.data.eval_dataset is None and config.run.eval_every == 0
    assert config.optim.steps == costs.TIMED_STEPS
