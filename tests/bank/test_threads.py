"""Choices stay as they are while they are held, and threads may share a bank."""

import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax import training
from lora_jax.bank import Bank, BankError, Tenant, Together, mixed
from lora_jax.bank import slots as slots_module
from lora_jax.bank.slots import slots_of
from tests.adapted_trees import adapted

pytestmark = pytest.mark.usefixtures("standard_promotion")
PARAMS = {"kernel": np.zeros((3, 2), np.float32)}
RULES = [lj.LoraRule(targets=["kernel"], rank=1, alpha=1.0)]
ADAPTER, BASE = lj.split(adapted(PARAMS, *RULES))
X = np.ones((3, 3), np.float32)
FORWARD = jax.jit(mixed(lambda params, x: x @ params["kernel"]))
_EVENTS: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: _EVENTS.append(name))


def adapter(number):
    """Returns a tree that gives `number` for a row of `X`."""
    of_a = {"a": np.ones((1, 3), np.float32), "b": np.full((1, 2), number / 3, np.float32)}
    return lj.join({"kernel": of_a}, BASE)


def numbers(choice):
    return np.round(np.asarray(FORWARD(choice, X))[:, 0]).astype(int).tolist()


def arrays_of(bank):
    """The arrays that the bank has now, without asking it for a tree."""
    return [x for slots in slots_of(bank._tree).values() for x in slots.arrays.values()]


def test_a_choice_that_is_held_stays():
    bank = Bank(PARAMS, RULES, slots=2)
    for n, name in enumerate("abc", start=1):
        bank.add(name, adapter(n))
    choice, tree = bank.choose(["a", "base", "b"]), bank.tree
    bank.replace("a", adapter(4))
    bank.remove("b")
    assert numbers(bank.choose(["c", "a", "base"])) == [3, 4, 0]  # in b's slot
    bank.add("d", adapter(5))
    assert numbers(bank.choose(["d", "d", "d"])) == [5, 5, 5]
    assert numbers(choice) == [1, 0, 2]
    held = slots_of(tree)["kernel"].arrays["b"]
    np.testing.assert_allclose(held[:, 0, 0], [0, 1 / 3, 2 / 3], rtol=1e-6)


def test_nothing_is_copied_where_nothing_is_held(compiles_anew):
    """Slots are written in place; a choice that is held costs one copy, without a compilation."""
    bank = Bank(PARAMS, RULES, slots=2)
    bank.add("a", adapter(1))
    numbers(bank.choose(["a", "a", "base"]))  # dropped again
    before = arrays_of(bank)
    bank.replace("a", adapter(2))
    assert all(x.is_deleted() for x in before)
    choice, before, n_events = bank.choose(["a", "a", "base"]), arrays_of(bank), len(_EVENTS)
    bank.replace("a", adapter(3))
    assert not any(x.is_deleted() for x in before)
    before = arrays_of(bank)
    bank.replace("a", adapter(4))  # no one holds the copy
    assert all(x.is_deleted() for x in before)
    assert not any("compile" in name for name in _EVENTS[n_events:])
    assert numbers(choice) == [2, 2, 0]


@pytest.mark.slow
def test_examples_have_copies_of_their_factors_above_256_columns():
    """Below, copies would take time and memory for nothing; slot 0, the base, has columns, too."""
    for slots, has_copies in [(255, False), (256, True)]:
        bank = Bank(PARAMS, RULES, slots=slots)
        bank.add("a", adapter(1))
        choice = bank.choose(["a", "base"])
        chosen = slots_of(choice.tree)["kernel"].chosen(choice.ids)
        assert chosen.per_example == has_copies, slots


def stressed(n_calls, seed):
    """Eight threads choose among twelve adapters in three slots; each has some of its own.

    A thread alone adds, replaces and removes its own, so it knows what they are; of the others' it
    knows whose they are. Returns the numbers of calls and of names that were not there.
    """
    bank, wrong, calls, absent = Bank(PARAMS, RULES, slots=3), [], [], []
    names = [f"{n}" for n in range(12)]

    def work(thread):
        rng = random.Random(f"{seed} {thread}")
        own = dict.fromkeys(names[thread::8])  # the version of each, None where it is not there
        for version in range(1, n_calls + 1):
            mine, what = rng.choice([*own]), rng.random()
            calls.append(thread)
            if own[mine] is None:
                bank.add(mine, adapter(1000 * (int(mine) + 1) + version % 1000))
                own[mine] = version % 1000
            elif what < 0.1:
                bank.replace(mine, adapter(1000 * (int(mine) + 1) + version % 1000))
                own[mine] = version % 1000
            elif what < 0.15:
                bank.remove(mine)
                own[mine] = None
            else:
                wanted = [mine, *rng.choices([*names, "base"], k=2)]
                try:
                    choice = bank.choose(wanted)
                except BankError as error:
                    asked = set(wanted) - {name for name, v in own.items() if v is not None}
                    if not any(f"there is no adapter {name!r}" in str(error) for name in asked):
                        raise
                    absent.append(error)
                    continue
                for name, found in zip(wanted, numbers(choice), strict=True):
                    whose = 0 if name == "base" else int(name) + 1
                    if found // 1000 != whose or (name in own and found % 1000 != own[name]):
                        wrong.append((name, found, own.get(name)))

    def caught(thread):
        try:
            work(thread)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=caught, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    return len(calls), len(absent)


def test_threads_share_a_bank():
    calls, absent = stressed(60, seed=1)
    assert calls == 8 * 60 and 0 < absent < calls / 2


@pytest.mark.slow
def test_threads_share_a_bank_for_long():
    calls, absent = stressed(1000, seed=2)
    assert calls == 8 * 1000 and 0 < absent < calls / 2


def test_copies_of_what_trains_are_those_of_the_examples(monkeypatch):
    """Adapters that train have slots from 1 on; a request would else be another tenant's."""
    monkeypatch.setattr(slots_module, "WIDEST", 0)
    bank = Bank(PARAMS, RULES, slots=2)
    bank.add("a", adapter(3))
    bank.add("b", adapter(6))
    held = slots_of(bank.tree)["kernel"]
    trained = held.replace(arrays={n: x[1:] for n, x in held.arrays.items()}, has_base=False)
    copies = jax.jit(lambda slots, ids: slots.chosen(ids))(trained, np.array([2, 0, 1])).arrays
    changes = np.asarray(copies["scale"]) * np.asarray(copies["b"])[:, 0, 0]
    np.testing.assert_allclose(changes, [2.0, 0.0, 1.0], rtol=1e-6)


def squares(forward, params, batch, dropout_key):
    error = jnp.sum((forward(params, batch["x"]) - batch["y"]) ** 2)
    return training.Sums(error, jnp.float32(len(batch["x"])), {})


LOSS = training.Loss(squares)
BATCH = {"x": X[None], "y": np.ones((1, 3, 2), np.float32)}


def tenant(number, steps=50):
    rate = optax.constant_schedule(1e-3)
    return Tenant(params=adapter(number), schedule=rate, steps=steps, loss=LOSS, optimizer="sgd")


@pytest.mark.slow
def test_choices_of_what_trains():
    """One that is held stays as it was, also when adapters join; else a step takes its memory."""
    together = Together(lj.adapt(lambda params, x: x @ params["kernel"]), PARAMS)
    together.add({"a": tenant(100), "b": tenant(200)})
    (stack,) = together._stacks.values()
    choice = together.choose(["a", "base", "b"])
    together.step({"a": BATCH})
    together.remove("a")
    together.add({"c": tenant(300)})  # takes its slot
    together.add({"d": tenant(400)})  # the stack grows
    assert numbers(choice) == [100, 0, 200]
    assert numbers(together.choose(["c", "d", "b"])) == [300, 400, 200]
    before = jax.tree.leaves((stack.state.adapter, stack.fixed))
    together.step({"b": BATCH})
    assert [x.is_deleted() for x in before] == [True, True, False]  # A, B, and the scale


@pytest.mark.slow
def test_threads_share_what_trains():
    """One trains, one samples, one lets others join and leave: a sampler sees whole steps."""
    together = Together(lj.adapt(lambda params, x: x @ params["kernel"]), PARAMS)
    # Both begin alike and see the same data: a choice of both has the same rows.
    together.add({"a": tenant(100), "b": tenant(100)})
    wrong = []

    def train():
        for _ in range(50):
            together.step({"a": BATCH, "b": BATCH})

    def sample():
        for _ in range(50):
            a, base, b = np.asarray(FORWARD(together.choose(["a", "base", "b"]), X))[:, 0].tolist()
            if a != b or base != 0 or together.done("a") > 50:
                wrong.append((a, base, b))

    def join_and_leave():
        for n in range(20):
            together.add({f"{n}": tenant(300)})
            if numbers(together.choose([f"{n}"] * 3)) != [300] * 3:
                wrong.append(n)
            together.remove(f"{n}")

    def caught(work):
        try:
            work()
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=caught, args=(w,)) for w in (train, sample, join_and_leave)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and together.done("a") == 50
    assert together.names == ("a", "b")
