"""Roles of parameters, and the presets of targets that follow from them."""

from typing import Any, get_args

import jax
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.hf.keys import Role
from tests.models import tiny, tiny_encoders

CONFIGS: dict[str, Any] = {
    **{f"decoder {case}": tiny.config(case) for case in tiny.CASES},
    **{case: tiny_encoders.config(case) for case in tiny_encoders.GPT2S},
    **{
        f"{case} {head}": tiny_encoders.config(case, head)
        for case in tiny_encoders.ENCODERS
        for head in tiny_encoders.HEADS
    },
}
BETWEEN = {"pooler", "transform"}  # dense layers of encoders that are of no layer


def adapted(config: Any, targets: Any) -> set[str]:
    """The paths that a rule with these targets selects in the model's tree."""
    tree: dict[str, Any] = {}
    for row in models.key_table(config):
        *parents, leaf = row.path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jax.ShapeDtypeStruct(row.stacked_shape, "float32")
    return set(lj.split(lj.lorafy(tree, [lj.LoraRule(targets=targets)]))[0])


@pytest.mark.parametrize("case", CONFIGS)
def test_every_parameter_has_a_role(case: str) -> None:
    config = CONFIGS[case]
    roles = models.roles(config)
    assert list(roles) == [row.path for row in models.key_table(config)]
    assert set(roles.values()) <= set(get_args(Role))


@pytest.mark.parametrize("case", CONFIGS)
def test_the_presets_are_the_linear_layers(case: str) -> None:
    config = CONFIGS[case]
    presets, roles = models.presets(config), models.roles(config)
    assert set(presets["all-linear"]) == adapted(config, "all-linear")
    assert adapted(config, presets["all-linear"]) == adapted(config, "all-linear")
    named = [*presets["attention"], *presets["mlp"], *presets["experts"]]
    others = [p for p in presets["all-linear"] if roles[p] in {"router", *BETWEEN}]
    assert sorted([*named, *others]) == sorted(presets["all-linear"])
    for preset in ("attention", "mlp", "experts"):
        if presets[preset]:
            assert adapted(config, presets[preset]) == set(presets[preset])


@pytest.mark.parametrize("case", CONFIGS)
def test_heads_and_tables_are_in_no_preset(case: str) -> None:
    config = CONFIGS[case]
    roles = models.roles(config)
    chosen = {roles[path] for paths in models.presets(config).values() for path in paths}
    assert chosen <= {"attention", "mlp", "experts", "router", *BETWEEN}
    named = {path for path, role in roles.items() if role in ("embedding", "head", "classifier")}
    assert {p for p in roles if p.startswith(("lm_head/kernel", "classifier/"))} <= named
    assert {p for p in roles if p.endswith("/embedding")} <= named
    sparse = bool(getattr(config, "num_experts", 0))
    assert bool(models.presets(config)["experts"]) == sparse
    assert bool(models.presets(config)["mlp"]) == (not sparse)


def test_the_roles_of_a_mixture() -> None:
    case = next(case for case in tiny.CASES if case.startswith("mixtral"))
    presets = models.presets(tiny.config(case))
    layers = "model/layers"
    assert presets["attention"] == [f"{layers}/self_attn/{n}_proj/kernel" for n in "qkvo"]
    experts = [f"{layers}/block_sparse_moe/experts/{n}/kernel" for n in ("w1", "w3", "w2")]
    assert presets["experts"] == experts and presets["mlp"] == []
    router = f"{layers}/block_sparse_moe/gate/kernel"
    assert presets["all-linear"] == [*presets["attention"], router, *experts]
