"""Adapters that a serving engine would refuse: configurations with one problem each."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_jax.peft as lp
from lora_jax.peft.serving import list_problems

STEM = "base_model.model.model.layers"
PLAIN = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "bias": "none",
    "modules_to_save": None,
    "init_lora_weights": True,
    "use_qalora": False,
    "megatron_core": "megatron.core",
}


def factors(r=4, name=f"{STEM}.0.self_attn.q_proj"):
    return {
        f"{name}.lora_A.weight": np.zeros((r, 6), np.float32),
        f"{name}.lora_B.weight": np.zeros((6, r), np.float32),
    }


def experts(*names, r=4, n=8):
    """Factors of n experts' parameters: a rank each, and n times as many rows."""
    found = {}
    for name in names:
        stem = f"{STEM}.0.mlp.experts{'.base_layer' if len(names) > 1 and 'up' in name else ''}"
        found |= factors(r * n, stem)
    return found


GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
BOTH = {"target_parameters": [GATE_UP, DOWN]}


def table(name):
    key = f"base_model.model.{name}"
    return {
        f"{key}.lora_embedding_A": np.zeros((4, 9), np.float32),
        f"{key}.lora_embedding_B": np.zeros((6, 4), np.float32),
    }


SERVED = {
    "plain": ({}, factors()),
    "rsLoRA": ({"use_rslora": True}, factors()),
    "gaussian": ({"init_lora_weights": "gaussian"}, factors()),
    "a classifier": ({"modules_to_save": ["classifier", "score"]}, factors()),
    "the embedding": ({}, factors() | table("model.embed_tokens")),
    "an equal scale": (
        {"rank_pattern": {"1.self_attn.q_proj": 2}, "alpha_pattern": {"1.self_attn.q_proj": 4}},
        factors() | factors(2, f"{STEM}.1.self_attn.q_proj"),
    ),
    "experts, of all together a high rank": (BOTH, factors() | experts(GATE_UP, DOWN)),
    "experts of an equal scale": (
        BOTH | {"rank_pattern": {"experts.*": 2}, "alpha_pattern": {"experts.*": 4}},
        factors() | experts(GATE_UP, DOWN, r=2),
    ),
    "experts one by one": (
        {},
        factors()
        | factors(4, f"{STEM}.0.mlp.experts.0.gate_proj")
        | factors(4, f"{STEM}.0.mlp.experts.0.up_proj")
        | factors(4, f"{STEM}.0.mlp.experts.0.down_proj"),
    ),
    "the highest rank": ({"r": 16, "lora_alpha": 8}, factors(16)),
}
REFUSED = {
    "DoRA": ({"use_dora": True}, {}, "use_dora: .*--merged"),
    "a bias on B": ({"lora_bias": True}, {}, "lora_bias: .*--merged"),
    "biases": ({"bias": "lora_only"}, {}, "bias=lora_only: .*--merged"),
    "a norm": (
        {"modules_to_save": ["classifier", "input_layernorm"]},
        {},
        "modules_to_save input_layernorm: .*--merged",
    ),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, {}, "pissa_niter_4: .*Convert it"),
    "OLoRA": ({"init_lora_weights": "olora"}, {}, "olora: .*Convert it to plain LoRA"),
    "CorDA": ({"init_lora_weights": "corda"}, {}, "corda: .*path_initial_model"),
    "LoftQ": ({"init_lora_weights": "loftq"}, {}, "loftq: .*merge_and_unload"),
    "aLoRA": ({"alora_invocation_tokens": [5]}, {}, "alora_invocation_tokens: .*with PEFT"),
    "layers again": ({"layer_replication": [[0, 2]]}, {}, "layer_replication: .*repeated"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, {}, "use_bdlora: .*merge_and_unload"),
    "QA-LoRA": ({"use_qalora": True}, {}, "use_qalora: .*merge_and_unload"),
    "KaSA": ({"kasa_config": {"beta": 1}}, {}, "kasa_config: .*merge_and_unload"),
    "tokens": ({"trainable_token_indices": [3]}, {}, "trainable_token_indices: .*--merged"),
    "another embedding": ({}, table("transformer.wte"), "transformer.wte: .*--merged"),
    "a shared adapter": (
        {"ensure_weight_tying": True},
        table("model.embed_tokens"),
        "ensure_weight_tying: .*--merged",
    ),
    "a rank": ({"r": 48, "lora_alpha": 96}, factors(48), "rank 48: .*--max-lora-rank 64"),
    "one module's rank": (
        {"rank_pattern": {"q_proj": 600}, "alpha_pattern": {"q_proj": 1200}},
        factors(600),
        "rank 600: It exceeds the maximum of 16.*--merged",
    ),
    "experts of a high rank": (
        BOTH | {"rank_pattern": {"experts.*": 60}, "alpha_pattern": {"experts.*": 120}},
        experts(GATE_UP, DOWN, r=60),
        "rank 60: .*--max-lora-rank 64",
    ),
    "experts of another scale": (
        BOTH | {"alpha_pattern": {"experts.down_proj": 9}},
        experts(GATE_UP, DOWN),
        "so 1 modules, such as model.layers.0.mlp.experts.down_proj.*--for-serving",
    ),
    "gate and up alone": (
        {"target_parameters": [GATE_UP]},
        experts(GATE_UP),
        "experts: In 1 layers, a projection is not adapted.*--for-serving",
    ),
    "gate and up alone, by their own scale": (
        {"target_parameters": [GATE_UP], "alpha_pattern": {"experts.down_proj": 9}},
        experts(GATE_UP),
        "experts: .*a projection",
    ),
    "an expert's gate alone": (
        {},
        factors(4, f"{STEM}.0.mlp.experts.0.gate_proj"),
        "experts: .*a projection",
    ),
    "another scale": (
        {"alpha_pattern": {"q_proj": 9}},
        {},
        "alpha_pattern: .*such as .*layers.0.self_attn.q_proj",
    ),
}


@pytest.mark.parametrize("name", SERVED)
def test_what_is_served(name):
    changes, tensors = SERVED[name]
    assert list_problems(PLAIN | changes, tensors) == []


@pytest.mark.parametrize("name", REFUSED)
def test_each_problem_is_one_line(name):
    changes, tensors, line = REFUSED[name]
    (found,) = list_problems(PLAIN | changes, factors() | tensors)
    assert re.search(line, found), found
    assert "\n" not in found


def test_experts_in_another_model_s_layout():
    joined, apart = SERVED["experts, of all together a high rank"], SERVED["experts one by one"]
    for (changes, tensors), fit, other in (
        (joined, "gpt_oss", "mixtral"),
        (apart, "qwen3_moe", "gpt_oss"),
    ):
        assert list_problems(PLAIN | changes, tensors, model_type=fit) == []
        (found,) = list_problems(PLAIN | changes, tensors, model_type=other)
        assert re.search(f"reads another layout for {other}.*--for-serving", found)


def test_problems_add_up():
    changes = {"use_dora": True, "lora_bias": True, "r": 32, "lora_alpha": 64}
    assert len(list_problems(PLAIN | changes, factors(32))) == 3
    assert len(list_problems(PLAIN | changes, factors(32), max_rank=32)) == 2


def test_a_folder(tmp_path):
    save_file(factors(32), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN | {"r": 32, "lora_alpha": 4}))
    assert lp.serving_problems(tmp_path, max_rank=32) == []
    assert len(lp.serving_problems(tmp_path)) == 1
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert "Only LORA is served" in lp.serving_problems(tmp_path)[0]
    with pytest.raises(lp.PeftError, match="neither a folder on this machine nor a hub name"):
        lp.serving_problems(tmp_path / "nowhere")
