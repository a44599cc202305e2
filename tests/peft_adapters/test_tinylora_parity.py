"""TinyLoRA in PEFT's files both ways, with PEFT itself as the judge."""

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
from lora_jax.peft.kinds.generator import draw_normal, draw_uniform
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
ATTENTION = {"target_modules": ["q_proj", "k_proj", "down_proj"]}
CASES = {
    "a vector each": ("llama", ATTENTION | {"tinylora_dropout": 0.1}),
    "half as many": ("llama", {"target_modules": "all-linear", "weight_tying": 0.5}),
    "uneven groups": ("llama", {"target_modules": "all-linear", "weight_tying": 0.8, "r": 3}),
    "one for all": ("llama", ATTENTION | {"weight_tying": 1.0, "u": 13}),
    "one layer": ("llama", ATTENTION | {"layers_to_transform": [1], "weight_tying": 0.4}),
    "few drawn again": ("llama", ATTENTION | {"save_projection": False, "u": 3}),
    "many drawn again": (
        "llama",
        ATTENTION | {"save_projection": False, "u": 13, "r": 3, "projection_seed": 7},
    ),
    "tables and biases": (
        "llama",
        {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "weight_tying": 0.3}
        | {"bias": "tinylora_only"},
    ),
    "a tied table": ("qwen2", {"target_modules": ["embed_tokens", "v_proj"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "encoder": ("bert", {"target_modules": ["query", "value", "key"], "weight_tying": 0.7}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family in {family for family, _ in CASES.values()}:
        write_model(family, root / family)
    return root


def with_tinylora(model, options):
    """PEFT's model with random vectors far from zero."""
    from peft import TinyLoraConfig, get_peft_model

    defaults = {"r": 2, "u": 5, "init_weights": "uniform"}
    return shaken(get_peft_model(model, TinyLoraConfig(**defaults | options)).eval(), 0.5)


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name, folders, tmp_path):
    from peft import PeftModel, get_peft_model_state_dict

    family, options = CASES[name]
    theirs = with_tinylora(torch_model(folders, family), options)
    expected = logits_of(theirs)
    assert np.abs(expected - plain_logits(folders, family)).max() > 1e-2
    theirs.save_pretrained(tmp_path / "theirs")

    model, params = models.from_pretrained(folders / family)
    tree = lp.load(tmp_path / "theirs", model, params)
    assert_close(our_logits(model, tree), expected, 1e-5)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert lj.count_params(tree)[0] == trained
    assert_identical(lj.join(*lj.split(tree)), tree)

    lp.save(tmp_path / "ours", model, tree)
    assert_identical(lp.load(tmp_path / "ours", model, params), tree)
    back = PeftModel.from_pretrained(torch_model(folders, family), tmp_path / "ours").eval()
    held = load_file(tmp_path / "ours/adapter_model.safetensors")
    there = get_peft_model_state_dict(back)
    tables = {key for key in there if ".base_layer.weight" in key or ".lm_head.weight" in key}
    assert set(there) - tables == set(held)
    assert_close(logits_of(back), expected, 1e-5)
    with_file = lp.load(tmp_path / "theirs", model, jax.eval_shape(lambda: params))
    assert jax.tree.structure(with_file) == jax.tree.structure(tree)
    lj.save_adapter(tmp_path / "kept", tree)
    assert_identical(lj.load_adapter(tmp_path / "kept", params), tree)


@pytest.mark.parametrize("tying", [0.0, 0.6, 1.0])
def test_trained_here(tying, folders, tmp_path):
    """Our draw, our scale, our ties: PEFT computes our logits, and our gradients."""
    from peft import PeftModel

    model, params = models.from_pretrained(folders / "llama")
    rule = lj.LoraRule(
        targets=["q_proj", "v_proj", "up_proj"], rank=3, tinylora=True, u=5, weight_tying=tying
    )
    kinds = models.kinds(model.config)
    tree = with_random_factors(lj.lorafy(params, [rule], kinds=kinds))
    lp.save(tmp_path / "ours", model, tree)
    theirs = PeftModel.from_pretrained(
        torch_model(folders, "llama"), tmp_path / "ours", is_trainable=True
    )
    loss, gradients = loss_and_gradients(model, tree)
    ours = gradients_by_key(gradients, tree)
    there, named = loss_and_gradients_of(theirs)
    assert abs(loss - there) < 1e-5
    assert len(ours) == len(named) == {0.0: 9, 0.6: 4, 1.0: 1}[tying]
    assert lj.count_params(tree)[0] == 5 * len(ours)
    order = sorted(named, key=lambda name: int(name.rsplit(".", 1)[1]))
    for mine, name in zip(ours, order, strict=True):
        assert np.abs(named[name]).max() > 1e-6
        assert_close(mine, named[name], 1e-5)
    scaled = lj.lorafy(params, [lj.LoraRule(**vars(rule) | {"alpha": 7.5})], kinds=kinds)
    scaled = with_random_factors(scaled)
    lp.save(tmp_path / "scaled", model, scaled)
    again = lp.load(tmp_path / "scaled", model, params)
    assert_close(our_logits(model, again), our_logits(model, scaled), 1e-5)
    back = PeftModel.from_pretrained(torch_model(folders, "llama"), tmp_path / "scaled").eval()
    assert_close(logits_of(back), our_logits(model, scaled), 1e-5)
    merged = jax.jit(model.apply)({"params": lj.merge(scaled)}, jnp.asarray(IDS, jnp.int32))
    assert_close(merged, logits_of(back), 1e-5)


def loss_and_gradients(model, tree):
    adapter, base = lj.split(tree)
    tokens = jnp.asarray(IDS, jnp.int32)

    def loss(adapter):
        logits = lj.adapt(model.apply, strict=True)({"params": lj.join(adapter, base)}, tokens)
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return each.mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(adapter)
    return float(value), gradients


def gradients_by_key(gradients, tree):
    """The gradients of the vectors that train, in PEFT's order: layer by layer."""
    paths = [f"model/layers/{name}/kernel" for name in ("self_attn/q_proj", "self_attn/v_proj")]
    paths.append("model/layers/mlp/up_proj/kernel")
    groups = {}
    for layer in range(3):
        for path in paths:
            node = node_at(tree, path)
            key = node.ties[layer] if node.ties else (path, layer)
            groups.setdefault(key, []).append(np.asarray(gradients[path]["v"][layer]))
    return [sum(group) for group in groups.values()]


def node_at(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


def loss_and_gradients_of(theirs):
    import torch

    ids = torch.from_numpy(IDS)
    output = theirs.eval()(input_ids=ids, labels=ids)
    output.loss.backward()
    grads = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    return output.loss.item(), grads


def test_ties_that_peft_cannot_have_are_written_apart(folders, tmp_path):
    """The function is the same, though PEFT would train the vectors apart."""
    from peft import PeftModel

    model, params = models.from_pretrained(folders / "llama")
    rule = lj.LoraRule(targets=["q_proj", "up_proj"], rank=2, tinylora=True, u=5, weight_tying=1)
    tree = with_random_factors(lj.lorafy(params, [rule]))
    crossed = {"self_attn": (0, 1, 0), "mlp": (1, 0, 1)}
    tree = jax.tree.map(lambda x: x, tree)
    for block, name in (("self_attn", "q_proj"), ("mlp", "up_proj")):
        place = tree["model"]["layers"][block][name]
        place["kernel"] = place["kernel"].replace(ties=crossed[block])
    lp.save(tmp_path / "ours", model, tree)
    fields = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert fields["weight_tying"] == 0
    theirs = PeftModel.from_pretrained(torch_model(folders, "llama"), tmp_path / "ours").eval()
    assert_close(logits_of(theirs), our_logits(model, tree), 1e-5)


@pytest.mark.parametrize("n", [1, 7, 15, 16, 17, 40, 117])
def test_numbers_are_torchs(n):
    import torch

    for seed in (42, 2**31 - 1):
        generator = torch.Generator().manual_seed(seed)
        assert_close(draw_normal(seed, (n,)), torch.randn(n, generator=generator).numpy(), 1e-6)
        generator = torch.Generator().manual_seed(seed)
        np.testing.assert_array_equal(
            draw_uniform(seed, (n,)), torch.rand(n, generator=generator).numpy()
        )


T = {"tinylora": True, "rank": 2}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [lj.LoraRule(targets=["q_proj"], **T), lj.LoraRule(targets=["v_proj"], rank=2)],
            "'model/layers/self_attn/v_proj/kernel' is adapted differently from TinyLoRA",
        ),
        (
            [
                lj.LoraRule(targets=["q_proj"], **T),
                lj.LoraRule(targets=["v_proj"], **T | {"rank": 3}),
            ],
            r"one r for all modules, .*\[2, 3\]",
        ),
        (
            [lj.LoraRule(targets=["q_proj"], **T), lj.LoraRule(targets=["v_proj"], **T, u=3)],
            r"one u for all modules, .*\[3, 64\]",
        ),
        (
            [
                lj.TrainRule(targets=["embed_tokens"], rows=[3]),
                lj.LoraRule(targets=["q_proj"], **T),
            ],
            "TinyLoRA has no trainable_token_indices",
        ),
    ],
)
def test_adapters_that_peft_cannot_hold(rules, message, folders, tmp_path):
    model, params = models.from_pretrained(folders / "llama")
    with pytest.raises(lp.PeftError, match=message):
        lp.save(tmp_path / "ours", model, lj.lorafy(params, rules))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projection_seed": -1}, "projection_seed=-1"),
        ({"u": 0, "weight_tying": 2}, "u=0, weight_tying=2"),
        ({"tinylora_dropout": 2.0}, "lora_dropout=2.0"),
        ({"odd": True}, "odd=True is not known"),
    ],
)
def test_configurations_that_cannot_be(fields, message):
    plain = {"peft_type": "TINYLORA", "target_modules": ["q_proj"], "weight_tying": 0.25}
    with pytest.raises(lp.PeftError, match=message):
        lp.rules(plain | fields)
    (rule,) = lp.rules(plain)
    assert (rule.tinylora, rule.rank, rule.scale) == (True, 2, 1.0)
    assert (rule.u, rule.weight_tying) == (64, 0.25)
