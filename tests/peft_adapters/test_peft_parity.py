"""PEFT's adapters both ways, with PEFT itself as the judge."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from lora_jax.peft.config import read_config
from lora_jax.peft.experts import select_experts, select_parameters
from lora_jax.peft.modules import check_key_table, list_modules, select_modules, ties_tables
from tests.parity import PARITY, PATTERNS
from tests.peft_adapters.models import (
    CONFIGS,
    FAMILIES,
    logits_of,
    our_logits,
    plain_logits,
    torch_model,
    with_adapter,
    write_model,
)
from tests.support import assert_close, assert_identical, with_random_factors

pytestmark = [*PARITY, PATTERNS]
# Keys of length one enlarge rounding: with all of Qwen3.5's linear layers adapted, transformers in
# fp32 is 2.4e-5 from itself in fp64, as far as ours.
TOLERANCES = {"qwen3_5": 5e-5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of each family's model."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        write_model(family, root / family)
    return root


@pytest.mark.parametrize("name", CONFIGS)
def test_both_ways(name, folders, tmp_path):
    from peft import PeftModel, get_peft_model_state_dict

    family, options = CONFIGS[name]
    tolerance = TOLERANCES.get(family, 1e-5)
    theirs = with_adapter(torch_model(folders, family), options)
    expected = logits_of(theirs)
    plain = plain_logits(folders, family)
    assert np.abs(expected - plain).max() > 1e-2, "the adapter must be seen"
    theirs.save_pretrained(tmp_path / "theirs")

    # Theirs in ours: the same modules, the same logits.
    model, params = models.from_pretrained(folders / family)
    tree = lp.load(tmp_path / "theirs", model, params)
    assert_close(our_logits(model, tree), expected, tolerance)
    config = read_config(tmp_path / "theirs")
    available = list_modules(check_key_table(model), tied=ties_tables(config))
    chosen = select_modules(config, available, model.config.model_type)
    tied = set(getattr(theirs.peft_config["default"], "target_modules_to_tie", None) or ())
    names = set(theirs.base_model.targeted_module_names)
    assert {module.name for module in chosen} == names - tied
    weights = select_parameters(config, available, check_key_table(model))
    weight_names = {weight.name_for_patterns for weight in weights}
    parameters = select_experts(config, model, [*weight_names])
    parameter_names = {parameter.name for parameter in parameters} | weight_names
    assert parameter_names == set(theirs.base_model.targeted_parameter_names)

    # Ours in theirs: nothing missing, nothing left over, our logits.
    lp.save(tmp_path / "ours", model, tree)
    again = lp.load(tmp_path / "ours", model, params)
    assert_close(our_logits(model, again), our_logits(model, tree), 1e-6)
    if "init_lora_weights" not in options:
        assert_identical(again, tree)
    if name == "modules saved":
        assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["modules_to_save"]
    back = PeftModel.from_pretrained(torch_model(folders, family), tmp_path / "ours").eval()
    tensors = load_file(tmp_path / "ours/adapter_model.safetensors")
    # PEFT writes the biases of a saved module under the wrapper's own names as well.
    wrapped = (".modules_to_save.", ".original_module.")
    theirs_of_ours = {
        k for k in get_peft_model_state_dict(back) if not any(w in k for w in wrapped)
    }
    assert theirs_of_ours == set(tensors), "missing or unexpected"
    assert_close(logits_of(back), expected, tolerance)


def test_an_adapter_of_a_whole_model_is_one_of_its_text(folders, tmp_path):
    """PEFT on a model with images: its text has other names there."""
    import transformers

    text = torch_model(folders, "qwen3_5")
    vision = {"depth": 1, "hidden_size": 12, "intermediate_size": 8, "num_heads": 2}
    vision |= {"out_hidden_size": 24, "patch_size": 2, "num_position_embeddings": 4}
    config = transformers.Qwen3_5Config(text_config=text.config.to_dict(), vision_config=vision)
    whole = transformers.Qwen3_5ForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    targets = {"target_modules": ["in_proj_qkv", "q_proj", "up_proj"]}
    theirs = with_adapter(whole.eval(), targets)
    theirs.save_pretrained(tmp_path)
    assert all(
        ".language_model." in name for name in load_file(tmp_path / "adapter_model.safetensors")
    )
    model, params = models.from_pretrained(folders / "qwen3_5")
    assert_close(our_logits(model, lp.load(tmp_path, model, params)), logits_of(theirs), 1e-5)


@pytest.mark.parametrize(
    ("family", "targets"), [("qwen2", r"layers\.\d\.mlp\.up_proj"), ("gpt2", ["c_attn"])]
)
def test_an_adapter_of_a_bare_model(family, targets, folders, tmp_path):
    """PEFT on transformers' AutoModel, whose modules have no "model." before them."""
    from peft import PeftModel

    whole = torch_model(folders, family)
    theirs = with_adapter(whole.base_model, {"target_modules": targets})
    theirs.save_pretrained(tmp_path / "adapter")
    want = logits_of(whole)  # its layers are PEFT's by now
    assert np.abs(want - plain_logits(folders, family)).max() > 1e-2
    for name in load_file(tmp_path / "adapter/adapter_model.safetensors"):
        assert name.startswith(("base_model.model.layers.", "base_model.model.h."))
    base = torch_model(folders, family).base_model
    base.save_pretrained(tmp_path / "bare")
    model, params = models.from_pretrained(tmp_path / "bare")
    tree = lp.load(tmp_path / "adapter", model, params)
    assert_close(our_logits(model, tree), want, 1e-5)
    assert lp.rules(tmp_path / "adapter", model)
    lp.save(tmp_path / "ours", model, tree)
    back = PeftModel.from_pretrained(torch_model(folders, family), tmp_path / "ours").eval()
    assert_close(logits_of(back), want, 1e-5)


@pytest.mark.parametrize("kernels", [["w1", "w2", "w3"], ["w3"], ["w1", "w2"]])
def test_experts_trained_here(kernels, folders, tmp_path):
    """gate and up have an A each, and ranks of their own: still one function in PEFT."""
    from peft import PeftModel

    model, params = models.from_pretrained(folders / "mixtral")
    rules = [
        lj.LoraRule(targets=[name], rank=2 + i, alpha=5.0 + i) for i, name in enumerate(kernels)
    ]
    tree = with_random_factors(lj.lorafy(params, rules))
    lp.save(tmp_path / "ours", model, tree)
    theirs = PeftModel.from_pretrained(torch_model(folders, "mixtral"), tmp_path / "ours").eval()
    assert_close(logits_of(theirs), our_logits(model, tree), 1e-5)
    again = lp.load(tmp_path / "ours", model, params)
    assert_close(our_logits(model, again), our_logits(model, tree), 1e-5)


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        ("qwen2", lj.LoraRule(targets=["embed_tokens"], rank=2, alpha=5)),
        ("gpt2", lj.LoraRule(targets=["wte"], rank=2, alpha=5)),
        ("gpt2", lj.LoraRule(targets=["wte"], rank=2, alpha=5, uses="product")),
        ("qwen2", lj.TrainRule(targets=["embed_tokens"])),
        ("gpt2", lj.TrainRule(targets=["wte"])),
        ("gpt2", lj.TrainRule(targets=["wte"], rows=[3, 9])),
    ],
)
def test_a_tied_table_trained_here(family, rule, folders, tmp_path):
    """Whatever the table's name: PEFT ties by names, and knows embed_tokens and lm_head alone."""
    from peft import PeftModel, get_peft_model_state_dict

    model, params = models.from_pretrained(folders / family)
    rules = [rule, lj.LoraRule(targets=["v_proj" if family == "qwen2" else "c_attn"], rank=2)]
    tree = with_random_factors(lj.lorafy(params, rules))
    lp.save(tmp_path / "ours", model, tree)
    theirs = PeftModel.from_pretrained(torch_model(folders, family), tmp_path / "ours").eval()
    assert_close(logits_of(theirs), our_logits(model, tree), 1e-5)
    tensors = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert set(get_peft_model_state_dict(theirs)) == set(tensors), "missing or unexpected"
    again = lp.load(tmp_path / "ours", model, params)
    assert_identical(again, tree)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 2}},
            r"rank_pattern gives them \[3, 2\].*target only one of them",
        ),
        ({"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}, "not support dora"),
        (
            {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True},
            "lm_head.lora_magnitude_vector.*without use_dora",
        ),
        (
            {
                "target_modules": ["embed_tokens"],
                "ensure_weight_tying": True,
                "alpha_pattern": {"embed_tokens": 9},
            },
            "alpha_pattern gives model.embed_tokens 9 and lm_head 7",
        ),
        (
            {
                "target_modules": ["q_proj"],
                "trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]},
            },
            "Use the same tokens for both",
        ),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "which is tied"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "which is tied"),
    ],
)
def test_tied_layers_that_are_not_supported(options, message, folders, tmp_path):
    theirs = with_adapter(torch_model(folders, "qwen2"), options)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(lp.PeftError, match=message):
        lp.load(tmp_path, *models.from_pretrained(folders / "qwen2"))


def test_several_adapters_in_one_folder(folders, tmp_path):
    from peft import LoraConfig

    theirs = with_adapter(torch_model(folders, "llama"), {"target_modules": ["q_proj"]})
    theirs.add_adapter("second", LoraConfig(r=2, lora_alpha=5, target_modules=["v_proj"]))
    theirs.set_adapter("second")
    import torch

    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    model, params = models.from_pretrained(folders / "llama")
    tree = lp.load(tmp_path, model, params, adapter="second")
    assert_close(our_logits(model, tree), logits_of(theirs), 1e-5)
    theirs.set_adapter("default")
    assert_close(our_logits(model, lp.load(tmp_path, model, params)), logits_of(theirs), 1e-5)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(lp.PeftError, match="several adapters: second. Choose one with adapter="):
        lp.load(tmp_path, model, params)
