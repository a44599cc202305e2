"""Adapters of experts in the layout that servers read, by vLLM's rules written out in NumPy."""

import functools
import operator
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax.peft.contents import adapter_contents
from lora_jax.peft.served import convert_for_serving
from lora_jax.peft.serving import list_problems
from tests.models import tiny
from tests.support import assert_close, lorafied, over, with_random_factors

# case of a model -> its rules: projections left out, ranks and scales that differ, a router.
ADAPTERS: dict[str, list[lj.LoraRule]] = {
    "mixtral": [
        lj.LoraRule(targets=["w1"], rank=2, alpha=5),
        lj.LoraRule(targets=["w3", "q_proj"], rank=3, alpha=1),
    ],
    "qwen3 moe": [
        lj.LoraRule(targets=["gate"], rank=4, alpha=6),
        lj.LoraRule(targets=["down_proj"], rank=2, alpha=3, layers=[1]),
    ],
    "qwen3-next": [
        lj.LoraRule(targets=["gate", "experts/up_proj"], rank=4, alpha=6),
        lj.LoraRule(targets=["experts/down_proj", "o_proj"], rank=2, alpha=3, layers=[1]),
    ],
    "glm4 moe": [
        lj.LoraRule(targets=["gate", "experts/up_proj"], rank=4, alpha=6),
        lj.LoraRule(targets=["experts/down_proj", "o_proj"], rank=2, alpha=3, layers=[1]),
    ],
    "deepseek v3": [
        lj.LoraRule(targets=["experts/gate_proj"], rank=4, alpha=6),
        lj.LoraRule(targets=["experts/down_proj", "o_proj"], rank=2, alpha=3),
    ],
    "gpt-oss": [
        lj.LoraRule(targets=["gate_up_proj"], rank=2, alpha=5),
        lj.LoraRule(targets=["o_proj", "embed_tokens"], rank=3, alpha=1),
    ],
    "gpt-oss with other options": [
        lj.LoraRule(targets=["down_proj", "router"], rank=3, alpha=4),
        lj.LoraRule(targets=["gate_up_proj"], rank=2, alpha=5, layers=[0, 2]),
    ],
}


def adapted(case: str) -> tuple[Any, Any, Any]:
    model, params = tiny.decoder(case)
    return model, params, with_random_factors(lorafied(params, ADAPTERS[case]))


def as_read(config: Any, fields: Any, tensors: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (a module of the engine's, the change of its weight [out, in]), as vLLM reads it."""
    scale = fields["lora_alpha"] / fields["r"]
    found = {
        key.removesuffix(".lora_A.weight").removeprefix("base_model.model."): (
            np.asarray(a),
            np.asarray(tensors[key.replace("lora_A", "lora_B")]) * scale,
        )
        for key, a in tensors.items()
        if key.endswith(".lora_A.weight")
    }
    n = config.num_experts
    for name, (a, b) in found.items():
        assert a.shape[0] <= fields["r"] * n
        if not name.endswith((".experts", ".experts.base_layer")):
            yield name, b @ a
            continue
        assert name.removesuffix(".base_layer") + ".base_layer" in found, "both are required"
        a = a.reshape(n, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, n).transpose(2, 0, 1)
        for e, change in enumerate(b @ a):
            layer = f"{name.removesuffix('.base_layer')}.{e}"
            if name.endswith(".base_layer"):
                yield f"{layer}.gate", change[::2]
                yield f"{layer}.up", change[1::2]
            else:
                yield f"{layer}.down", change


def changes(config: Any, params: Any, tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (a module of the engine's, the change of our kernel) for what may be adapted."""
    whole = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), lj.merge(tree), params)
    mlp, router = config.family.mlp_name, config.family.router_name
    for number in range(config.num_hidden_layers):
        path, i = config.place_of(number)
        change = functools.reduce(operator.getitem, path.split("/"), whole)
        for name in {"q_proj", "o_proj"} & set(change.get("self_attn", ())):
            kernel = change["self_attn"][name]["kernel"][i].T
            yield f"model.layers.{number}.self_attn.{name}", kernel
        if not config.kind_of(number).sparse:
            continue
        yield f"model.layers.{number}.{mlp}.{router}", change[mlp][router]["kernel"][i].T
        for name in config.expert_shapes:
            for e in range(config.num_experts):
                kernel, stem = change[mlp]["experts"][name]["kernel"][i, e].T, f"{mlp}.experts.{e}"
                parts = {name: kernel}
                if len(config.expert_shapes) == 2:
                    halves = {"gate": kernel[::2], "up": kernel[1::2]}
                    parts = halves if name == "gate_up_proj" else {"down": kernel}
                for part, values in parts.items():
                    yield f"model.layers.{number}.{stem}.{part}", values


@over("case", ADAPTERS, often=["mixtral", "gpt-oss"])
def test_an_engine_reads_our_change(case: str) -> None:
    model, params, tree = adapted(case)
    fields, tensors = convert_for_serving(*adapter_contents(model, tree), model)
    assert list_problems(fields, tensors, model_type=model.config.model_type) == []
    got = dict(as_read(model.config, fields, tensors))
    want = dict(changes(model.config, params, tree))
    moved = {name for name, change in want.items() if np.abs(change).max() > 1e-3}
    assert len(moved) > 4 and moved <= got.keys() <= want.keys()
    for name, change in want.items():
        assert_close(got.get(name, np.zeros_like(change)), change, 1e-6)
    experts = [name for name in got if ".experts." in name]
    per_layer = 3 * model.config.num_experts
    assert len(experts) % per_layer == 0, "every projection of every expert"
    if case == "mixtral":  # a name for each kind of module, as engines ask for, and no list of all
        assert fields["target_modules"] == ["q_proj", "w1", "w2", "w3"]


@over("case", ADAPTERS, often=["qwen3 moe"])
def test_we_read_it_too(case: str, tmp_path: Any) -> None:
    model, params, tree = adapted(case)
    lp.save(tmp_path / "served", model, tree, for_serving=True)
    again = lp.load(tmp_path / "served", model, params)
    assert_close(lj.merge(again), lj.merge(tree), 1e-6)
    assert lp.serving_problems(tmp_path / "served", model_type=model.config.model_type) == []


@pytest.mark.parametrize(
    ("case", "targets", "named"),
    [
        ("qwen3-next", "shared_expert", "shared_expert"),
        ("deepseek v3", "shared_experts", "shared_experts"),
        ("glm4 moe", "dense/mlp", "its layers without experts"),
    ],
)
def test_peft_cannot_hold_an_expert_that_all_tokens_share(
    case: str, targets: str, named: str, tmp_path: Any
) -> None:
    """PEFT takes its projections for the experts'. A server reads them, and so do we."""
    model, params = tiny.decoder(case)
    tree = lj.lorafy(params, [lj.LoraRule(targets=[targets], rank=2)])
    with pytest.raises(lp.PeftError, match=f"cannot hold the adapter of {named}"):
        lp.save(tmp_path / "plain", model, tree)
    lp.save(tmp_path / "served", model, tree, for_serving=True)
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("targets", ["sinks", "experts"])
def test_parameters_of_no_module_cannot_be_saved(targets: str) -> None:
    model, params = tiny.decoder("gpt-oss")
    rules = [lj.TrainRule(targets=[targets]), lj.LoraRule(targets=["q_proj"], rank=2)]
    with pytest.raises(lp.PeftError, match="belongs to no module that PEFT can save"):
        adapter_contents(model, lj.lorafy(params, rules))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_merges_the_same(tmp_path: Any) -> None:
    """PEFT's own merge of the served file gives our merged kernels, interleaved as the file's."""
    import torch
    from peft import PeftModel

    from tests.models.test_parity import made

    reference, model, params = made("gpt-oss")
    tree = with_random_factors(lorafied(params, ADAPTERS["gpt-oss"]))
    lp.save(tmp_path / "served", model, tree, for_serving=True)
    theirs = PeftModel.from_pretrained(reference, tmp_path / "served").merge_and_unload()
    with torch.no_grad():
        got = [layer.mlp.experts.gate_up_proj.numpy() for layer in theirs.model.layers]
    want = lj.merge(tree)["model"]["layers"]["mlp"]["experts"]["gate_up_proj"]["kernel"]
    assert_close(np.stack(got), want, 1e-5)
    made.cache_clear()  # the model is merged
