"""The driver of many loops: batches and metrics reach the right run; one that ends leaves."""

import numpy as np
import pytest

from lora_jax.bank.together.side_by_side import DrivenRun, side_by_side
from lora_jax.bank.together.together import alike
from lora_jax.training.errors import Diverged, Dropped, Interrupted
from lora_jax.training.loop import Stopped


def running(name, steps, heard, *, fails=None, of_batch=None):
    """A run that hears the losses of its steps, and raises `fails` in the place of the last."""

    def turns():
        try:
            for number in range(steps):
                metrics, tokens = yield number
                heard.append((name, number, metrics["loss"], tokens))
            if fails is not None:
                raise fails
            return f"{name} is over"
        finally:
            heard.append((name, "closed"))

    def batch(number):
        if number == of_batch:
            raise ValueError("no such row")
        return {"x": np.full((1, 2), number + len(name))}

    return DrivenRun(turns=turns(), batch=batch, tokens=lambda batch: int(batch["x"].sum()))


def losses(batches):
    return {name: {"loss": int(batch["x"][0, 0])} for name, batch in batches.items()}


def test_each_run_hears_of_its_own_steps_until_its_end():
    heard, ended, asked = [], [], []

    def step(batches):
        asked.append(sorted(batches))
        return losses(batches)

    runs = {
        "a": running("a", 3, heard),
        "bad": running("bad", 2, heard, fails=Diverged("it grew")),
        "none": running("none", 0, heard),
        "rows": running("rows", 3, heard, of_batch=1),
    }
    endings = side_by_side(step, runs, ended=lambda name, ending: ended.append(name))
    assert asked == [["a", "bad", "rows"], ["a", "bad"], ["a"]]
    assert [one for one in heard if one[0] == "a"] == [
        *(("a", number, number + 1, 2 * (number + 1)) for number in range(3)),
        ("a", "closed"),
    ]
    assert endings["a"].result == "a is over" and endings["none"].result == "none is over"
    assert isinstance(endings["bad"].error, Diverged)
    assert str(endings["rows"].error) == "no such row"
    assert sorted(ended) == sorted(runs) and len(ended) == 4
    assert sum(one[1] == "closed" for one in heard) == 4


def test_a_signal_stops_each_and_a_second_one_all():
    heard = []
    runs = {name: running(name, 1, heard, fails=Stopped("saved", 130)) for name in ("a", "b")}
    endings = side_by_side(losses, runs)
    assert all(isinstance(ending.error, Stopped) for ending in endings.values())
    heard.clear()
    runs = {"a": running("a", 1, heard, fails=Interrupted("now", 130)), "b": running("b", 9, heard)}
    with pytest.raises(Interrupted, match="now"):
        side_by_side(losses, runs)
    assert ("b", "closed") in heard

    def broken(batches):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        side_by_side(broken, {"a": running("a", 1, heard)})


def test_a_run_whose_batch_a_signal_drops_saves_and_stops():
    saved = []

    def turns():
        for number in range(3):
            try:
                yield number
            except Dropped:
                saved.append(number)
                raise Stopped("saved", 143) from None

    def batch(number):
        if number == 2:
            raise Dropped
        return {"x": np.zeros((1, 2), int)}

    heard = []
    runs = {
        "dropped": DrivenRun(turns=turns(), batch=batch, tokens=lambda batch: 0),
        "other": running("other", 4, heard),
    }
    endings = side_by_side(losses, runs)
    assert saved == [2] and isinstance(endings["dropped"].error, Stopped)
    assert endings["other"].result == "other is over"


def test_padding():
    one = {"ids": np.ones((1, 2, 3), int), "weights": np.ones((1, 2, 1), int)}
    other = {"ids": np.full((2, 1, 2), 5), "weights": np.full((2, 1, 4), 7)}
    filled = alike({"one": one, "other": other})
    assert {b["ids"].shape for b in filled.values()} == {(2, 2, 3)}
    assert {b["weights"].shape for b in filled.values()} == {(2, 2, 4)}
    assert filled["one"]["ids"].sum() == 6 and (filled["one"]["ids"][:1] == 1).all()
    np.testing.assert_array_equal(filled["other"]["ids"][:, :1, :2], other["ids"])
    assert filled["other"]["weights"].sum() == other["weights"].sum()
    assert alike({"one": one})["one"]["ids"] is one["ids"]
