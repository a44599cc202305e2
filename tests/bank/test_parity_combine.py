"""Sums of adapters with PEFT's `add_weighted_adapter` as the judge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from lora_jax.bank import combine
from tests.parity import PARITY, PATTERNS
from tests.peft_adapters.models import FAMILIES, write_model

pytestmark = [*PARITY, PATTERNS]

# One module that only one adapter has, one that all have, a layer that one lacks, and an embedding.
ADAPTERS = {
    "llama": {
        "one": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "embed_tokens"]},
        "two": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj", "embed_tokens"]},
        "three": {"r": 3, "target_modules": ["q_proj"], "layers_to_transform": [1]},
        "wide": {
            "r": 4,
            "target_modules": ["q_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        },
    },
    "gpt2": {
        "one": {"r": 3, "lora_alpha": 7, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        "two": {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    },
    "qwen2": {  # tied: a table with an adapter for each of its uses
        "one": {"r": 3, "lora_alpha": 7, "target_modules": ["embed_tokens", "lm_head"]},
        "two": {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "lm_head"]},
    },
}
PRUNED = {"density": 0.6}
FREQUENCY = PRUNED | {"majority_sign_method": "frequency"}
CASES = [
    ("llama", "linear", {}, ["one", "two", "three"]),
    ("llama", "ties", PRUNED, ["one", "two", "three"]),
    ("llama", "ties", FREQUENCY, ["one", "two", "three"]),
    ("llama", "magnitude_prune", PRUNED, ["one", "two"]),
    ("llama", "exact", {}, ["one", "two", "wide"]),
    ("llama", "svd", {"rank": 4}, ["one", "two", "wide"]),
    ("llama", "ties_svd", PRUNED | {"rank": 5}, ["one", "two", "wide"]),
    ("llama", "magnitude_prune_svd", PRUNED | {"rank": 5}, ["one", "two"]),
    ("gpt2", "ties", PRUNED, ["one", "two"]),
    ("gpt2", "ties_svd", FREQUENCY | {"rank": 2}, ["one", "two"]),
    ("qwen2", "linear", {}, ["one", "two"]),
    ("qwen2", "ties", PRUNED, ["one", "two"]),
    ("qwen2", "svd", {}, ["one", "two"]),
]
WEIGHTS = {"one": 1.25, "two": -0.5, "three": 0.75, "wide": 0.5}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """By family: PEFT's model with all adapters; our model, base and trees by name; a folder."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    found = {}
    for family, configs in ADAPTERS.items():
        folder = tmp_path_factory.mktemp(family)
        write_model(family, folder / "model")
        theirs = getattr(transformers, FAMILIES[family][1]).from_pretrained(folder / "model")
        theirs = theirs.eval()
        for name, fields in configs.items():
            config = LoraConfig(lora_dropout=0.0, **fields)
            if name == "one":
                theirs = get_peft_model(theirs, config, adapter_name=name)
            else:
                theirs.add_adapter(name, config)
        torch.manual_seed(3)
        with torch.no_grad():
            for key, parameter in theirs.named_parameters():
                if "lora_" in key:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
        theirs.save_pretrained(folder / "adapters")
        model, params = models.from_pretrained(folder / "model")
        trees = {
            name: lp.load(folder / "adapters" / name, model, params) for name in ADAPTERS[family]
        }
        found[family] = theirs, model, params, trees, folder
    return found


def close(ours, theirs):
    """max|Δ| ≤ 1e-5·max|theirs|"""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert np.abs(theirs).max() > 1e-2
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def nodes_of(tree):
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lj.is_node)
    return {jax.tree_util.keystr(path): leaf for path, leaf in found if lj.is_node(leaf)}


@pytest.mark.parametrize(("family", "how", "options", "names"), CASES)
def test_deterministic_sums(family, how, options, names, adapters, tmp_path):
    theirs, model, params, trees, _ = adapters[family]
    weights = [WEIGHTS[name] for name in names]
    kwargs = {"svd_rank" if k == "rank" else k: v for k, v in options.items()}
    kind = "cat" if how == "exact" else how
    theirs.add_weighted_adapter(names, weights, "sum", combination_type=kind, **kwargs)
    try:
        theirs.save_pretrained(tmp_path, selected_adapters=["sum"])
    finally:
        theirs.delete_adapter("sum")
    expected = lp.load(tmp_path / "sum", model, params)
    ours = combine([trees[name] for name in names], weights, how=how, **options)
    mine, reference = nodes_of(ours), nodes_of(expected)
    assert mine.keys() == reference.keys()
    assert len(mine) == {"llama": 3, "gpt2": 1, "qwen2": 1}[family]
    for path, node in mine.items():
        for use in ("lookup", "product"):
            change, wanted = (n.factored().seen_by_use(use) for n in (node, reference[path]))
            close(change.delta(jnp.float32), wanted.delta(jnp.float32))
        if how in ("linear", "ties", "magnitude_prune"):
            close(node.a, reference[path].a)
            close(node.b, reference[path].b)


def test_peft_reads_a_sum(adapters, tmp_path):
    """Layers of several ranks, weights of both signs: PEFT's changes are ours."""
    import transformers
    from peft import PeftModel

    _, model, params, trees, folder = adapters["llama"]
    both = combine([trees["wide"], trees["three"]], [1.0, -2.0])
    (node,) = nodes_of(both).values()
    assert node.ranks == (4, 5, 4)
    lp.save(tmp_path / "ours", model, both)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder / "model").eval()
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "ours")
    delta = node.factored().delta(jnp.float32)
    for layer in range(3):
        module = theirs.base_model.model.model.layers[layer].self_attn.q_proj
        close(delta[layer].T, module.get_delta_weight("default").detach().numpy())
