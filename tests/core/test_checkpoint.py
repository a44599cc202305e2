"""Adapters on disk."""

import gc
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.core import freeze
from flax.training.train_state import TrainState

import lora_jax as lj
from lora_jax.saving.fingerprint import base_fingerprint, checksum, keys_that_differ
from tests.adapted_trees import adapted
from tests.support import (
    PROGRAMS,
    array,
    assert_identical,
    draw,
    lorafied,
    over,
    with_random_factors,
)

PARAMS = {
    "layers": {"q_proj": {"kernel": draw(1, (3, 5, 7)), "bias": draw(2, (3, 7))}},
    "head": {"kernel": draw(3, (7, 11))},
    "norm": draw(4, (7,)),
}
RULES = [
    lj.LoraRule(targets=["q_proj"], layers=[0], rank=4, alpha=3.0, dropout=0.1),
    lj.LoraRule(targets=["q_proj"], layers=[2], rank=2, alpha=5.0, dropout=0.1),
    lj.TrainRule(targets=["head"]),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a folder that holds an adapter, the tree that it was saved from)."""
    tree = lorafied(PARAMS, RULES)
    weight = tree["layers"]["q_proj"]["kernel"]
    mask = (np.asarray(weight.a) != 0).any(-1)[..., None]
    weight = weight.replace(b=array(np.where(mask, draw(5, weight.b.shape), np.float32(0))))
    tree["layers"]["q_proj"]["kernel"] = weight
    folder = tmp_path_factory.mktemp("saved") / "deep" / "adapter"
    lj.save_adapter(folder, tree)
    return folder, tree


# Of each layout of factors one: plain, stacked, with heads, of a table, of experts.
LAYOUTS = [*PROGRAMS[:4], PROGRAMS[-1]]


@over("program", LAYOUTS, often=["scanned and rematerialised"])
def test_save_and_load_are_bitwise(program, tmp_path):
    params, tree, _ = program.inputs()
    lj.save_adapter(tmp_path / "adapter", tree)
    assert_identical(lj.load_adapter(tmp_path / "adapter", params), tree)


@pytest.mark.slow
def test_ranks_dropout_and_trained_leaves_travel_along(saved):
    folder, tree = saved
    loaded = lj.load_adapter(folder, PARAMS)
    assert_identical(loaded, tree)
    weight = loaded["layers"]["q_proj"]["kernel"]
    assert (weight.ranks, weight.dropout) == ((4, 0, 2), 0.1)
    assert isinstance(loaded["head"]["kernel"], lj.Trained)


def test_the_next_api_of_orbax_reads_an_adapter(saved):
    """Arrays and facts: none is lost where that API takes over."""
    from orbax.checkpoint import v1

    folder, _ = saved
    facts = json.loads((folder / "lora" / "metadata").read_text())
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def described(text):
        dtype, sizes = text.split(":")[0].removesuffix("]").split("[")
        return jax.ShapeDtypeStruct(tuple(map(int, sizes.split("x"))), dtype, sharding=device)

    like = jax.tree.map(described, facts["arrays"])
    read = v1.load_checkpointables(folder, {"adapter": like, "lora": None})
    assert read["lora"] == facts
    assert jax.tree.map(checksum, read["adapter"]) == facts["arrays"]


def test_padding_is_not_saved(saved):
    folder, _ = saved
    arrays = json.loads((folder / "lora" / "metadata").read_text())["arrays"]
    assert arrays["layers/q_proj/kernel"]["a"].startswith("float32[5x6]:")


def test_loading_over_an_adapted_tree_swaps_and_compiles_nothing(tmp_path):
    program = PROGRAMS[0]
    _, tree, x = program.inputs()
    other = with_random_factors(tree, seed=5)
    lj.save_adapter(tmp_path / "other", other)
    run = jax.jit(lj.adapt(program.run))
    run(tree, x)
    swapped = lj.load_adapter(tmp_path / "other", tree)
    assert_identical(run(swapped, x), run(other, x))
    assert run._cache_size() == 1


def test_an_existing_folder_is_kept_unless_told(saved, tmp_path):
    folder, tree = saved
    copy = shutil.copytree(folder, tmp_path / "adapter")
    with pytest.raises(
        lj.AdapterError, match="already exists. Name another folder, or pass overwrite"
    ):
        lj.save_adapter(copy, tree)
    weight = tree["layers"]["q_proj"]["kernel"]
    changed = lj.swap(tree, tree)
    changed["layers"]["q_proj"]["kernel"] = weight.replace(b=weight.b * 2)
    lj.save_adapter(copy, changed, overwrite=True)
    assert_identical(lj.load_adapter(copy, PARAMS), changed)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_failed_save_leaves_nothing_and_harms_nothing(saved, tmp_path, monkeypatch):
    folder, tree = saved
    copy = shutil.copytree(folder, tmp_path / "adapter")
    monkeypatch.setattr("lora_jax.saving.checkpoint.replace_folder", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lj.save_adapter(copy, tree, overwrite=True)
    assert_identical(lj.load_adapter(copy, PARAMS), tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"norm": p["norm"] + 1e-2}, r"another base: 1 of 3 frozen leaves.*norm"),
        (lambda p: p | {"head": {"kernel": draw(3, (7, 13))}}, r"head/kernel: \[7, 11\] in the ad"),
        (lambda p: {k: v for k, v in p.items() if k != "layers"}, "missing in the tree"),
    ],
)
def test_another_base_is_refused(saved, change, message):
    with pytest.raises(lj.AdapterError, match=message):
        lj.load_adapter(saved[0], change(PARAMS))


def test_another_base_can_be_allowed(saved):
    folder, tree = saved
    other = PARAMS | {"norm": PARAMS["norm"] * 2}
    loaded = lj.load_adapter(folder, other, allow_base_mismatch=True)
    assert_identical(loaded["layers"]["q_proj"]["kernel"].a, tree["layers"]["q_proj"]["kernel"].a)


def test_a_base_has_one_fingerprint_in_fp32_and_bf16():
    bf16 = jax.tree.map(lambda v: v.astype(jnp.bfloat16), PARAMS)
    assert base_fingerprint(bf16) == base_fingerprint(PARAMS)
    assert keys_that_differ(
        base_fingerprint(PARAMS | {"norm": PARAMS["norm"] * 1.01}), base_fingerprint(PARAMS)
    ) == ["norm"]


def test_checksums_alone_are_compiled(tmp_path, compiled):
    """For NumPy's arrays too: `jnp.asarray` of one compiles a program for its shape."""
    base = {"dense": {"kernel": np.ones((29, 31), np.float32)}, "norm": np.ones(31, np.float32)}
    tree = adapted(base, lj.LoraRule(targets=["dense"], rank=3, alpha=5.0))
    lj.save_adapter(tmp_path / "adapter", tree)
    assert set(compiled()) == {"jit(_hash_sums)", "jit(_moveaxis)"}
    n_saving = len(compiled())
    assert n_saving == 5  # of W, the norm, A and B; A is written with its long axis first
    assert_identical(lj.load_adapter(tmp_path / "adapter", base), tree)
    assert set(compiled()[n_saving:]) <= {"jit(_hash_sums)"}
    n_loading = len(compiled())
    jnp.asarray(base["norm"])  # the control
    assert len(compiled()) == n_loading + 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_, jnp.uint32])
def test_a_checksum_sees_one_element_and_its_place(dtype):
    zeros, x, y = (np.zeros((3, 5), dtype) for _ in range(3))
    x[1, 2] = y[2, 1] = 1
    sums = {checksum(array(v)) for v in (x, y, zeros, x.T)}
    assert len(sums) == 4


def mutations(folder):
    """Ways to damage an adapter folder, by name."""
    yield "no metadata", lambda: (folder / "lora" / "metadata").unlink()
    yield "metadata cut", lambda: cut(folder / "lora" / "metadata")
    yield "metadata empty", lambda: (folder / "lora" / "metadata").write_text("{}")
    yield "later format", lambda: edit(folder, lambda m: m.update(format=99))
    yield "no arrays", lambda: shutil.rmtree(folder / "adapter")
    for file in sorted(f for f in (folder / "adapter").rglob("*") if f.is_file()):
        if "d/" in str(file.relative_to(folder / "adapter")) or "manifest" in file.name:
            yield f"{file.name} cut", lambda file=file: cut(file)
            yield f"{file.name} flipped", lambda file=file: flip(file)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(bytes(data))


def edit(folder, change):
    file = folder / "lora" / "metadata"
    metadata = json.loads(file.read_text())
    change(metadata)
    file.write_text(json.dumps(metadata))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's clean-up
def test_a_damaged_folder_never_loads_wrongly(saved, tmp_path):
    folder, tree = saved
    names = [name for name, _ in mutations(folder)]
    refused = 0
    for index, name in enumerate(names):
        copy = shutil.copytree(folder, tmp_path / str(index))
        dict(mutations(copy))[name]()
        try:
            loaded = lj.load_adapter(copy, PARAMS)
        except lj.AdapterError as error:
            assert str(copy) in str(error)
            refused += 1
        else:
            assert_identical(loaded, tree)  # a spare file, which nothing reads
    assert refused >= 7
    gc.collect()  # Orbax's coroutines, before another test


def test_a_missing_folder_and_a_plain_tree():
    with pytest.raises(lj.AdapterError, match="there is no adapter folder"):
        lj.load_adapter("nowhere", PARAMS)
    with pytest.raises(lj.AdapterError, match="adapted tree"):
        lj.save_adapter("nowhere", PARAMS)


def test_a_base_that_an_optimiser_has_moved_is_not_saved(tmp_path):
    """As by SGD over the whole tree, which decays or moves the frozen kernels, too."""
    tree = lorafied(PARAMS, RULES)
    moved = jax.tree.map(lambda x: array(np.asarray(x) * np.float32(0.5)), tree)
    for base in (PARAMS, tree):
        with pytest.raises(
            lj.AdapterError, match=r"3 of \d frozen leaves differ.*Nothing was.*freeze_base"
        ):
            lj.save_adapter(tmp_path / "adapter", moved, base=base)
        assert not any(tmp_path.iterdir())
        lj.save_adapter(tmp_path / "adapter", tree, base=base, overwrite=True)
        assert_identical(lj.load_adapter(tmp_path / "adapter", PARAMS), tree)
        shutil.rmtree(tmp_path / "adapter")


def test_half_a_tree_is_refused(tmp_path):
    _, base = lj.split(lj.lorafy(PARAMS, RULES))
    with pytest.raises(lj.AdapterError, match="join"):
        lj.save_adapter(tmp_path / "adapter", base)


def test_the_folder_is_small(saved):
    folder, tree = saved
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    arrays = sum(np.asarray(v).nbytes for v in jax.tree.leaves(lj.split(tree)[0]))
    assert size < 20_000 + 3 * arrays


def test_facts_about_an_adapter_are_kept_beside_it(tmp_path):
    _, tree, _ = PROGRAMS[0].inputs()
    about = {"model": "owner/name", "revision": "0123abc", "labels": ["a", "b"]}
    lj.save_adapter(tmp_path / "adapter", tree, about=about)
    assert lj.adapter_info(tmp_path / "adapter") == about
    lj.save_adapter(tmp_path / "plain", tree)
    assert lj.adapter_info(tmp_path / "plain") == {}
    with pytest.raises(lj.AdapterError, match="there is no adapter folder"):
        lj.adapter_info(tmp_path / "missing")


def test_flax_bytes_of_an_adapted_tree_say_what_to_save():
    """Flax's own functions; its dictionaries, and what is plain, are as before."""
    tree = lorafied(PARAMS, RULES)
    state = TrainState.create(apply_fn=None, params=tree, tx=optax.identity())
    for held in ({"params": tree}, state, freeze({"params": tree})):
        with pytest.raises(
            TypeError, match=r"save_adapter.*to_bytes\(lora_jax.split\(params\)\[0\]\)"
        ):
            serialization.to_bytes(held)
    adapter, base = lj.split(tree)
    read = serialization.from_bytes(adapter, serialization.to_bytes(adapter))
    assert_identical(jax.tree.map(jnp.asarray, lj.join(read, base)), tree)
    assert serialization.to_bytes(lj.merge(tree))
    kept = serialization.to_state_dict(tree)["head"]["kernel"]
    assert kept is tree["head"]["kernel"]
    assert serialization.to_state_dict(state)["params"]["head"]["kernel"] is kept
    assert serialization.to_state_dict(freeze({"params": tree}))["params"]["head"]["kernel"] is kept
