"""Scripts on models whose layers lie in several stacks: Qwen3.5's, DeepSeek-V3's."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.models import Decoder
from tests.models import tiny as tiny_models
from tests.models import tiny_stacks
from tests.train.plan.closed_form import plan_flops
from tests.train.plan.tiny_plans import planned_for, write
from tests.train.tiny import CONFIG, write_model, write_rows
from train.adapters.source import find_adapter
from train.console.errors import UserError
from train.generate.__main__ import main as generate
from train.options.common import AdapterConfig
from train.run.rules import rules
from train.sft import main as sft

FIELDS = {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    **tiny_models.DELTA,
}
LATENT = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    **tiny_stacks.ROUTED,
    **tiny_stacks.LATENT,
}
of_both = pytest.mark.parametrize("fields", [FIELDS, LATENT], ids=["qwen3.5", "deepseek v3"])


def test_layers_are_counted_in_the_model() -> None:
    """Layers 1, 2 and 5 of six: the first of the stack 1of3, and both of 2of3."""
    model = Decoder(tiny_models.config("qwen3.5"))
    ids = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    kinds = models.kinds(model.config)
    outline = SimpleNamespace(config=model.config, active_experts=None, params=params, kinds=kinds)
    tree = lj.lorafy(params, rules(AdapterConfig(targets=("o_proj",), layers=(0, 5)), outline))
    assert lj.split(tree)[0].keys() == {"model/layers/2of3/self_attn/o_proj/kernel"}
    with pytest.raises(UserError, match="--layers 6 does not exist: the model has 6 layers"):
        rules(AdapterConfig(layers=(1, 6)), outline)
    adapter = AdapterConfig(targets=("up_proj", "o_proj"), layers=(1, 2, 5), rank=3)
    tree = lj.lorafy(params, rules(adapter, outline))
    found = {
        f"{place}/{part}": getattr(node["kernel"], "ranks", None)
        for place, layer in tree["model"]["layers"].items()
        for module in ("mlp", "self_attn")
        for part, node in layer.get(module, {}).items()
        if part in ("up_proj", "o_proj")
    }
    assert found == {
        "0of3/up_proj": None,
        "1of3/up_proj": (3, 0),
        "2of3/up_proj": (3,),
        "2of3/o_proj": (3,),
    }


def test_layers_of_runs_are_counted_in_the_model() -> None:
    """Layers 1 and 3 of five: the second of two without experts, the second of three with."""
    config = tiny_models.config("deepseek v3")
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    outline = SimpleNamespace(
        config=config, active_experts=None, params=params["params"], kinds=models.kinds(config)
    )
    adapter = AdapterConfig(targets=("kv_b_proj", "shared_experts"), layers=(1, 3), rank=3)
    tree = lj.lorafy(outline.params, rules(adapter, outline))
    ranks = {
        f"{place}/{name}": layer["self_attn"][name]["kernel"].ranks
        for place, layer in tree["model"]["layers"].items()
        for name in ("kv_b_proj",)
    }
    assert ranks == {"dense/kv_b_proj": (0, 3), "sparse/kv_b_proj": (0, 3, 0)}
    shared = tree["model"]["layers"]["sparse"]["mlp"]["shared_experts"]
    assert {shared[name]["kernel"].ranks for name in shared} == {(0, 3, 0)}


@pytest.mark.slow
@of_both
def test_a_run_and_its_answers(tmp_path, capsys, fields) -> None:
    folder, data = write_model(tmp_path / "model", **fields), write_rows(tmp_path / "rows.jsonl")
    options = ["--batch-size", "4", "--steps", "3", "--packing", "--remat"]
    sft(
        [
            "--model",
            str(folder),
            "--dataset",
            str(data),
            "--output",
            str(tmp_path / "run"),
            *options,
        ]
    )
    model, params = models.from_pretrained(folder)
    tree = find_adapter(str(tmp_path / "run")).load(model, params, "the base")
    ids = np.array([[3, 1, 4, 1, 5]])
    moved = jax.jit(lj.adapt(model.apply))({"params": tree}, ids)
    assert np.abs(moved - tiny_models.run(model, params, ids)).max() > 1e-4
    capsys.readouterr()
    # A common beginning, which runs once: answers are those of each prompt alone.
    prompts = ["The sum of 1 and 7?", "The sum of 1 and 9 or 10?"]
    alone = []
    for asked in ([prompts[0]], [prompts[1]], prompts):
        words = ["--model", str(folder), "--adapter", str(tmp_path / "run"), "--prompt", *asked]
        generate([*words, "--max-new-tokens", "5"])
        alone.append(capsys.readouterr().out.splitlines())
    answers = [line for lines in alone[:2] for line in lines if line and line[0] != "#"]
    assert len(answers) > 1
    assert answers == [line for line in alone[2] if line and line[0] != "#"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "fields"),
    [
        *((how, FIELDS) for how in ("none", "full")),
        *((how, {**LATENT, "first_k_dense_replace": 4}) for how in ("none", "full")),
        ("none", tiny_stacks.CASES["gemma4"]),
    ],
)
def test_flops_are_those_counted_by_hand(tmp_path, remat: str, fields) -> None:
    folder = write(tmp_path, {**CONFIG, **fields})
    job, variant, made = planned_for(folder, "--remat", remat, "--seq-len", 128)
    np.testing.assert_allclose(made.flops_traced, plan_flops(job, variant), rtol=0.01)
