"""A mixture in FP8 on a mesh of TPUs: its experts stay where they are (extra `tpu`)."""

import json
import math
import re

import jax
import pytest

from train.plan import __main__ as plan
from train.plan.compile import prepare
from train.plan.hlo.work import work_of

pytestmark = [pytest.mark.tpu_compiler, pytest.mark.usefixtures("tpu_compiler")]

EXPERTS, WIDTH, INNER = 8, 256, 128
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "vocab_size": 512,
    "hidden_size": WIDTH,
    "intermediate_size": 384,
    "moe_intermediate_size": INNER,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 384,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def hlo(folder, *options):
    """The optimised HLO of the step that `train.plan` plans for four chips."""
    (folder / "config.json").write_text(json.dumps(DEEPSEEK))
    words = ["--model", folder, "--topology", "v5e:2x2", "--batch-size", 4, "--seq-len", 512]
    words += ["--targets", "attention", "experts", "--rank", 4, "--alone", *options]
    asked = plan.parse(list(map(str, words)))
    plan.check(asked)
    job, optim = plan.make_job(asked.plan)
    with jax.numpy_dtype_promotion("standard"):
        prepared = prepare(job, plan.variants(asked)[0], optim)
    return prepared.lowered.compile().as_text()


def experts_in(text, kinds):
    """The numbers of experts of arrays of these kinds that hold experts' kernels."""
    arrays = re.findall(rf"\b(?:{kinds})\[([\d,]*)\]", text)
    shapes = [tuple(map(int, sizes.split(","))) for sizes in arrays if sizes]
    kernels = ((WIDTH, INNER), (INNER, WIDTH))
    return {math.prod(shape[:-2]) for shape in shapes if shape[-2:] in kernels}


def test_experts_stay_on_their_devices_and_in_codes(tmp_path, monkeypatch):
    text = hlo(tmp_path, "--mesh", "expert=4")
    layers, floats, codes = 2, "bf16|f32", "f8e4m3fn|u8|s8"
    own = EXPERTS // 4
    assert max(experts_in(text, codes)) == layers * own, "what a device keeps"
    assert max(experts_in(text, floats), default=0) <= 1
    flops = work_of(text).flops
    monkeypatch.setattr("train.plan.hlo.work.UNEVEN", "no such scope")
    assert work_of(text).flops > 1.2 * flops, "turns for an uneven choice are there"
    control = hlo(tmp_path, "--mesh", "fsdp=4", "--experts", "ragged")
    assert EXPERTS in experts_in(control, codes), "gathered"
    assert EXPERTS in experts_in(control, floats), "formed together"
