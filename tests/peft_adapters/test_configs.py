"""What a PEFT configuration selects and how, by PEFT's rules written down by hand."""

import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from lora_jax.peft.config import read_config
from lora_jax.peft.copies import drop_repeated_tensors
from lora_jax.peft.experts import (
    join_gate_and_up,
    pack_expert_factors,
    unpack_expert_a,
    unpack_expert_b,
)
from lora_jax.peft.load import find_adapter_folder
from lora_jax.peft.modules import Module, list_modules, select_modules, sort_modules
from tests.support import assert_close, draw

PREFIX = "base_model.model."
TIED = models.Row(
    path="embed/embedding", hf="embed_tokens.weight", shape=(11, 5), aliases=("lm_head.weight",)
)
PROJ = models.Row(
    path="blocks/w", hf="decoder.block.{}.proj.weight", shape=(5, 7), stack=(4,), transpose=True
)
OUT = models.Row(path="out/kernel", hf="decoder.out.weight", shape=(7, 4), transpose=True)
BIAS = models.Row(path="out/bias", hf="decoder.out.bias", shape=(4,))
TABLE = [PROJ, OUT, BIAS]
PARAMS = {
    "blocks": {"w": draw(1, (4, 5, 7))},
    "out": {"kernel": draw(3, (7, 4)), "bias": draw(4, (4,))},
}


def names_of(model_type=None, **fields):
    """The names of the modules that a configuration targets."""
    config = read_config({"r": 2} | fields)
    return [module.name for module in select_modules(config, list_modules(TABLE), model_type)]


LAYERS = [f"decoder.block.{i}.proj" for i in range(4)]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"target_modules": ["proj"]}, LAYERS),
        ({"target_modules": ["roj", "out"]}, ["decoder.out"]),
        ({"target_modules": ["decoder.out"]}, ["decoder.out"]),
        ({"target_modules": r".*\.[12]\.proj"}, LAYERS[1:3]),
        ({"target_modules": r"\.proj|decoder\.out"}, ["decoder.out"]),  # a whole match
        ({"target_modules": ["proj"], "layers_to_transform": 2}, LAYERS[2:3]),
        ({"target_modules": ["proj"], "layers_to_transform": [3, 0]}, [LAYERS[0], LAYERS[3]]),
        ({"target_modules": ["proj"], "layers_to_transform": []}, LAYERS),
        (
            {"target_modules": ["proj"], "layers_to_transform": [1], "layers_pattern": "block"},
            LAYERS[1:2],
        ),
        (
            {"target_modules": ["proj"], "layers_to_transform": [1]}
            | {"layers_pattern": ["layers", "block"]},
            LAYERS[1:2],
        ),
        # A name in full is chosen whatever its layer.
        (
            {"target_modules": ["proj", LAYERS[3]], "layers_to_transform": [1]},
            [LAYERS[1], LAYERS[3]],
        ),
        ({"target_modules": ["proj", "out"], "layers_to_transform": [1]}, LAYERS[1:2]),
        ({"target_modules": ["proj", "out"], "exclude_modules": ["proj"]}, ["decoder.out"]),
        ({"target_modules": ["proj"], "exclude_modules": [LAYERS[0]]}, LAYERS[1:]),
        ({"target_modules": ["proj"], "exclude_modules": r".*\.[01]\.proj"}, LAYERS[2:]),
        ({"target_modules": ["proj"], "exclude_modules": r"\.[01]\.proj"}, LAYERS),
        ({"target_modules": ["proj", "out"], "modules_to_save": ["out"]}, LAYERS),
        ({"target_modules": ["proj", "out"], "modules_to_save": ["ou"]}, [*LAYERS, "decoder.out"]),
        ({"target_modules": ["proj", "out"], "modules_to_save": ["block"]}, ["decoder.out"]),
    ],
)
def test_modules_are_targeted_as_by_peft(fields, names):
    """PEFT's ``check_target_module_exists``."""
    assert names_of(**fields) == names


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["nothing"]}, r"\['nothing'\] matches none of the model's 5 modules"),
        ({"target_modules": None}, "target_modules is not set, and PEFT has no default for None"),
        (
            {"target_modules": ["proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
            "matches none",
        ),
    ],
)
def test_what_targets_nothing_is_refused(fields, message):
    with pytest.raises(lp.PeftError, match=message):
        names_of(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_parameters": ["decoder.out.weight"]}, "both select decoder.out"),
        ({"target_parameters": ["embed_tokens.weight"]}, "embed_tokens is an embedding"),
        ({"target_parameters": ["lm_head.weight"]}, "lm_head is no linear layer of its own"),
        ({"target_parameters": ["decoder.in.weight"]}, "no experts and no linear layers of this"),
        ({"target_parameters": ["proj.weight"], "lora_dropout": 0.1}, "lora_dropout cannot be"),
    ],
)
def test_parameters_that_are_not_read(fields, message):
    with pytest.raises(lp.PeftError, match=message):
        lp.rules({"r": 2, "target_modules": ["out"]} | fields, [*TABLE, TIED])


def test_tokens_of_an_untied_head_are_refused_with_the_reason():
    head = models.Row(path="lm_head/kernel", hf="lm_head.weight", shape=(7, 9), transpose=True)
    fields = {"r": 2, "target_modules": ["out"], "trainable_token_indices": {"lm_head": [1]}}
    with pytest.raises(lp.PeftError, match=r"a head of its own.*modules_to_save=\['lm_head'\]"):
        lp.rules(fields, [*TABLE, head])


def test_adapters_of_convolutions_are_refused_with_the_reason(tmp_path):
    fields = {"peft_type": "LORA", "r": 2, "target_modules": ["out", "conv"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    tensors = {
        f"{PREFIX}decoder.out.lora_A.weight": draw(1, (2, 7)),
        f"{PREFIX}decoder.out.lora_B.weight": draw(2, (4, 2)),
        f"{PREFIX}decoder.conv.lora_A.weight": draw(3, (2, 5, 3, 3)),
        f"{PREFIX}decoder.conv.lora_B.weight": draw(4, (6, 2, 1, 1)),
    }
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    save_file(arrays, tmp_path / "adapter_model.safetensors")
    with pytest.raises(lp.PeftError, match="convolution decoder.conv, and .* are not read"):
        lp.load(tmp_path, TABLE, PARAMS)


def test_a_folder_in_the_place_of_an_adapters_weights(tmp_path):
    fields = {"peft_type": "LORA", "r": 2, "target_modules": ["out"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    (tmp_path / "adapter_model.safetensors").mkdir()
    with pytest.raises(lp.PeftError, match="is a folder, but must be a file"):
        lp.load(tmp_path, TABLE, PARAMS)


def test_weights_of_linear_layers_are_adapted_by_their_names():
    fields = {
        "r": 2,
        "target_modules": ["out"],
        "target_parameters": ["proj.weight"],
        "rank_pattern": {r"2\.proj\.weight": 3, "proj": 5},
    }
    by_rank = {(rule.rank, rule.layers): rule.targets for rule in lp.rules(fields, TABLE)}
    assert by_rank == {
        (2, None): "out/kernel",
        (2, (0, 1, 3)): "blocks/w",
        (3, (2,)): "blocks/w",
    }


def test_targets_that_a_family_has_by_default():
    """PEFT's TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING: Llama's q_proj and v_proj."""
    rows = [
        models.Row(path=f"l/{name}/kernel", hf=f"m.{name}.weight", shape=(5, 5))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    ]
    config = read_config({"target_modules": None})
    chosen = select_modules(config, list_modules(rows), "llama")
    assert [module.name for module in chosen] == ["m.q_proj", "m.v_proj"]
    parameters = read_config({"target_modules": [], "target_parameters": ["experts.down_proj"]})
    assert select_modules(parameters, list_modules(rows), "llama") == []


def test_modules_stand_in_torchs_order():
    """A block's layers stand together; numbers count, and names stay as they come."""
    names = ["m.z", "m.h.10.b", "m.h.2.b", "m.h.2.a", "m.h.10.a", "m.a"]
    made = [Module(name, name, (), None, "all") for name in names]
    expected = ["m.z", "m.h.2.b", "m.h.2.a", "m.h.10.b", "m.h.10.a", "m.a"]
    assert [module.name for module in sort_modules(made)] == expected


def test_ranks_alphas_and_layers_become_rules():
    """s is alpha/r of each layer, or alpha/√r; layers without a target have rank 0."""
    config = {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["proj", "out"],
        "layers_to_transform": None,
        "rank_pattern": {r"block\.1\.proj": 3},
        "alpha_pattern": {"out": 5},
        "bias": "all",
        "lora_dropout": 0.25,
    }
    tree = jax.eval_shape(lambda: lj.lorafy(PARAMS, lp.rules(config, TABLE)))
    assert tree["blocks"]["w"].ranks == (2, 3, 2, 2)
    assert isinstance(tree["out"]["bias"], lj.Trained)
    for rslora in (False, True):
        real = lj.lorafy(PARAMS, lp.rules(config | {"use_rslora": rslora}, TABLE))
        power = 0.5 if rslora else 1
        expected = 6 / np.array([2, 3, 2, 2]) ** power
        assert_close(real["blocks"]["w"].scale, expected.astype("f4"), 1e-6)
        assert_close(real["out"]["kernel"].scale, np.float32(5 / 2**power), 1e-6)
        assert real["blocks"]["w"].dropout == 0.25


def test_both_factors_are_drawn_where_peft_does_not_begin_at_the_base():
    """init_lora_weights=False: A within 1/√in and B within 1/√r, near these bounds."""
    shape = lj.init.FactorShape(batch=(), fan_in=100, fan_out=200, rank=3)
    (rule,) = lp.rules({"target_modules": ["q"], "init_lora_weights": False})
    a, b = rule.init(jax.random.key(1), shape, np.float32)
    assert (a.shape, b.shape) == (shape.a, shape.b) == ((100, 3), (3, 200))
    for drawn, bound in ((a, 1 / np.sqrt(100)), (b, 1 / np.sqrt(3))):
        values = np.asarray(drawn)
        assert -bound <= values.min() < -0.95 * bound and 0.95 * bound < values.max() <= bound
        assert abs(values.mean()) < 0.15 * bound


@pytest.mark.parametrize("name", ["eva", "lora_ga", "mica"])
def test_starts_of_peft_alone_are_refused(name):
    with pytest.raises(
        lp.PeftError, match=f"init_lora_weights='{name}', PEFT .*lora_jax.peft.load"
    ):
        lp.rules({"target_modules": ["proj"], "init_lora_weights": name}, TABLE)


TIED_TABLE = [TIED, *TABLE]
TIED_FIELDS = {"r": 2, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head"]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rank_pattern": {"lm_head": 3}},
            r"embed_tokens and lm_head are tied to one table, .*rank_pattern gives them \[2, 3\]",
        ),
        ({"alpha_pattern": {"lm_head": 3}}, r"alpha_pattern gives them \[6, 3\]"),
        (
            {"alpha_pattern": {"lm_head": 3}, "ensure_weight_tying": True},
            "alpha_pattern gives embed_tokens 6 and lm_head 3, but the two share an adapter",
        ),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save holds lm_head, which is tied"),
        ({"modules_to_save": ["none"]}, r"modules_to_save=\['none'\] matches none"),
        (
            {"trainable_token_indices": {"word": [1]}},
            "trainable_token_indices names 'word', which is no embedding.*embed_tokens",
        ),
        (
            {"target_modules": ["proj"]}
            | {"trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [1, 4]}},
            "has other tokens for 'lm_head' than for embed_tokens",
        ),
    ],
)
def test_what_tied_tables_cannot_have(fields, message):
    with pytest.raises(lp.PeftError, match=message):
        lp.rules(TIED_FIELDS | fields, TIED_TABLE)


def test_tokens_of_a_tied_head_are_those_of_its_table():
    tokens = {"embed_tokens": [1, 3], "lm_head": [3, 1]}
    config = {"r": 2, "target_modules": ["proj"], "trainable_token_indices": tokens}
    (rows,) = [rule for rule in lp.rules(config, TIED_TABLE) if isinstance(rule, lj.TrainRule)]
    assert sorted(rows.rows) == [1, 3]
    listed = lp.rules(config | {"trainable_token_indices": [4, 2]}, TIED_TABLE)
    assert [sorted(rule.rows) for rule in listed if isinstance(rule, lj.TrainRule)] == [[2, 4]]
    with pytest.raises(lp.PeftError, match="the model has no embedding"):
        lp.rules(config | {"trainable_token_indices": [4, 2]}, TABLE)


def test_copies_of_a_tied_head_are_dropped():
    """A head's A is its table's B turned, and its B is its table's A; only exact copies go."""
    rng = np.random.default_rng(2)
    of_a, of_b = rng.standard_normal((2, 11)), rng.standard_normal((5, 2))
    base = rng.standard_normal((11, 5))
    table, head = f"{PREFIX}embed_tokens.", f"{PREFIX}lm_head."
    tensors = {
        f"{table}lora_embedding_A": of_a,
        f"{table}lora_embedding_B": of_b,
        f"{table}base_layer.weight": base,
        f"{head}lora_A.weight": of_b.T,
        f"{head}lora_B.weight": of_a.T,
        f"{head}base_layer.weight": base.copy(),
    }
    kept = drop_repeated_tensors(tensors, [TIED], "file")
    assert set(kept) == {key for key in tensors if key.startswith(table)}
    assert set(drop_repeated_tensors(tensors, [], "file")) == set(tensors)
    for name in ("lora_A.weight", "lora_B.weight", "base_layer.weight"):
        other = tensors | {f"{head}{name}": tensors[f"{head}{name}"] + 1}
        assert set(drop_repeated_tensors(other, [TIED], "file")) - set(kept) == {f"{head}{name}"}
    with pytest.raises(lp.PeftError, match="file has .*lm_head.lora_magnitude_vector"):
        drop_repeated_tensors(tensors | {f"{head}lora_magnitude_vector": of_a}, [TIED], "file")
    wrapped = {
        "m.modules_to_save.bias": np.ones(3),
        "m.bias": np.ones(3),
        "n.modules_to_save.bias": np.ones(3),
        "n.bias": np.zeros(3),
        "o.original_module.bias": np.ones(3),
        "p.modules_to_save.bias": np.ones(3),
    }
    kept = drop_repeated_tensors(wrapped, [], "file")
    assert set(kept) == {"m.bias", "n.modules_to_save.bias", "n.bias", "p.modules_to_save.bias"}


EXPERTS, RANK, N_IN, N_OUT = 3, 2, 5, 7


def half(seed, scale):
    rng = np.random.default_rng(seed)
    shapes = ((EXPERTS, RANK, N_IN), (EXPERTS, RANK, N_OUT))
    return (*(rng.standard_normal(shape).astype("f4") for shape in shapes), scale)


def change(factors):
    a, b, scale = factors
    return scale * np.einsum("eri,ero->eio", a, b)


@pytest.mark.parametrize("halves", ["both", "shared A", "shared A, two scales", "gate", "up"])
def test_two_halves_of_one_parameter(halves):
    """gate_up_proj's change is [gate, up]; a half without an adapter has none."""
    gate, up = half(1, 1.5), half(2, 0.5)
    if halves.startswith("shared A"):
        up = (gate[0], up[1], 0.5 if "two" in halves else 1.5)
    given = {"gate": (gate, None), "up": (None, up)}.get(halves, (gate, up))
    nothing = np.zeros((EXPERTS, N_IN, N_OUT))
    expected = [nothing if factors is None else change(factors) for factors in given]
    joined = join_gate_and_up(*given)
    assert_close(change(joined), np.concatenate(expected, axis=-1), 1e-5)
    rank = 2 * RANK if halves in ("both", "shared A, two scales") else RANK
    assert joined[0].shape == (EXPERTS, rank, N_IN)
    assert joined[1].shape == (EXPERTS, rank, 2 * N_OUT)


def test_packed_experts_are_unpacked():
    """PEFT's A is [experts·r, in], and B is [out, r·experts], the experts innermost."""
    a, b, _ = half(3, 1.0)
    packed_a, packed_b = pack_expert_factors(a, b)
    for expert in range(EXPERTS):
        rows = slice(expert * RANK, (expert + 1) * RANK)
        np.testing.assert_array_equal(packed_a[rows], a[expert])
        np.testing.assert_array_equal(packed_b[:, expert::EXPERTS], b[expert].T)
    np.testing.assert_array_equal(unpack_expert_a(packed_a, EXPERTS), a)
    np.testing.assert_array_equal(unpack_expert_b(packed_b, EXPERTS, None), b)
    wide = np.concatenate([packed_b, packed_b + 1])
    np.testing.assert_array_equal(unpack_expert_b(wide, EXPERTS, 0), b)
    np.testing.assert_array_equal(unpack_expert_b(wide, EXPERTS, 1), b + 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"r": 2.0}, r"r=2\.0"),
        ({"r": 10**6}, "r=1000000"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"bias": "some"}, "bias='some'"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern="),
        ({"layers_to_transform": [-1]}, "layers_to_transform="),
        ({"trainable_token_indices": {"e": [1.0]}}, "trainable_token_indices="),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', but .* only LORA, VERA, TINYLORA"),
    ],
)
def test_values_that_peft_would_not_write(fields, message):
    with pytest.raises(lp.PeftError, match=message):
        read_config({"target_modules": ["q"]} | fields)


def test_values_at_the_bounds_are_read():
    fields = {"r": 1, "lora_alpha": 0.5, "lora_dropout": 0.99, "layers_to_transform": [0]}
    config = read_config({"target_modules": {"v", "q"}, "rank_pattern": {"q": 1}} | fields)
    assert {name: config[name] for name in fields} == fields
    assert config["target_modules"] == ["q", "v"]
    for pattern in ("rank_pattern", "alpha_pattern"):  # PEFT's fields may be None, in files null
        assert not read_config({"target_modules": ["q"], pattern: None})[pattern]
    source = SimpleNamespace(to_dict=lambda: {"target_modules": ("v", "k"), "r": 7})
    assert read_config(source)["target_modules"] == ["k", "v"] and read_config(source)["r"] == 7


def test_an_adapter_is_found_in_its_folder(tmp_path):
    for name in ("", "one", "two"):
        folder = tmp_path / "several" / name
        folder.mkdir(exist_ok=True, parents=True)
        if name:
            (folder / "adapter_config.json").write_text("{}")
    several = tmp_path / "several"
    assert find_adapter_folder(several, "two") == several / "two"
    assert find_adapter_folder(several / "one", None) == several / "one"
    assert find_adapter_folder(several / "one", "default") == several / "one"
    with pytest.raises(lp.PeftError, match="several adapters: one, two. Choose one with adapter="):
        find_adapter_folder(several, None)
    with pytest.raises(lp.PeftError, match="PEFT adapter: adapter_config.json is missing"):
        find_adapter_folder(several, "three")
    with pytest.raises(lp.PeftError, match="is not a folder"):
        find_adapter_folder(several / "one/adapter_config.json", None)
    with pytest.raises(lp.PeftError, match="neither a folder on this machine nor a hub name"):
        find_adapter_folder(f"{tmp_path}/none", None)


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {key: np.ascontiguousarray(tensor, np.float32) for key, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_a_file_is_read_layer_by_layer(tmp_path):
    """W + (alpha/r)·(BA)ᵀ of the layers that have factors; a saved module takes its place."""
    rng = np.random.default_rng(4)
    tensors = {}
    for layer in (1, 3):
        tensors[f"{PREFIX}{LAYERS[layer]}.lora_A.weight"] = rng.standard_normal((2, 5))
        tensors[f"{PREFIX}{LAYERS[layer]}.lora_B.weight"] = rng.standard_normal((7, 2))
    tensors[f"{PREFIX}decoder.out.weight"] = rng.standard_normal((4, 7))
    tensors[f"{PREFIX}decoder.out.bias"] = rng.standard_normal(4)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "target_modules": ["proj"]}
    config |= {"layers_to_transform": [1, 3], "modules_to_save": ["out"]}
    tree = lp.load(write(tmp_path / "a", config, tensors), TABLE, PARAMS)
    merged = jax.device_get(lj.merge(tree))
    base = np.asarray(PARAMS["blocks"]["w"])
    for layer in range(4):
        expected = base[layer]
        if layer in (1, 3):
            a, b = (tensors[f"{PREFIX}{LAYERS[layer]}.lora_{name}.weight"] for name in "AB")
            expected = expected + 5 / 2 * (b @ a).T
        assert_close(merged["blocks"]["w"][layer], expected, 1e-5)
    assert_close(merged["out"]["kernel"], tensors[f"{PREFIX}decoder.out.weight"].T, 1e-6)
    assert_close(merged["out"]["bias"], tensors[f"{PREFIX}decoder.out.bias"], 1e-6)
    with pytest.raises(lp.PeftError, match="tree is already adapted"):
        lp.load(tmp_path / "a", TABLE, tree)
    small = PARAMS | {"out": PARAMS["out"] | {"kernel": draw(3, (7, 3))}}
    with pytest.raises(lp.PeftError, match=re.escape("has (7, 3) at 'out/kernel', and 0 more")):
        lp.load(tmp_path / "a", TABLE, small)
    with pytest.raises(lp.PeftError, match="model is a str.*lora_jax.models"):
        lp.load(tmp_path / "a", "model", PARAMS)
