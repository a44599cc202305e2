"""Predicted memory of steps, judged by the TPU's compiler for slices that are not here."""

import dataclasses
import json

import pytest

from lora_jax.training.memory.live import predicted_bytes
from train.plan import __main__ as plan
from train.plan.compile import prepare
from train.plan.job import PlanVariant
from train.remat import step_bytes

pytestmark = [pytest.mark.tpu_compiler, pytest.mark.usefixtures("tpu_compiler")]

MODEL = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
WORDS = "--topology v5e:2x2 --mesh fsdp=4 --batch-size 4 --seq-len 2048"


def test_a_prediction_is_within_a_tenth(tmp_path):
    (path := tmp_path / "config.json").write_text(json.dumps(MODEL))
    options = plan.parse(["--model", str(path), *WORDS.split()])
    job, optim = plan.make_job(options.plan)
    lora = dataclasses.replace(options.adapter, full=False)
    step = prepare(job, PlanVariant(lora, "none"), optim)
    predicted = predicted_bytes(step.traced, job.layout, step.state, step.base, step.batch)
    total = step_bytes(step.lowered.compile())
    print(f"predicted {predicted / 2**20:,.0f} of {total / 2**20:,.0f} MiB")
    assert predicted == pytest.approx(total, rel=0.1)
