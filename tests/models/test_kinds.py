"""Kinds of parameters, and the presets of targets that select by them."""

from typing import Any, get_args

import jax
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.core.weight import leaves_of
from lora_jax.hf.keys import Kind
from lora_jax.select.matching import LeafFacts
from lora_jax.select.resolve import resolve
from tests.models import tiny, tiny_encoders

ALL: dict[str, Any] = {
    **{f"decoder {case}": tiny.config(case) for case in tiny.CASES},
    **{case: tiny_encoders.config(case) for case in tiny_encoders.GPT2S},
    **{
        f"{case} {head}": tiny_encoders.config(case, head)
        for case in tiny_encoders.ENCODERS
        for head in tiny_encoders.HEADS
    },
}
# One case for each set of paths: a parameter's kind is by its path.
_CASES = {tuple(row.path for row in models.key_table(ALL[case])): case for case in reversed(ALL)}
CONFIGS = {case: ALL[case] for case in reversed(_CASES.values())}
PARTS = ("attention", "mlp", "experts")
BETWEEN = {"pooler", "transform"}  # dense layers of encoders that are of no layer


def tree_of(config: Any) -> dict[str, Any]:
    """The model's tree, of shapes."""
    tree: dict[str, Any] = {}
    for row in models.key_table(config):
        *parents, leaf = row.path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jax.ShapeDtypeStruct(row.stacked_shape, "float32")
    return tree


def adapted(config: Any, targets: Any, **how: Any) -> set[str]:
    """The paths that a rule with these targets selects in the model's tree.

    As `lorafy` does, which would go on to trace how each one starts.
    """
    leaves, _ = leaves_of(tree_of(config))
    return set(resolve(leaves, [lj.LoraRule(targets=targets)], LeafFacts(**how)))


@pytest.mark.parametrize("case", CONFIGS)
def test_every_parameter_has_a_kind(case: str) -> None:
    config = CONFIGS[case]
    kinds = models.kinds(config)
    assert list(kinds) == [row.path for row in models.key_table(config)]
    assert set(kinds.values()) <= set(get_args(Kind))


@pytest.mark.parametrize("case", CONFIGS)
def test_presets_are_the_linear_layers(case: str) -> None:
    """By kind and by name the same; the parts are disjoint, and with routers they are the whole."""
    config = CONFIGS[case]
    kinds = models.kinds(config)
    everything = adapted(config, "all-linear")
    assert adapted(config, "all-linear", kinds=kinds) == everything
    assert {kinds[path] for path in everything} <= {*PARTS, "router", *BETWEEN}
    there = [part for part in PARTS if part in kinds.values()]
    parts = [adapted(config, part, kinds=kinds) for part in there]
    others = {path for path in everything if kinds[path] in {"router", *BETWEEN}}
    assert sorted(path for paths in [*parts, others] for path in paths) == sorted(everything)
    sparse = bool(getattr(config, "num_experts", 0))
    dense = not sparse or bool(config.shared_expert_intermediate_size)
    assert there == ["attention", *["mlp"] * dense, *["experts"] * sparse]
    # In a list, "mlp" is a module's name as well: where that has experts, their router is in it.
    named = {path for path in others if sparse and dense and "/mlp/" in path}
    assert adapted(config, there, kinds=kinds) == set.union(*parts, named)


@pytest.mark.parametrize("case", CONFIGS)
def test_heads_and_tables_are_known(case: str) -> None:
    kinds = models.kinds(CONFIGS[case])
    of = {kind: {p for p, k in kinds.items() if k == kind} for kind in kinds.values()}
    outputs = of.get("head", set()) | of.get("classifier", set())
    assert {p for p in kinds if p.startswith(("lm_head/kernel", "classifier/"))} <= outputs
    tables = {p for p in kinds if p.endswith("/embedding")}
    assert tables == of["embedding"] | of.get("positions", set())
    words = [p for p in tables if "word" in p or "tokens/" in p or "wte" in p]
    assert words == [*of["embedding"]]


def test_presets_of_a_mixture() -> None:
    config = tiny.config(next(case for case in tiny.CASES if case.startswith("mixtral")))
    kinds, layers = models.kinds(config), "model/layers"
    attention = {f"{layers}/self_attn/{n}_proj/kernel" for n in "qkvo"}
    experts = {f"{layers}/block_sparse_moe/experts/{n}/kernel" for n in ("w1", "w3", "w2")}
    assert adapted(config, "attention", kinds=kinds) == attention
    assert adapted(config, "experts", kinds=kinds) == experts
    both = adapted(config, ["attention", "gate"], kinds=kinds)
    assert both == attention | {f"{layers}/block_sparse_moe/gate/kernel"}
    assert adapted(config, ["all-linear", "lm_head"]) == adapted(config, "all-linear") | {
        "lm_head/kernel"
    }
    with pytest.raises(ValueError, match="'mlp'.*selects no leaf"):
        adapted(config, "mlp", kinds=kinds)
    with pytest.raises(ValueError, match=r"needs the kind of each leaf.*models\.kinds"):
        adapted(config, "attention")


def test_presets_train_in_full_and_on_a_tree_of_ones_own() -> None:
    config = ALL["gpt2"]
    tree, kinds = tree_of(config), models.kinds(config)
    trained = lj.split(lj.lorafy(tree, [lj.TrainRule(targets="attention")], kinds=kinds))[0]
    assert set(trained) == {path for path, kind in kinds.items() if kind == "attention"}
    own = {"mix": {"w": jax.ShapeDtypeStruct((5, 7), "float32")}}
    rules = [lj.LoraRule(targets="attention")]
    assert set(lj.split(lj.lorafy(own, rules, kinds={"mix/w": "attention"}))[0]) == {"mix/w"}
