"""VeRA in PEFT's files both ways, and LoRA-XS as plain LoRA, with PEFT itself as the judge."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from tests.peft_adapters.models import (
    IDS,
    logits_of,
    our_logits,
    plain_logits,
    shaken,
    torch_model,
    write_model,
)
from tests.support import assert_close, assert_identical, with_random_factors

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
CASES = {
    "two sizes": ("llama", {"target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "all linear": ("llama", {"target_modules": "all-linear", "vera_dropout": 0.1}),
    "one layer": ("llama", {"target_modules": ["up_proj"], "layers_to_transform": [1]}),
    "drawn again": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "save_projection": False}
        | {"projection_prng_key": 17},
    ),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "encoder and biases": ("bert", {"target_modules": ["query", "value"], "bias": "vera_only"}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family in {family for family, _ in CASES.values()}:
        write_model(family, root / family)
    return root


def with_vera(model, options):
    """PEFT's model with random vectors far from zero."""
    from peft import VeraConfig, get_peft_model

    return shaken(get_peft_model(model, VeraConfig(**{"r": 5} | options)).eval(), 0.3)


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name, folders, tmp_path):
    from peft import PeftModel, get_peft_model_state_dict

    family, options = CASES[name]
    theirs = with_vera(torch_model(folders, family), options)
    expected = logits_of(theirs)
    assert np.abs(expected - plain_logits(folders, family)).max() > 1e-2
    theirs.save_pretrained(tmp_path / "theirs")

    model, params = models.from_pretrained(folders / family)
    tree = lp.load(tmp_path / "theirs", model, params)
    assert_close(our_logits(model, tree), expected, 1e-5)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert lj.count_params(tree)[0] == trained

    lp.save(tmp_path / "ours", model, tree)
    assert_identical(lp.load(tmp_path / "ours", model, params), tree)
    back = PeftModel.from_pretrained(torch_model(folders, family), tmp_path / "ours").eval()
    assert set(get_peft_model_state_dict(back)) == set(
        load_file(tmp_path / "ours/adapter_model.safetensors")
    )
    assert_close(logits_of(back), expected, 1e-5)
    with_file = lp.load(tmp_path / "theirs", model, jax.eval_shape(lambda: params))
    assert jax.tree.structure(with_file) == jax.tree.structure(tree)


def test_trained_here(folders, tmp_path):
    """Our draw, our scale: PEFT computes our logits, and our gradients."""
    import torch
    from peft import PeftModel

    model, params = models.from_pretrained(folders / "llama")
    rule = lj.LoraRule(targets=["q_proj", "v_proj", "up_proj"], rank=6, vera=True)
    tree = with_random_factors(lj.lorafy(params, [rule]))
    lp.save(tmp_path / "ours", model, tree)
    theirs = PeftModel.from_pretrained(
        torch_model(folders, "llama"), tmp_path / "ours", is_trainable=True
    )
    ids = torch.from_numpy(IDS)
    output = theirs.eval()(input_ids=ids, labels=ids)
    output.loss.backward()
    adapter, base = lj.split(tree)
    tokens = jnp.asarray(IDS, jnp.int32)

    def loss(adapter):
        logits = lj.adapt(model.apply, strict=True)({"params": lj.join(adapter, base)}, tokens)
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return each.mean()

    ours, gradients = jax.jit(jax.value_and_grad(loss))(adapter)
    assert abs(float(ours) - output.loss.item()) < 1e-5
    named = dict(theirs.named_parameters())
    for path, parts in gradients.items():
        module = path.removesuffix("/kernel").replace("/", ".")
        for layer in range(3):
            stem = "base_model.model." + module.replace("layers.", f"layers.{layer}.")
            for part in ("lambda_d", "lambda_b"):
                there = named[f"{stem}.vera_{part}.default"].grad.numpy()
                assert np.abs(there).max() > 1e-6
                assert_close(parts[part][layer], there, 1e-5)
    scaled = with_random_factors(lj.lorafy(params, [lj.LoraRule(**vars(rule) | {"alpha": 15.0})]))
    lp.save(tmp_path / "scaled", model, scaled)
    again = lp.load(tmp_path / "scaled", model, params)
    assert_close(our_logits(model, again), our_logits(model, scaled), 1e-5)


def test_lora_xs_as_plain_lora(folders, tmp_path):
    from peft import PeftModel

    model, params = models.from_pretrained(folders / "llama")
    rule = lj.LoraRule(targets=["q_proj", "up_proj"], rank=3, alpha=7, xs=True)
    tree = with_random_factors(lj.lorafy(params, [rule]))
    lp.save(tmp_path / "ours", model, tree)
    theirs = PeftModel.from_pretrained(torch_model(folders, "llama"), tmp_path / "ours").eval()
    assert_close(logits_of(theirs), our_logits(model, tree), 1e-5)
    assert np.abs(logits_of(theirs) - our_logits(model, params_of(params))).max() > 1e-2
    again = lp.load(tmp_path / "ours", model, params)
    assert_close(our_logits(model, again), our_logits(model, tree), 1e-5)
    fields = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert (fields["peft_type"], fields["r"], fields["lora_alpha"]) == ("LORA", 3, 7)


def params_of(params):
    return lj.join({}, lj.split(lj.lorafy(params, [lj.LoraRule(targets=["q_proj"])]))[1])


V = {"vera": True, "rank": 3}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [lj.LoraRule(targets=["q_proj"], **V), lj.LoraRule(targets=["v_proj"], rank=3)],
            "'model/layers/self_attn/v_proj/kernel' is adapted differently from VeRA",
        ),
        (
            [
                lj.LoraRule(targets=["q_proj"], **V),
                lj.LoraRule(targets=["v_proj"], **V | {"rank": 2}),
            ],
            r"one r for all modules, .*\[2, 3\]",
        ),
        ([lj.LoraRule(targets=["embed_tokens"], **V)], "embed_tokens is an embedding table"),
        (
            [
                lj.TrainRule(targets=["embed_tokens"], rows=[3]),
                lj.LoraRule(targets=["q_proj"], **V),
            ],
            "VeRA has no trainable_token_indices",
        ),
    ],
)
def test_what_peft_cannot_hold(rules, message, folders, tmp_path):
    model, params = models.from_pretrained(folders / "llama")
    with pytest.raises(lp.PeftError, match=message):
        lp.save(tmp_path / "ours", model, lj.lorafy(params, rules))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projection_prng_key": -1}, "projection_prng_key=-1"),
        ({"vera_dropout": 2.0}, "lora_dropout=2.0"),
        ({"odd": True}, "odd=True is not known"),
    ],
)
def test_configurations_that_cannot_be(fields, message):
    with pytest.raises(lp.PeftError, match=message):
        lp.rules({"peft_type": "VERA", "r": 4, "target_modules": ["q_proj"]} | fields)
    (rule,) = lp.rules({"peft_type": "VERA", "r": 4, "target_modules": ["q_proj"]})
    assert (rule.vera, rule.rank, rule.scale) == (True, 4, 1.0)
