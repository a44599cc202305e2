"""Adapters of another base are refused, and so is the base's name; what a bank keeps is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.bank import Bank, BankError, Tenant, Together, choose, mixed
from lora_jax.bank import bank as bank_module
from lora_jax.bank import slots as slots_module
from tests.support import array, assert_close, assert_identical, draw, lorafied, with_random_factors

RULES = [lj.LoraRule(targets=["up"], rank=2, alpha=3.0)]


def base(seed=1, gain=1.0):
    return {"up": {"kernel": draw(seed, (5, 7))}, "norm": array(gain * np.asarray(draw(3, (7,))))}


PARAMS = base()


def run(params, x):
    return (x @ params["up"]["kernel"]) * params["norm"]


def adapted(params, seed=1, rules=RULES):
    return with_random_factors(lorafied(params, rules), seed=seed)


def tenant(tree):
    return Tenant(params=tree, schedule=optax.constant_schedule(0.1), steps=1)


ANOTHER = {
    "kernel": lambda: base(2),
    "a leaf that is not adapted": lambda: base(gain=1.5),
    "a leaf more": lambda: {**PARAMS, "more": draw(4, (3,))},
    "a leaf less": lambda: {"up": PARAMS["up"]},
}


@pytest.mark.parametrize("case", ANOTHER)
def test_another_base(case):
    tree = adapted(ANOTHER[case]())
    bank = Bank(PARAMS, RULES, slots=1)
    bank.add("mine", adapted(PARAMS))
    together = Together(lj.adapt(run), PARAMS)
    with pytest.raises(BankError, match="bank: 'theirs' belongs to another base: .*allow_base_"):
        bank.add("theirs", tree)
    with pytest.raises(BankError, match="bank: 'mine' belongs to another base"):
        bank.replace("mine", tree)
    with pytest.raises(BankError, match="together: 'theirs' belongs to another base"):
        together.add({"mine": tenant(adapted(PARAMS)), "theirs": tenant(tree)})
    assert bank.names == ("mine",) and together.names == ()
    together.add({"theirs": tenant(tree)}, allow_base_mismatch=True)
    bank.replace("mine", tree, allow_base_mismatch=True)
    assert_identical(lj.split(bank.get("mine"))[0], lj.split(tree)[0])


def test_the_same_base_elsewhere(monkeypatch):
    """Copies are compared by checksums, the base's own once; the base's own arrays by none.

    Also where they are in codes, which placing and mapping put together anew.
    """
    calls = []
    real = bank_module.base_fingerprint
    monkeypatch.setattr(
        bank_module, "base_fingerprint", lambda leaves: calls.extend(leaves) or real(leaves)
    )
    bank = Bank(PARAMS, RULES, slots=1)
    bank.add("a", adapted(PARAMS))
    assert calls == []
    for name in "bc":
        bank.add(name, adapted(jax.tree.map(np.array, PARAMS)))
    assert sorted(calls) == sorted(["norm", "up/kernel"] * 3)
    coded = lj.quantized.quantize({"up": {"kernel": draw(1, (64, 7))}, "norm": PARAMS["norm"]})
    bank = Bank(coded, RULES, slots=1)
    calls.clear()
    bank.add("a", adapted(jax.tree.map(lambda x: x, coded)))
    assert calls == []
    bank.add("b", adapted(jax.tree.map(jnp.array, coded)))
    assert sorted(calls) == sorted(["norm", "up/kernel"] * 2)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_mixed_batches_over_codes(one_by_one):
    """Each row by its own adapter, or by the codes alone."""
    coded = lj.quantized.quantize({"up": {"kernel": draw(1, (64, 7))}, "norm": PARAMS["norm"]})
    bank = Bank(coded, RULES, slots=2)
    trees = {name: adapted(coded, seed) for seed, name in enumerate("ab")}
    for name, tree in trees.items():
        bank.add(name, tree)
    x, names = draw(5, (4, 64)), ["b", "base", "a", "b"]
    found = jax.jit(mixed(run, one_by_one=one_by_one))(bank.choose(names), x)
    forward = jax.jit(lj.adapt(run))
    rows = [forward(trees.get(n, coded), x[i : i + 1]) for i, n in enumerate(names)]
    assert_close(found, jnp.concatenate(rows), 1e-5)
    assert jnp.abs(found - forward(coded, x)).max() > 0.1


def test_the_name_of_the_base():
    together = Together(lj.adapt(run), PARAMS)
    with pytest.raises(BankError, match="the name 'base' is reserved for the base"):
        together.add({"base": tenant(adapted(PARAMS))})
    assert together.names == ()


def test_what_was_added_is_a_copy():
    """Callers may write into their own arrays."""
    tree = jax.tree.map(np.array, adapted(PARAMS))
    expected = jax.tree.map(np.array, lj.split(tree)[0])
    bank = Bank(PARAMS, RULES, slots=1)
    bank.add("mine", tree)
    tree["up"]["kernel"].a[:] = 7
    assert_identical(lj.split(bank.get("mine"))[0], expected)
    bank.add("other", adapted(PARAMS, 2))
    bank.choose(["other"])  # takes the slot
    found = bank.choose(["mine"]).tree["up"]["kernel"].arrays["a"][1]
    np.testing.assert_array_equal(found, expected["up/kernel"]["a"])


@pytest.mark.parametrize("form", ["at once", "one by one", "copies", "heads", "as they train"])
def test_traced_ids_without_a_slot_give_nan(form, monkeypatch):
    """And concrete ones an error; rows beside them are as they would be."""
    rules = [*RULES, *([lj.TrainRule(targets=["norm"])] if form == "heads" else [])]
    monkeypatch.setattr(slots_module, "WIDEST", 0 if form == "copies" else slots_module.WIDEST)
    tree = adapted(PARAMS, rules=rules)
    if form == "as they train":
        together = Together(lj.adapt(run), PARAMS)
        together.add({"mine": tenant(tree)})
        slots = together.choose(["mine"]).tree
    else:
        bank = Bank(PARAMS, rules, slots=1)
        bank.add("mine", tree)
        slots = bank.tree
    forward = mixed(run, one_by_one=form == "one by one")
    x = draw(5, (4, 5))
    chosen = jax.jit(lambda tree, ids: forward(choose(tree, ids), x))
    found = chosen(slots, array([1, 2, 0, -1]))
    assert np.isnan(found[1]).all() and np.isnan(found[3]).all()
    np.testing.assert_array_equal(found[::2], chosen(slots, array([1, 1, 0, 0]))[::2])
    with pytest.raises(ValueError, match="the bank has no slot 2. Its slots are 0 to 1"):
        choose(slots, [1, 2, 0, 1])
