"""Adapters that PEFT wrote, without PEFT: their logits, and that no damaged one loads."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from tests.core.coded import decoded, is_on, with_coded_kernels
from tests.peft_adapters.make_fixtures import ADAPTERS, FIXTURES, IDS
from tests.peft_adapters.models import forward_of
from tests.support import assert_close, assert_identical, lorafied, over, with_random_factors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


TOKENS = np.asarray(IDS, np.int32)


def base(name):
    return of_family(ADAPTERS[name][0])


@functools.cache
def of_family(family):
    return models.from_pretrained(FIXTURES / "models" / family)


@functools.cache
def plain_logits(family):
    model, params = of_family(family)
    return np.asarray(jax.jit(model.apply)({"params": params}, TOKENS))


def logits(name, tree):
    return np.asarray(forward_of(base(name)[0])({"params": tree}, TOKENS))


# Those whose logits the fast suite compares: each base and initialiser takes a program more.
OFTEN = {*ADAPTERS} - {"pissa", "tied-head", "embedding-head", "bert"}


def shapes_of(params, rules):
    """The adapted tree, abstract: nothing is drawn."""
    return jax.eval_shape(lambda: lj.lorafy(params, rules))


@over("name", ADAPTERS, often=OFTEN)
def test_logits_are_those_of_peft(name):
    tree = lp.load(FIXTURES / name, *base(name))
    expected = np.load(FIXTURES / name / "logits.npy")
    assert_close(logits(name, tree), expected, 1e-5)
    assert np.abs(plain_logits(ADAPTERS[name][0]) - expected).max() > 1e-2


@over("name", ADAPTERS, often=OFTEN)
def test_load_save_load_is_bitwise(name, tmp_path):
    model, params = base(name)
    tree = lp.load(FIXTURES / name, model, params)
    lp.save(tmp_path / "a", model, tree, base_model="owner/name", task_type="CAUSAL_LM")
    again = lp.load(tmp_path / "a", model, params)
    lp.save(tmp_path / "b", model, again, base_model="owner/name", task_type="CAUSAL_LM")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert_identical(lp.load(tmp_path / "b", model, params), again)
    if name != "pissa":  # which becomes a plain LoRA of twice the rank
        assert_identical(again, tree)
    assert_close(logits(name, again), logits(name, tree), 1e-6)
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("owner/name", "CAUSAL_LM")
    if name == "pissa":
        assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (6, 14, True)


def test_rules_train_what_a_config_says(tmp_path):
    model, params = base("ranks-alphas-rslora")
    rules = lp.rules(FIXTURES / "ranks-alphas-rslora", model)
    tree = shapes_of(params, rules)
    loaded = lp.load(FIXTURES / "ranks-alphas-rslora", model, params)
    assert jax.tree.structure(tree) == jax.tree.structure(loaded)
    for path, parts in lj.split(tree)[0].items():
        assert jax.tree.map(np.shape, parts) == jax.tree.map(np.shape, lj.split(loaded)[0][path])


def test_rules_without_a_model():
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "self_attn.v_proj"],
        "bias": "none",
    }
    (rule,) = lp.rules(config)
    expected = lj.LoraRule(targets=["q_proj", "self_attn/v_proj"], rank=8, alpha=16, dropout=0.05)
    assert rule == expected
    with pytest.raises(lp.PeftError, match="target_modules.*depend on the model"):
        lp.rules(config | {"target_modules": r".*\.(q|v)_proj"})


def test_a_key_table_takes_the_models_place():
    """Another tree, other names: PyTorch's `decoder.block.{i}.proj` is our `blocks/w`."""
    rows = [
        models.Row(path="blocks/w", hf="decoder.block.{}.proj.weight", shape=(5, 7), stack=(3,),
                   transpose=True),
        models.Row(path="out/kernel", hf="out.weight", shape=(7, 4), transpose=True),
    ]  # fmt: skip
    params = {"blocks": {"w": np.ones((3, 5, 7), "f4")}, "out": {"kernel": np.ones((7, 4), "f4")}}
    config = {"target_modules": ["proj"], "r": 2, "lora_alpha": 6, "layers_to_transform": [0, 2]}
    tree = shapes_of(params, lp.rules(config, rows))
    assert set(lj.split(tree)[0]) == {"blocks/w"}
    assert tree["blocks"]["w"].ranks == (2, 0, 2)


@pytest.mark.parametrize(
    ("said", "task", "selected"),
    [
        (None, "CAUSAL_LM", {"block/kernel", "out/kernel"}),
        ("head", "CAUSAL_LM", {"block/kernel"}),
        ("classifier", "CAUSAL_LM", {"block/kernel", "out/kernel"}),
        ("classifier", "SEQ_CLS", {"block/kernel"}),
    ],
)
def test_a_key_table_says_what_is_no_linear_layer(said, task, selected):
    """A head is left out by its role, whatever its name."""
    role = None if said is None else "mlp"
    rows = [
        models.Row(path="block/kernel", hf="block.weight", shape=(5, 7), kind=role),
        models.Row(path="out/kernel", hf="out.weight", shape=(7, 4), kind=said),
    ]
    params = {"block": {"kernel": np.ones((5, 7), "f4")}, "out": {"kernel": np.ones((7, 4), "f4")}}
    rules = lp.rules({"target_modules": "all-linear", "task_type": task}, rows)
    assert set(lj.split(shapes_of(params, rules))[0]) == selected


def test_an_existing_folder_is_not_replaced_unless_asked(tmp_path):
    model, params = base("dora")
    tree = lp.load(FIXTURES / "dora", model, params)
    lp.save(tmp_path / "a", model, tree)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        lp.save(tmp_path / "a", model, tree)
    lp.save(tmp_path / "a", model, tree, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not the folder of an adapter"):
        lp.save(tmp_path / "other", model, tree, overwrite=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_peft_cannot_hold(tmp_path):
    model, params = base("dora")
    q, v = (lj.LoraRule(targets=[f"{n}_proj"], rank=2, dora=n == "q") for n in "qv")
    with pytest.raises(lp.PeftError, match="one use_dora for all modules"):
        lp.save(tmp_path / "a", model, shapes_of(params, [q, v]))
    both = lj.LoraRule(targets=["q_proj", "v_proj"], rank=2)
    one_bias = lj.TrainRule(targets=r".*q_proj/bias")
    with pytest.raises(lp.PeftError, match="the biases of all modules, or of all adapted"):
        lp.save(tmp_path / "a", model, lj.lorafy(params, [one_bias, both]))
    own = lj.Part("own", ("batch", "rank"), lambda node: np.ones(node.shape_of("own")))
    with pytest.raises(lp.PeftError, match="has the array 'own', which PEFT's files cannot"):
        rule = lj.LoraRule(targets=["q_proj"], rank=2, extras=[own])
        lp.save(tmp_path / "a", model, shapes_of(params, [rule]))
    with pytest.raises(lp.PeftError, match="no adapter to save"):
        lp.save(tmp_path / "a", model, params)
    assert not list(tmp_path.iterdir())


def test_a_base_that_is_no_array(tmp_path):
    """Codes with scales are one leaf: an adapter is written and read beside them."""
    model, params = base("embedding-head")
    rules = [lj.LoraRule(targets=["embed_tokens", "lm_head", "q_proj"], rank=2, alpha=3.0)]
    params = with_coded_kernels(params, rules)
    tree = with_random_factors(lorafied(params, rules))
    assert is_on(tree)
    lp.save(tmp_path / "a", model, tree)
    assert_identical(lp.load(tmp_path / "a", model, params), tree)
    # Beside arrays, the tables that PEFT saves are what the codes stand for.
    plain = decoded(params)
    loaded = lp.load(tmp_path / "a", model, plain)
    _, base_of_arrays = lj.split(shapes_of(plain, rules))
    assert jax.tree.structure(lj.split(loaded)[1]) == jax.tree.structure(base_of_arrays)
    assert_identical(lj.split(loaded)[0], lj.split(tree)[0])
    assert_identical(lj.strip(loaded), plain)


def test_tables_that_are_saved_without_being_adapted(tmp_path):
    """PEFT's save_embedding_layers: the file's table takes the place of the base's."""
    model, params = base("tied-head")
    shutil.copytree(FIXTURES / "tied-head", tmp_path / "a")
    changed_config(target_modules=["v_proj"])(tmp_path / "a")
    table = np.asarray(params["model"]["embed_tokens"]["embedding"]) + np.float32(0.5)

    def change(t):
        for key in [key for key in t if "lm_head" in key]:
            del t[key]
        t["base_model.model.model.embed_tokens.weight"] = table

    changed_tensors(change)(tmp_path / "a")
    tree = lp.load(tmp_path / "a", model, params)
    np.testing.assert_array_equal(tree["model"]["embed_tokens"]["embedding"], table)


@pytest.mark.parametrize(
    ("hf", "alias", "dora", "message"),
    [
        ("words.weight", "decoder.weight", False, "words and decoder are tied.*uses='lookup'"),
        ("embed_tokens.weight", "lm_head.weight", True, "each use of a tied table.*uses='lookup'"),
    ],
)
def test_tied_tables_that_peft_cannot_hold(hf, alias, dora, message, tmp_path):
    row = models.Row(path="table/embedding", hf=hf, shape=(5, 7), aliases=(alias,))
    params = {"table": {"embedding": np.ones((5, 7), "f4")}}
    rule = lj.LoraRule(targets=["table"], rank=2, dora=dora)
    with pytest.raises(lp.PeftError, match=message):
        lp.save(tmp_path / "a", [row], shapes_of(params, [rule]))
    one_use = lj.LoraRule(targets=["table"], rank=2, uses="lookup")
    lp.save(tmp_path / "a", [row], lj.lorafy(params, [one_use]))


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda"])
def test_starts_that_peft_draws_again_are_refused_with_a_remedy(init, tmp_path):
    model, params = base("dora")
    shutil.copytree(FIXTURES / "dora", tmp_path / "a")
    changed_config(init_lora_weights=init)(tmp_path / "a")
    with pytest.raises(lp.PeftError, match="path_initial_model_for_weight_conversion"):
        lp.load(tmp_path / "a", model, params)


# ---- damaged folders ------------------------------------------------------------------------


def changed_config(**changes):
    def mutate(folder):
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return mutate


def cut(file, share):
    def mutate(folder):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    return mutate


def written(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def without(file):
    return lambda folder: (folder / file).unlink()


def changed_tensors(change):
    def mutate(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return mutate


def of_key(key):
    """Ways to spoil one tensor."""

    def rename(t):
        t[key.replace("model", "modell", 1)] = t.pop(key)

    def wider(t):
        t[key] = np.concatenate([t[key], t[key]], axis=-1)

    def flat(t):
        t[key] = t[key].reshape(-1, 1, 1)

    def whole_numbers(t):
        t[key] = t[key].astype(np.int32)

    def shorter(t):
        t[key] = np.ascontiguousarray(t[key][:-1])

    return {
        f"{key} missing": changed_tensors(lambda t: t.pop(key)),
        f"{key} renamed": changed_tensors(rename),
        f"{key} twice as wide": changed_tensors(wider),
        f"{key} flattened": changed_tensors(flat),
        f"{key} of integers": changed_tensors(whole_numbers),
        f"{key} cut short": changed_tensors(shorter),
    }


def mutations():
    """(fixture, what is wrong with it, the change that makes it so)."""
    for name in ADAPTERS:
        common = {
            "no config": without(CONFIG),
            "no weights": without(WEIGHTS),
            "config is empty": written(CONFIG, b""),
            "config is a list": written(CONFIG, b"[1, 2]"),
            "config is no text": written(CONFIG, b"\xff\xfe\x00"),
            "weights are empty": written(WEIGHTS, b""),
            "weights are text": written(WEIGHTS, b"not a file of tensors, for all its length"),
            "weights with a header alone": cut(WEIGHTS, 0.3),
            "weights half": cut(WEIGHTS, 0.6),
            "weights nearly whole": cut(WEIGHTS, 0.99),
            "config half": cut(CONFIG, 0.5),
            "rank too large": changed_config(r=4),
            "absurd rank": changed_config(r=10**6 - 1),
            "more absurd rank": changed_config(r=10**12),
            "no rank": changed_config(r=0),
            "negative rank": changed_config(r=-3),
            "rank in words": changed_config(r="three"),
            "rank is no integer": changed_config(r=3.5),
            "alpha zero": changed_config(lora_alpha=0),
            "alpha in words": changed_config(lora_alpha="7"),
            "another method": changed_config(peft_type="IA3"),
            "targets nothing": changed_config(target_modules=["nowhere"]),
            "targets of the wrong kind": changed_config(target_modules=[3]),
            "unknown option": changed_config(use_something_new=True),
            "an invocation without tokens": changed_config(alora_invocation_tokens=[]),
            "layer replication": changed_config(layer_replication=[[0, 2]]),
            "loftq": changed_config(init_lora_weights="loftq"),
            "bias of a kind there is not": changed_config(bias="some"),
            "dropout of 2": changed_config(lora_dropout=2.0),
            "a tensor too many": changed_tensors(
                lambda t: t.update({"base_model.model.extra.lora_A.weight": np.ones((3, 8), "f4")})
            ),
        }
        for what, mutate in common.items():
            yield name, what, mutate
        for key in sorted(load_file(FIXTURES / name / WEIGHTS))[:4]:
            for what, mutate in of_key(key).items():
                if not what.endswith("base_layer.weight missing"):  # PEFT can leave it out
                    yield name, what, mutate


MUTATIONS = list(mutations())


def test_there_are_many_mutations():
    assert len(MUTATIONS) >= 200
    assert len({(name, what) for name, what, _ in MUTATIONS}) == len(MUTATIONS)


@over("name", ADAPTERS, often=["bert", "ranks-alphas-rslora", "tied-head"])
def test_no_damaged_folder_loads(name, tmp_path):
    model, params = base(name)
    for number, (_, what, mutate) in enumerate(m for m in MUTATIONS if m[0] == name):
        folder = tmp_path / str(number)
        shutil.copytree(FIXTURES / name, folder)
        mutate(folder)
        try:
            lp.load(folder, model, params)
        except lp.PeftError as error:
            message = str(error)
        else:
            raise AssertionError(f"loaded, although: {what}")
        assert str(folder) in message, (what, message)
        if what.startswith("base_model"):
            assert what.split()[0] in message or "renamed" in what, (what, message)
