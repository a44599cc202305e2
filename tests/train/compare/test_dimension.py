"""The intrinsic dimension of made-up curves, whose crossings are known."""

import math

import pytest
from matplotlib.figure import Figure

from tests.train.compare.made_up import FACTS, full, lora, run
from train.compare.reporting.dimension import dimensions, sentence
from train.compare.reporting.pages import HTML, write_report
from train.compare.reporting.pictures import draw
from train.compare.result import Arm, Comparison


def subspace(dimension, rate=1e-2, method="said"):
    return Arm(method, None, None, None, rate, 8, dimension)


def made(curves, method="said", whole=(0.8, 0.8, 0.8)):
    """A comparison with full fine-tuning and, for each dimension, a score for each seed."""
    runs = [run(full(), seed, 1.0, score) for seed, score in enumerate(whole)]
    for dimension, scores in curves.items():
        arm = subspace(dimension, method=method)
        # A rate that is worse must not count.
        runs += [run(arm._replace(learning_rate=1.0), s, 1.0, 0.1) for s in range(len(scores))]
        runs += [
            run(arm, seed, 1.0, score, trained_parameters=dimension)
            for seed, score in enumerate(scores)
        ]
    return Comparison(facts=FACTS, runs=tuple(runs))


CURVES = {1000: (0.79, 0.75, 0.78), 10: (0.5, 0.5, 0.5), 100: (0.7, 0.74, 0.62)}


def test_d90_is_where_the_curve_of_a_seed_crosses_nine_tenths_of_full():
    (found,) = dimensions(made(CURVES))
    assert found.target == pytest.approx(0.72) and found.whole == pytest.approx(0.8)
    assert [row.arm.dimension for row in found.rows] == [10, 100, 1000]
    assert found.smallest == 1000, "at 100 the mean is 0.687"
    # By hand: seed 0 goes from 0.70 at 10² to 0.79 at 10³, so 2/9 of a decade; seed 1 from 0.50 at
    # 10 to 0.74, 22/24 of a decade; seed 2 from 0.62 to 0.78, 10/16.
    by_hand = [10 ** (2 + 2 / 9), 10 ** (1 + 22 / 24), 10 ** (2 + 10 / 16)]
    assert found.of_seeds == pytest.approx(by_hand)
    said = sentence(found, "accuracy")
    assert said == (
        "SAID reaches 90% of full fine-tuning's accuracy (0.720 of 0.800) with 1,000 numbers. "
        "Between the dimensions tried, d90 is 83 to 422 (3 seeds)."
    )


def test_what_the_curve_does_not_show_is_said():
    (never,) = dimensions(made({10: (0.5,) * 3, 100: (0.6,) * 3}, "did"))
    assert never.smallest is None and never.of_seeds == (math.inf,) * 3
    assert sentence(never, "F1").startswith("DID does not reach 90% of full fine-tuning's F1")
    (always,) = dimensions(made({10: (0.75,) * 3}))
    assert "the fewest that were tried: d90 may be smaller" in sentence(always, "F1")
    (some,) = dimensions(made({10: (0.5,) * 3, 100: (0.8, 0.8, 0.7), 20: (0.5,) * 3}))
    assert "to beyond 100 (3 seeds)" in sentence(some, "F1")
    (alone,) = dimensions(made({10: (0.5,), 1000: (0.75,)}))
    assert sentence(alone, "F1").endswith("d90 is 575 (one seed).")  # 10^(1 + 2 · 0.22 / 0.25)
    assert dimensions(Comparison(facts=FACTS, runs=made(CURVES).runs[3:])) == (), "nothing in full"
    losses = tuple(r.__class__(**{**r.__dict__, "score": None}) for r in made(CURVES).runs)
    assert dimensions(Comparison(facts=FACTS, runs=losses)) == (), "a loss has no ninety percent"


def test_both_kinds_are_drawn_and_reported_beside_adapters(tmp_path, monkeypatch):
    save = Figure.savefig

    def save_one(figure, file):  # others are drawn in test_report.py
        save(figure, file) if file.name == "dimension.png" else file.write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", save_one)
    two = made(CURVES).runs + made({10: (0.6,) * 3, 300: (0.77,) * 3}, "did").runs[3:]
    adapters = tuple(run(lora(rank), seed, 1.0, 0.79) for rank in (2, 8) for seed in range(3))
    found = Comparison(facts=FACTS, runs=two + adapters)
    assert [one.method for one in dimensions(found)] == ["said", "did"]
    write_report(found, tmp_path)
    page = (tmp_path / HTML).read_text()
    assert "<h2>Intrinsic dimension" in page and "SAID d=1,000" in page
    assert (tmp_path / "pictures" / "dimension.png").stat().st_size > 1000
    without = Comparison(facts=FACTS, runs=two[:3] + adapters)
    (tmp_path / "less").mkdir()
    assert "dimension.png" not in {one.file for one in draw(without, tmp_path / "less")}
