"""VeRA's and TinyLoRA's files, written by hand, and PEFT's formulas for them in NumPy."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from lora_jax.peft.kinds.generator import draw_normal, draw_uniform
from tests.support import assert_close, draw, lorafied, with_random_factors

PREFIX = "base_model.model."
TABLE = [
    models.Row(
        path="blocks/w",
        hf="blocks.{}.proj.weight",
        shape=(5, 7),
        stack=(3,),
        transpose=True,
    ),
    models.Row(path="embed/embedding", hf="embed.weight", shape=(11, 5)),
    models.Row(path="out/kernel", hf="out.weight", shape=(7, 4), transpose=True),
]
PARAMS = {
    "blocks": {"w": draw(1, (3, 5, 7))},
    "embed": {"embedding": draw(2, (11, 5))},
    "out": {"kernel": draw(3, (7, 4))},
}
SIZES = {"blocks.0.proj": (5, 7), "blocks.2.proj": (5, 7), "out": (7, 4)}
RANK = 2


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {key: np.ascontiguousarray(tensor, np.float32) for key, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def changes(tree):
    """Returns the change of each kernel by the name of its module, [in, out]."""
    merged = jax.device_get(jax.tree.map(np.subtract, lj.merge(tree), PARAMS))
    by_name = {f"blocks.{layer}.proj": merged["blocks"]["w"][layer] for layer in range(3)}
    return by_name | {"out": merged["out"]["kernel"], "embed": merged["embed"]["embedding"]}


def check(tree, expected):
    """Compares changes with those expected; other modules have none."""
    for name, change in changes(tree).items():
        wanted = expected.get(name, np.zeros_like(change))
        assert_close(change, wanted, 1e-5)


VERA = {
    "peft_type": "VERA",
    "r": RANK,
    "target_modules": ["proj", "out"],
    "layers_to_transform": None,
    "vera_dropout": 0.25,
}


def vera_vectors():
    vectors = {}
    for seed, (name, (_, n_out)) in enumerate(SIZES.items()):
        vectors[f"{PREFIX}{name}.vera_lambda_d"] = random(seed + 10, RANK)
        vectors[f"{PREFIX}{name}.vera_lambda_b"] = random(seed + 20, n_out)
    return vectors


def vera_changes(vectors, a, b):
    """PEFT's ``get_delta_weight``: (λ_b ∘ B[:out]) (λ_d ∘ A[:, :in]), [out, in]."""
    expected = {}
    for name, (n_in, n_out) in SIZES.items():
        d = vectors[f"{PREFIX}{name}.vera_lambda_d"][:, None]
        of_b = vectors[f"{PREFIX}{name}.vera_lambda_b"][:, None]
        expected[name] = ((of_b * b[:n_out]) @ (d * a[:, :n_in])).T
    return expected


@pytest.mark.parametrize("saves", [True, False])
def test_vera_is_read_as_peft_computes_it(saves, tmp_path):
    """Both matrices are as wide as the widest layer; without them, PEFT's seed draws them."""
    a, b = random(1, RANK, 7), random(2, 7, RANK)
    vectors = {key: value for key, value in vera_vectors().items() if "blocks.1" not in key}
    tensors, config = dict(vectors), VERA | {"target_modules": ["blocks.0.proj", "blocks.2.proj"]}
    config["target_modules"].append("out")
    if saves:
        tensors |= {"base_model.vera_A": a, "base_model.vera_B": b}
    else:
        config |= {"save_projection": False, "projection_prng_key": 17}
        drawn = draw_uniform(17, (RANK * (7 + 7),))
        # torch's kaiming_uniform_ of a fan of 7, then of a fan of 2, by one generator.
        a = (2 * drawn[: RANK * 7].reshape(RANK, 7) - 1) * np.sqrt(6 / 7)
        b = (2 * drawn[RANK * 7 :].reshape(7, RANK) - 1) * np.sqrt(6 / RANK)
    folder = write(tmp_path / "a", config, tensors)
    tree = lp.load(folder, TABLE, PARAMS)
    check(tree, vera_changes(vectors, a, b))
    node = tree["blocks"]["w"]
    assert (node.ranks, node.dropout) == ((2, 0, 2), 0.25)
    np.testing.assert_array_equal(node.scale, [1, 0, 1])
    np.testing.assert_array_equal(node.lambda_d[1], np.zeros(RANK))
    assert "seed" not in node.arrays  # nobody can draw these again
    for array in lj.split(tree)[0]["out/kernel"].values():
        assert array.dtype == np.float32


def test_vera_is_written_with_its_scale(tmp_path):
    """PEFT has no alpha: λ_b holds s. The widest layers give the shared matrices."""
    rule = lj.LoraRule(targets=["w", "out"], rank=RANK, alpha=7.0, vera=True, dropout=0.25)
    tree = with_random_factors(lorafied(PARAMS, [rule]))
    lp.save(tmp_path / "a", TABLE, tree)
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    a, b = tensors["base_model.vera_A"], tensors["base_model.vera_B"]
    assert (a.shape, b.shape) == ((RANK, 7), (7, RANK))
    names = [f"blocks.{layer}.proj" for layer in range(3)]
    assert set(tensors) == {"base_model.vera_A", "base_model.vera_B"} | {
        f"{PREFIX}{name}.vera_lambda_{part}" for name in [*names, "out"] for part in "db"
    }
    merged = changes(tree)
    for name in [*names, "out"]:
        d, of_b = (tensors[f"{PREFIX}{name}.vera_lambda_{part}"][:, None] for part in "db")
        n_in, n_out = merged[name].shape
        assert_close(((of_b * b[:n_out]) @ (d * a[:, :n_in])).T, merged[name], 1e-5)
    node = tree["blocks"]["w"]
    assert_close(tensors[f"{PREFIX}blocks.1.proj.vera_lambda_d"], np.asarray(node.lambda_d[1]), 0)
    written = json.loads((tmp_path / "a/adapter_config.json").read_text())
    wanted = {
        "peft_type": "VERA",
        "r": RANK,
        "vera_dropout": 0.25,
        "save_projection": True,
        "projection_prng_key": 0,
        "bias": "none",
        "layers_to_transform": None,
    }
    assert {name: written[name] for name in wanted} == wanted
    assert not {"lora_alpha", "lora_dropout"} & set(written)
    check(lp.load(tmp_path / "a", TABLE, PARAMS), merged)


TINY = {
    "peft_type": "TINYLORA",
    "r": RANK,
    "u": 3,
    "target_modules": ["blocks.0.proj", "blocks.2.proj", "out", "embed"],
}


def tiny_tensors(n_vectors):
    tensors = {f"base_model.tinylora_v.{i}": random(i + 40, 3) for i in range(n_vectors)}
    for seed, (name, (n_in, n_out)) in enumerate((SIZES | {"embed": (5, 11)}).items()):
        stem = f"{PREFIX}{name}.tinylora_"
        tensors |= {
            f"{stem}A": random(seed + 50, RANK, n_in),
            f"{stem}B": random(seed + 60, n_out, RANK),
            f"{stem}P": random(seed + 70, 3, RANK, RANK),
        }
    return tensors


ORDER = ["blocks.0.proj", "blocks.2.proj", "embed", "out"]


def tiny_changes(tensors, groups):
    """PEFT's ``get_delta_weight``: B (Σ vᵢPᵢ) A, [out, in]; of a table, [rows, features]."""
    expected = {}
    for name, group in zip(ORDER, groups, strict=True):
        a, b, p = (tensors[f"{PREFIX}{name}.tinylora_{part}"] for part in "ABP")
        latent = np.einsum("u,ujk->jk", tensors[f"base_model.tinylora_v.{group}"], p)
        change = b @ latent @ a
        expected[name] = change if name == "embed" else change.T
    return expected


# PEFT's max(1, round(4·(1 − tying))) groups of 4 // groups modules; the last takes what is left.
@pytest.mark.parametrize(
    ("tying", "groups"), [(0.0, (0, 1, 2, 3)), (0.3, (0, 1, 2, 2)), (0.5, (0, 0, 1, 1))]
)
def test_tinylora_both_ways(tying, groups, tmp_path):
    tensors = tiny_tensors(max(groups) + 1)
    folder = write(tmp_path / "a", TINY | {"weight_tying": tying}, tensors)
    tree = lp.load(folder, TABLE, PARAMS)
    check(tree, tiny_changes(tensors, groups))
    assert lj.count_params(tree)[0] == 3 * (max(groups) + 1)
    lp.save(tmp_path / "b", TABLE, tree)
    written = load_file(tmp_path / "b/adapter_model.safetensors")
    assert set(written) == set(tensors)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor, key)
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert (config["peft_type"], config["u"], config["r"]) == ("TINYLORA", 3, RANK)
    n = len(ORDER)
    assert max(1, round(n * (1 - config["weight_tying"]))) == max(groups) + 1


def test_tinylora_draws_what_a_file_lacks(tmp_path):
    """P of module number i is normal by the seed plus i, divided by √r."""
    tensors = tiny_tensors(4)
    lacking = {key: value for key, value in tensors.items() if not key.endswith("_P")}
    config = TINY | {"save_projection": False, "projection_seed": 7}
    tree = lp.load(write(tmp_path / "a", config, lacking), TABLE, PARAMS)
    drawn = {
        f"{PREFIX}{name}.tinylora_P": draw_normal(7 + i, (3, RANK, RANK)) / np.sqrt(RANK)
        for i, name in enumerate(ORDER)
    }
    check(tree, tiny_changes(tensors | drawn, range(4)))


def test_tinylora_is_written_with_its_scale(tmp_path):
    rule = lj.LoraRule(
        targets=["w", "out"], rank=RANK, alpha=7.0, tinylora=True, u=3, weight_tying=1.0
    )
    tree = with_random_factors(lorafied(PARAMS, [rule]))
    lp.save(tmp_path / "a", TABLE, tree)
    again = lp.load(tmp_path / "a", TABLE, PARAMS)
    check(again, changes(tree))
    assert lj.count_params(again)[0] == 3
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert 1 - config["weight_tying"] == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("VERA", {"projection_prng_key": -1}, "projection_prng_key=-1"),
        ("VERA", {"projection_prng_key": 2**32}, "projection_prng_key=4294967296"),
        ("VERA", {"projection_prng_key": 1.0}, "projection_prng_key=1.0"),
        ("VERA", {"save_projection": 1}, "save_projection=1"),
        ("VERA", {"vera_dropout": 2.0}, "lora_dropout=2.0"),
        ("VERA", {"odd": True}, "odd=True is not known"),
        ("TINYLORA", {"u": 0}, "would not write u=0"),
        ("TINYLORA", {"u": 2.0}, "would not write u=2.0"),
        ("TINYLORA", {"weight_tying": 1.5}, "weight_tying=1.5"),
        ("TINYLORA", {"weight_tying": -0.1}, "weight_tying=-0.1"),
        ("TINYLORA", {"projection_seed": 2**31}, "projection_seed=2147483648"),
        ("TINYLORA", {"save_projection": 0}, "save_projection=0"),
    ],
)
def test_values_that_peft_would_not_write(kind, fields, message):
    config = {"peft_type": kind, "r": 4, "target_modules": ["q_proj"]}
    with pytest.raises(lp.PeftError, match=message):
        lp.rules(config | fields)


def test_values_at_the_bounds_and_defaults():
    """PEFT's defaults: r is 256 of VeRA, and 2 of TinyLoRA; s is 1 whatever r is."""
    config = {"peft_type": "VERA", "target_modules": ["q_proj"], "bias": "vera_only"}
    (rule,) = lp.rules(config | {"projection_prng_key": 2**32 - 1, "vera_dropout": 0.125})
    assert (rule.vera, rule.rank, rule.scale, rule.dropout) == (True, 256, 1.0, 0.125)
    assert rule.train_bias
    config = {"peft_type": "TINYLORA", "target_modules": ["q_proj"], "weight_tying": 1}
    (rule,) = lp.rules(config | {"projection_seed": 2**31 - 1, "u": 1})
    assert (rule.tinylora, rule.rank, rule.scale, rule.u) == (True, 2, 1.0, 1)
    assert (rule.weight_tying, rule.dropout, rule.train_bias) == (1, 0.0, False)


V = {"vera": True, "rank": 3}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [lj.LoraRule(targets=["w"], **V), lj.LoraRule(targets=["out"], rank=3)],
            "'out/kernel' is adapted differently from VeRA.*vera=True in all rules",
        ),
        (
            [lj.LoraRule(targets=["w"], **V), lj.LoraRule(targets=["out"], **V | {"rank": 2})],
            r"VeRA has one r for all modules, .*\[2, 3\]",
        ),
        ([lj.LoraRule(targets=["embed"], **V)], "embed is an embedding table, but PEFT's VeRA"),
        (
            [lj.TrainRule(targets=["embed"], rows=[3]), lj.LoraRule(targets=["w"], **V)],
            "VeRA has no trainable_token_indices",
        ),
        (
            [
                lj.LoraRule(targets=["w"], rank=2, tinylora=True, u=2),
                lj.LoraRule(targets=["out"], rank=2, tinylora=True, u=3),
            ],
            r"TinyLoRA has one u for all modules, .*\[2, 3\]",
        ),
    ],
)
def test_what_a_file_of_one_kind_cannot_hold(rules, message, tmp_path):
    with pytest.raises(lp.PeftError, match=message):
        lp.save(tmp_path / "a", TABLE, lj.lorafy(PARAMS, rules))


def test_a_pair_of_another_draw_is_refused(tmp_path):
    """PEFT has one A for all modules, of which each takes the first columns."""
    tree = lorafied(PARAMS, [lj.LoraRule(targets=["w", "out"], **V)])
    for name in ("shared_a", "shared_b"):
        changed = tree["out"]["kernel"].arrays[name] + 1
        other = tree | {"out": {"kernel": tree["out"]["kernel"].replace(**{name: changed})}}
        with pytest.raises(lp.PeftError, match=f"The random {name[-1].upper()} of .* differs"):
            lp.save(tmp_path / name, TABLE, other)
