"""One A for kernels that stand side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax import optim
from lora_jax.bank import Bank, combine
from lora_jax.lorafy import map_parts
from tests.support import assert_close, assert_identical, draw, with_random_factors

KERNELS = {
    "mlp": {name: {"kernel": draw(i, (5, 7))} for i, name in enumerate(("gate", "up"))}
    | {"down": {"kernel": draw(2, (7, 5))}}
}
RULES = [
    lj.LoraRule(targets=["gate", "up"], rank=2, alpha=3.0, share_a=True),
    lj.LoraRule(targets=["down"], rank=2, alpha=3.0),
]
GATE, UP = "mlp/gate/kernel", "mlp/up/kernel"


def program(params, x):
    mlp = params["mlp"]
    hidden = jnp.tanh(x @ mlp["gate"]["kernel"]) * (x @ mlp["up"]["kernel"])
    return hidden @ mlp["down"]["kernel"]


def tree_with_one_a():
    """Returns an adapted tree with random factors, still with one A for two kernels."""
    adapter, base = lj.split(lj.lorafy(KERNELS, RULES))
    drawn, _ = lj.split(with_random_factors(lj.join(adapter, base)))
    return lj.join(drawn, base)


def test_it_trains_once_and_is_the_same_array_in_both():
    tree = lj.lorafy(KERNELS, RULES)
    assert tree["mlp"]["gate"]["kernel"].a is tree["mlp"]["up"]["kernel"].a
    adapter, base = lj.split(tree)
    assert (set(adapter[GATE]), set(adapter[UP])) == ({"a", "b"}, {"b"})
    assert base["mlp"]["up"]["kernel"].a is None
    assert lj.count_params(tree)[0] == 2 * 5 + 2 * (2 * 7) + 2 * (7 + 5)
    assert_identical(lj.join(adapter, base), tree)
    moved = lj.join(jax.tree.map(lambda x: x + 1, adapter), base)
    assert moved["mlp"]["up"]["kernel"].a is moved["mlp"]["gate"]["kernel"].a


def without_modules():
    """Returns an adapted tree whose leaves are kernels themselves."""
    rule = lj.LoraRule(targets=".*", rank=2, share_a=True, in_axes=[0], out_axes=[1])
    return lj.lorafy({name: KERNELS["mlp"][name]["kernel"] for name in ("gate", "up")}, [rule])


@pytest.mark.parametrize(
    ("place", "gate", "up"),
    [
        (lambda: {"params": lj.lorafy(KERNELS, RULES)}, f"params/{GATE}", f"params/{UP}"),
        (lambda: lj.lorafy(KERNELS, RULES)["mlp"], "gate/kernel", "up/kernel"),
        (lambda: lj.lorafy({"params": KERNELS}, RULES)["params"], GATE, UP),
        (without_modules, "gate", "up"),
        (lambda: {"params": {"mlp": without_modules()}}, "params/mlp/gate", "params/mlp/up"),
    ],
    ids=["wrapped", "cut", "unwrapped", "without modules", "without modules, wrapped"],
)
def test_it_holds_wherever_the_two_stand(place, gate, up, tmp_path):
    def at(tree, path):
        for segment in path.split("/"):
            tree = tree[segment]
        return tree

    tree = place()
    adapter, base = lj.split(tree)
    assert (set(adapter[gate]), set(adapter[up])) == ({"a", "b"}, {"b"})
    assert_identical(lj.join(adapter, base), tree)
    moved = map_parts(lambda path, name, array: array + 1, tree)
    assert at(moved, up).a is at(moved, gate).a
    assert_identical(at(moved, up).a, at(tree, up).a + 1)
    lj.save_adapter(tmp_path / "adapter", tree)
    loaded = lj.load_adapter(tmp_path / "adapter", lj.strip(tree))
    assert_identical(loaded, tree)
    assert at(loaded, up).a is at(loaded, gate).a
    assert_identical(lj.join(*lj.split(loaded)), tree)


def test_a_part_without_the_owner_is_refused(tmp_path):
    whole = lj.lorafy(KERNELS, RULES)
    part = {"mlp": {name: whole["mlp"][name] for name in ("up", "down")}}
    message = f"'{UP}' shares the A of '{GATE}'.*Pass the part of the tree that contains both"
    for use in (
        lj.split,
        lambda tree: map_parts(lambda path, name, array: array, tree),
        lambda tree: lj.save_adapter(tmp_path / "adapter", tree),
    ):
        with pytest.raises(ValueError, match=message):
            use(part)
    adapter, base = lj.split(whole)
    with pytest.raises(ValueError, match=message):
        lj.join({UP: adapter[UP]}, {"mlp": {"up": base["mlp"]["up"]}})
    assert not (tmp_path / "adapter").exists()
    assert_close(lj.merge(part)["mlp"]["up"]["kernel"], KERNELS["mlp"]["up"]["kernel"], 1e-6)


def test_factored_is_merged_and_the_gradient_is_the_sum_of_both_uses():
    tree, x = tree_with_one_a(), draw(5, (3, 5))
    adapter, base = lj.split(tree)

    def loss(adapter, run):
        return jnp.sum(jnp.sin(run(lj.join(adapter, base), x)))

    def merged(tree, x):
        return program(lj.merge(tree), x)

    got, want = (jax.grad(loss)(adapter, run) for run in (lj.adapt(program, strict=True), merged))
    assert_close(got, want, 1e-5)
    assert np.abs(got[GATE]["a"]).max() > 1e-3 and "a" not in got[UP]


def test_it_is_kept_by_files_and_by_swap(tmp_path):
    tree = tree_with_one_a()
    lj.save_adapter(tmp_path / "adapter", tree)
    loaded = lj.load_adapter(tmp_path / "adapter", KERNELS)
    assert_identical(loaded, tree)
    assert loaded["mlp"]["up"]["kernel"].a is loaded["mlp"]["gate"]["kernel"].a
    assert_identical(lj.split(loaded)[0], lj.split(tree)[0])
    assert_identical(lj.swap(lj.lorafy(KERNELS, RULES), tree), tree)


def test_sums_and_banks_hold_it_as_two():
    tree, x = tree_with_one_a(), draw(5, (3, 5))
    expected = program(lj.merge(tree), x)
    total = combine([tree], [1.0])
    assert "a" in lj.split(total)[0][UP]
    assert_close(program(lj.merge(total), x), expected, 1e-5)
    bank = Bank(KERNELS, RULES, slots=2)
    bank.add("one", tree)
    assert_close(program(lj.merge(bank.get("one")), x), expected, 1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"targets": ["gate", "up", "down"]}, "in sibling modules, but their A would differ"),
        (
            {"targets": ["gate"]},
            "no two kernels of this rule are in sibling modules .*'mlp/gate/kernel",
        ),
        ({"targets": ["gate"], "freeze_a": True}, "cannot share an A that is frozen"),
        ({"targets": ["gate"], "init": lj.init.pissa}, "computed from the base"),
    ],
)
def test_what_cannot_be_shared(more, message):
    with pytest.raises(ValueError, match=message):
        lj.lorafy(KERNELS, [lj.LoraRule(rank=2, share_a=True, **more)])


def test_an_optimiser_of_the_whole_tree_would_train_it_apart():
    tree = lj.lorafy(KERNELS, RULES)
    with pytest.raises(
        ValueError, match="'mlp/up/kernel' shares the A or the vector of another weight"
    ):
        lj.trainable_mask(tree)
    with pytest.raises(ValueError, match="Optimize the adapter instead, lora_jax.split"):
        optim.freeze_base(optax.sgd(0.1)).init(tree)
