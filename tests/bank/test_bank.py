"""Adapters come, go and change places in a bank: none is lost, and nothing compiles anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax.bank import Bank, BankError, mixed
from lora_jax.bank.slots import slots_of
from tests.models import tiny
from tests.support import assert_close, assert_identical, draw, lorafied, with_random_factors

PARAMS = {
    "layers": {"up": {"kernel": draw(1, (3, 5, 11))}, "down": {"kernel": draw(2, (3, 11, 5))}},
    "out": {"kernel": draw(3, (5, 7))},
}
ALL = [lj.LoraRule(targets=["up", "down", "out"], rank=6)]
_EVENTS: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: _EVENTS.append(name))


def run(params, x):
    def layer(x, weights):
        hidden = jnp.tanh(x @ weights["up"]["kernel"])
        return x + hidden @ weights["down"]["kernel"], None

    return jax.lax.scan(layer, x, params["layers"])[0] @ params["out"]["kernel"]


def tree(seed, targets=("up", "out"), **rule):
    rule = {"rank": 2, "alpha": 3.0 + seed} | rule
    made = lorafied(PARAMS, [lj.LoraRule(targets=list(targets), **rule)])
    return with_random_factors(made, seed=seed)


def make_bank(slots=3, **more):
    return Bank(PARAMS, more.pop("rules", ALL), slots=slots, **more)


X = np.asarray(draw(9, (4, 5)))
FORWARD, ALONE = jax.jit(mixed(run)), jax.jit(lj.adapt(run))


def answers(trees):
    """Returns what each adapter, and the base, answers to all of X."""
    found = {name: ALONE(tree, X) for name, tree in trees.items()}
    return jax.device_get(found | {"base": jax.jit(run)(PARAMS, X)})


def check(bank, names, answers):
    """Holds a mixed batch to runs of each adapter."""
    expected = np.stack([answers[name][i] for i, name in enumerate(names)])
    assert_close(FORWARD(bank.choose(names), X), expected, 1e-5)


def test_adapters_come_and_go():
    """More of them than slots; of ranks that differ from layer to layer; one that began in W."""
    trees = {
        "a": tree(1),
        "b": tree(2, ("down",), rank=5, scaling="alpha/sqrt(rank)"),
        "c": tree(3, ("up", "down"), rank=3, layers=[0, 2]),
        "d": tree(4, ("out",), rank=3, init=lj.init.pissa),
        "xs": tree(5, ("up", "down"), rank=3, xs=True, layers=[0, 2]),
        "vera": tree(6, rank=4, vera=True),
    }
    bank = make_bank(slots=3)
    for name, one in trees.items():
        bank.add(name, one)
    assert bank.names == (*"abcd", "xs", "vera") and len(bank) == 6 and "d" in bank
    assert bank.resident == ("a", "b", "c")
    of = answers(trees)
    check(bank, ["a", "base", "c", "b"], of)
    check(bank, ["xs", "vera", "base", "xs"], of)
    check(bank, ["a", "base", "c", "b"], of)
    check(bank, ["d", "base", "d", "b"], of)  # takes the slot of the least recently used
    assert set(bank.resident) == {"b", "c", "d"} and bank.resident[0] == "c"
    check(bank, ["a", "d", "b", "a"], of)
    trees["a"] = tree(7, rank=4)
    of |= answers({"a": trees["a"]})
    bank.replace("a", trees["a"])
    check(bank, ["a", "b", "base", "a"], of)
    bank.remove("b")
    assert bank.names == ("a", "c", "d", "xs", "vera")
    check(bank, ["c", "c", "d", "a"], of)
    for name in bank.names:
        assert_identical(bank.get(name), trees[name])
        assert bank.get(name)["out"]["kernel"] is PARAMS["out"]["kernel"] or name in (
            "a",
            "d",
            "vera",
        )


def test_nothing_compiles_anew():
    """Whatever their ranks, alphas and targets, and whatever the batch asks for."""
    rules = [lj.LoraRule(targets=["up", "down", "out"], rank=6, dora=True)]
    bank = make_bank(slots=2, rules=rules)
    bank.add("a", tree(1))
    bank.add("b", tree(2, dora=True, rank=3))
    jax.block_until_ready(FORWARD(bank.choose(["a", "b", "base", "a"]), X))
    more = [tree(3, rank=5), tree(4, ("down",), dora=True, rank=4), tree(5, ("up", "down"))]
    jax.block_until_ready(more)
    before = len(_EVENTS)
    for number, one in enumerate(more):
        bank.add(f"more {number}", one)
        jax.block_until_ready(FORWARD(bank.choose([f"more {number}", "a", "base", "a"]), X))
    bank.replace("a", more[1])
    bank.remove("b")
    jax.block_until_ready(FORWARD(bank.choose(["base", "a", "more 2", "more 2"]), X))
    assert [e for e in _EVENTS[before:] if "compile" in e or "trace" in e] == []
    jax.block_until_ready(FORWARD(bank.choose(["base", "a"]), X[:2]))  # the control
    assert any("compile" in name for name in _EVENTS[before:])


def test_folders(tmp_path):
    """Adds adapters from folders of this library and of PEFT."""
    model, params = tiny.decoder("llama3")
    rule = lj.LoraRule(targets=["q_proj", "down_proj"], rank=3, alpha=5.0)
    fresh = lorafied(params, [rule])
    ours, theirs = (with_random_factors(fresh, seed=n) for n in (1, 2))
    lj.save_adapter(tmp_path / "ours", ours)
    lp.save(tmp_path / "theirs", model, theirs)
    bank = Bank(params, [rule], slots=2, model=model)
    bank.add("ours", tmp_path / "ours")
    bank.add("theirs", str(tmp_path / "theirs"))
    assert_identical(lj.split(bank.get("ours"))[0], lj.split(ours)[0])
    assert_identical(lj.split(bank.get("theirs"))[0], lj.split(theirs)[0])
    with pytest.raises(lj.AdapterError, match="there is no adapter folder"):
        bank.add("none", tmp_path / "none")
    with pytest.raises(BankError, match=r"Pass the model to the bank"):
        Bank(params, [rule], slots=1).add("theirs", tmp_path / "theirs")


def test_slots_lie_as_their_base_does():
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    at = lambda *spec: NamedSharding(mesh, P(*spec))  # noqa: E731
    up, down = draw(1, (3, 6, 10)), draw(2, (3, 10, 6))
    params = {
        "layers": {
            "up": {"kernel": jax.device_put(up, at(None, None, "tensor"))},
            "down": {"kernel": jax.device_put(down, at(None, "tensor"))},
        }
    }
    params["out"] = {"kernel": jax.device_put(draw(3, (6, 7)), at())}
    one = with_random_factors(lorafied(params, ALL), seed=1)
    bank = Bank(params, ALL, slots=2)
    bank.add("one", one)
    slots = slots_of(bank.tree)
    a, b = (slots["layers/up/kernel"].arrays[name].sharding.spec for name in ("a", "b"))
    assert tuple(b) == (None, None, None, "tensor") and "tensor" not in tuple(a)
    x = np.asarray(draw(9, (4, 6)))
    found = jax.jit(mixed(run))(bank.choose(["one", "base", "one", "base"]), x)
    expected = ALONE(jax.device_get(one), x)
    assert_close(np.asarray(found)[::2], np.asarray(expected)[::2], 1e-5)


def planned(targets=("up", "out"), **rule):
    """Returns an adapted tree of shapes alone."""
    rule = {"targets": [*targets], "rank": 2} | rule
    return lj.lorafy(jax.eval_shape(lambda: PARAMS), [lj.LoraRule(**rule)])


REFUSED = {
    "no room for rank 7": (lambda: planned(rank=7), "has rank 7 .* have rank 6"),
    "factors in W take twice the rank": (
        lambda: planned(("out",), rank=4, init=lj.init.pissa),
        "has rank 8 .*twice 4",
    ),
    "plain": (lambda: PARAMS, "is a plain tree"),
    "half": (lambda: lj.split(planned())[1], "the base half of a tree"),
    "DoRA": (lambda: planned(dora=True), r"part 'magnitude'.*a rule that has dora=True"),
    "a bias": (lambda: planned(bias_on_b=True), "part 'bias'.*a rule that has bias_on_b=True"),
    "in full": (
        lambda: lj.lorafy(PARAMS, [lj.TrainRule(targets=["out"])]),
        "the bank trains 'out/kernel' by factors, but 'one' does not",
    ),
    "another base": (
        lambda: lj.lorafy({"out": {"kernel": np.ones((5, 9))}}, [lj.LoraRule(targets=["out"])]),
        r"has the shape \(5, 9\) in 'one', but \(5, 7\)",
    ),
    "another weight": (
        lambda: lj.lorafy({"outer": {"kernel": np.ones((5, 9))}}, [lj.LoraRule(targets=["outer"])]),
        "but the bank has no slots for it. The most similar .*'out/kernel'",
    ),
}


@pytest.fixture(scope="module")
def empty_bank():
    return make_bank()


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit(case, empty_bank):
    make, message = REFUSED[case]
    bank = empty_bank
    with pytest.raises(BankError, match=message):
        bank.add("one", make())
    assert bank.names == ()


def test_names():
    bank = make_bank(slots=1)
    bank.add("one", tree(1))
    bank.add("two", tree(2))
    with pytest.raises(BankError, match="'one' is taken. Use Bank.replace"):
        bank.add("one", tree(1))
    with pytest.raises(BankError, match="'base' is reserved for the base"):
        bank.add("base", tree(1))
    with pytest.raises(BankError, match="no adapter 'three'. The adapters are 'one', 'two'"):
        bank.choose(["three"])
    with pytest.raises(BankError, match="no adapter 'three'"):
        bank.remove("three")
    with pytest.raises(BankError, match="2 different adapters, but the bank has 1 slots"):
        bank.choose(["one", "base", "two"])
    with pytest.raises(ValueError, match="slots=0 must be at least 1"):
        make_bank(slots=0)
    np.testing.assert_array_equal(bank.ids(["base", "two", "base"]), [0, 1, 0])
