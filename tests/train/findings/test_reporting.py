"""The table and the picture of a finding, from comparisons that nobody measured."""

import dataclasses
import re

import numpy as np
import pytest
from matplotlib import rc_context

from tests.train.compare.made_up import FACTS, full, lora, run, runs
from train.compare import result
from train.compare.reporting.pictures import STYLE
from train.compare.result import Arm, Comparison, Forgetting
from train.findings.__main__ import main
from train.findings.catalog import FINDINGS
from train.findings.reporting import document, picture
from train.findings.reporting.pivot import AXES, PivotLayout, axis_of, measures_of, pivot_of, shown

BY_RANK = PivotLayout("learning rate", "rank")
SCORES = (
    (lora(1, 3e-4), (0.568, 0.565, 0.569)),
    (lora(1, 3e-3), (0.883, 0.877, 0.891)),
    (lora(64, 3e-4), (0.881, 0.874, 0.886)),
    (lora(64, 1e-2), (0.564, 0.564, 0.564)),
    (full(3e-5), (0.873, 0.869, 0.878)),
    (full(3e-4), (0.883, 0.881, 0.885)),
)
TABLE = """\
| learning rate | rank 1 | rank 64 | full |
|---|---|---|---|
| 3e-5 | | | 0.873 (0.869–0.878) |
| 3e-4 | 0.567 (0.565–0.569) | **0.880** (0.874–0.886) | **0.883** (0.881–0.885) |
| 3e-3 | **0.884** (0.877–0.891) | | |
| 1e-2 | | 0.564 | |"""
LOSSES = """\
| learning rate | rank 1 | rank 64 | full |
|---|---|---|---|
| 3e-5 | | | 0.253 (0.244–0.262) |
| 3e-4 | 0.865 (0.862–0.870) | **0.239** (0.228–0.252) | **0.234** (0.230–0.238) |
| 3e-3 | **0.233** (0.218–0.246) | | |
| 1e-2 | | 0.872 | |"""


def made_up():
    """Returns a comparison with the scores above, and losses of twice what is missing to one."""
    found = []
    for arm, scores in sorted(SCORES, key=lambda pair: (pair[0].rank or 99, pair[0])):
        found += runs(arm, *(2 * (1 - score) for score in scores), scores=scores)
    facts = dataclasses.replace(FACTS, steps=200, score="accuracy", loss="loss (nats per text)")
    return Comparison(facts=facts, runs=tuple(found))


def pivots(found, layout=BY_RANK):
    known = measures_of(found)
    return {name: pivot_of(found, layout, measure) for name, measure in known.items()}


def test_the_tables_have_means_and_spreads_and_the_best_of_each_column_in_bold():
    found = pivots(made_up())
    (scores,), (losses,) = found["score"].blocks, found["loss"].blocks
    assert document.table(found["score"], scores) == TABLE
    assert document.table(found["loss"], losses) == LOSSES


def test_what_went_wrong_is_said_in_the_cell():
    arm, other = lora(2, 1e-3), lora(2, 1e-2)
    found = Comparison(
        facts=FACTS,
        runs=(
            run(arm, 0, 0.5),
            run(arm, 1, 0.7, status="failed", held_out_loss=None),
            run(other, 0, 0.0, status="failed", held_out_loss=None),
            run(other, 1, 0.0, status="stopped early"),
        ),
    )
    pivot = pivots(found)["loss"]
    assert document.table(pivot, pivot.blocks[0]).splitlines()[2:] == [
        "| 1e-3 | **0.500**, 1 of 2 runs |",
        "| 1e-2 | failed, stopped early |",
    ]


def test_arms_that_would_share_a_cell_get_tables_of_their_own():
    arms = [lora(rank, rate, on=on) for on in "qk" for rank in (2, 5) for rate in (1e-3, 1e-2)]
    found = Comparison(facts=FACTS, runs=tuple(run(arm, 0, 0.5) for arm in arms))
    pivot = pivot_of(found, PivotLayout("rank", "targets"), measures_of(found)["loss"])
    assert [block.title for block in pivot.blocks] == ["rate 1e-3", "rate 1e-2"]
    assert pivot.blocks[0].rows == (2, 5)
    assert pivot.blocks[0].columns == ("q + v_proj", "k + v_proj")
    together = pivot_of(found, PivotLayout("learning rate", "targets × rank"), pivot.measure)
    (block,) = together.blocks
    assert block.columns == (
        *("q + v_proj, rank 2", "q + v_proj, rank 5", "k + v_proj, rank 2", "k + v_proj, rank 5"),
    )


def test_all_of_full_stands_under_its_name_whatever_the_axis():
    found = Comparison(facts=FACTS, runs=(run(full(), 0, 0.5), run(lora(2), 0, 0.4)))
    for columns in ("rank", "targets", "alpha", "method", "targets × rank"):
        pivot = pivot_of(found, PivotLayout("learning rate", columns), measures_of(found)["loss"])
        (block,) = pivot.blocks
        assert len(block.columns) == 2 and "full" in block.columns


BY_SIZE = PivotLayout("trained parameters", "method", at_best_rate=True)


def test_each_method_and_size_stands_at_its_best_rate():
    arms = [
        (lora(2), 20, (0.5, 0.9)),
        (lora(16), 160, (0.7, 0.6)),
        (full(), 22_714_321, (0.8, 0.1)),
    ]
    found = [
        run(
            arm._replace(learning_rate=rate),
            seed,
            1 - score,
            score - seed / 100,
            trained_parameters=n,
        )
        for arm, n, scores in arms
        for rate, score in zip((1e-3, 3e-3), scores, strict=True)
        for seed in (0, 1)
    ]
    pivot = pivots(Comparison(facts=FACTS, runs=tuple(found)), BY_SIZE)["score"]
    (block,) = pivot.blocks
    assert document.table(pivot, block).splitlines() == [
        "| trained parameters | LoRA | full |",
        "|---|---|---|",
        "| 20 | **0.895** (0.890–0.900) | |",
        "| 160 | 0.695 (0.690–0.700) | |",
        "| 22,714,321 | | **0.795** (0.790–0.800) |",
    ]
    (axes,) = picture.figure_of(pivot).axes
    assert axes.get_xticklabels()[-1].get_rotation() == 0


def test_names_that_would_overlap_below_a_picture_are_turned():
    sizes = (13, 250, 1_000, 10_000, 169_730, 22_714_321)
    found = [run(lora(n % 97), 0, 0.5, 0.5, trained_parameters=n) for n in sizes]
    pivot = pivots(Comparison(facts=FACTS, runs=tuple(found)), BY_SIZE)["score"]
    (axes,) = picture.figure_of(pivot).axes
    assert axes.get_xticklabels()[-1].get_rotation() > 20


def test_a_long_name_beside_a_picture_is_broken():
    found = Comparison(facts=FACTS, runs=(run(lora(), 0, 0.5, forgetting=Forgetting(2.0, 2.5)),))
    (axes,) = picture.figure_of(pivots(found)["forgetting"]).axes
    lines = axes.get_ylabel().split("\n")
    assert len(lines) > 1 and max(map(len, lines)) <= 28


@pytest.mark.parametrize(
    "value, text",
    [
        *((3e-4, "3e-4"), (2.5e-3, "2.5e-3"), (0.01, "1e-2"), (16, "16"), (1.5, "1.5"), ("q", "q")),
        (10_000, "10,000"),
    ],
)
def test_numbers_are_short(value, text):
    assert shown(value) == text


def test_the_picture_has_the_numbers_of_the_comparison(tmp_path):
    found = made_up()
    result.write(found, tmp_path)
    figure = picture.figure_of(pivots(result.read(tmp_path))["score"])
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["3e-5", "3e-4", "3e-3", "1e-2"]
    drawn = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    assert [*drawn] == ["rank 1", "rank 64", "full"]
    assert axes.get_xscale() == "log"
    for name, arms in (("rank 1", 1), ("rank 64", 64), ("full", None)):
        of = sorted((arm.learning_rate, scores) for arm, scores in SCORES if arm.rank == arms)
        line, _, (bars,) = drawn[name]
        at, means = line.get_data()
        assert [*at] == [rate for rate, _ in of] and line.get_linestyle() != "None"
        np.testing.assert_allclose(np.asarray(means, float), [np.mean(scores) for _, scores in of])
        ends = [segment[:, 1].astype(float) for segment in bars.get_segments()]
        np.testing.assert_allclose(ends, [(min(s), max(s)) for _, s in of], atol=1e-12)


def test_panels_have_one_scale_and_names_are_lines_to_compare_with():
    """Two batch sizes, in each of which full fine-tuning stands beside two dimensions."""
    found = []
    for size, scale in ((8, 1.0), (32, 0.1)):
        arms = [Arm("said", None, None, None, 1e-2, size, d) for d in (10, 1000)]
        for arm in (*arms, full()._replace(batch_size=size)):
            found += [run(arm, seed, 1.0, scale * (0.5 + 0.1 * seed)) for seed in (0, 1)]
    layout = PivotLayout("dimension", "method", ("batch size",))
    figure = picture.figure_of(pivots(Comparison(facts=FACTS, runs=tuple(found)), layout)["score"])
    first, second = figure.axes
    assert first.get_xlim() == second.get_xlim() and first.get_ylim() == second.get_ylim()
    drawn = dict(zip(*reversed(first.get_legend_handles_labels()), strict=True))
    assert [*drawn["SAID"][0].get_xdata()] == [10, 1000]
    assert [*drawn["full"].get_ydata()] == pytest.approx([0.55, 0.55])


def test_a_picture_has_the_best_of_arms_that_share_a_place():
    """Two ranks of one size, and full fine-tuning, stand in one panel."""
    scores = {lora(1): 0.6, lora(4): 0.9, lora(4, 3e-3): 0.7, full(): 0.8}
    found = [run(arm, 0, 1.0, x, trained_parameters=896) for arm, x in scores.items()]
    layout = FINDINGS["rl-numbers"].picture
    (block,) = pivots(Comparison(facts=FACTS, runs=tuple(found)), layout)["score"].blocks
    assert {key: row.arm for key, row in block.cells.items()} == {
        (896, "LoRA"): lora(4),
        (896, "full"): full(),
    }


def test_each_finding_draws_what_its_claim_is_about():
    assert FINDINGS["batches"].picture.rows == FINDINGS["rl-batches"].picture.rows == "batch size"
    assert (
        FINDINGS["alphas"].picture.rows == "alpha" and FINDINGS["alphas"].layout.columns == "alpha"
    )
    for finding in FINDINGS.values():
        assert axis_of(finding.picture.rows).name and axis_of(finding.picture.columns).name


@pytest.mark.parametrize(
    "name", ["full", "alpha 256", "attention, rank 1", "attention + experts, rank 8"]
)
def test_the_legend_is_inside_the_picture(name):
    arms = [lora(8)._replace(targets=(f"{name[:-1]}{i}",)) for i in range(4)]
    found = Comparison(facts=FACTS, runs=tuple(run(arm, 0, 1.0, 0.5) for arm in arms))
    with rc_context(STYLE):
        figure = picture.figure_of(pivots(found, PivotLayout("learning rate", "targets"))["score"])
        (legend,) = figure.legends
        figure.draw_without_rendering()
    inside, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= inside.x0 and inside.x1 <= whole.x1 and inside.y0 >= whole.y0


def test_tables_and_picture_come_from_a_comparison_that_is_over(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    result.write(made_up(), tmp_path / "there")
    main(["rates", "--from", str(tmp_path / "there"), "--output", str(tmp_path / "here")])
    text = (tmp_path / "here" / "finding.md").read_text()
    assert TABLE in text and LOSSES in text and "Schulman" in text
    assert text.index(TABLE) < text.index(LOSSES)
    assert "Accuracy, mean of three seeds (lowest to highest); 200 steps of 8 rows:" in text
    assert "![Accuracy by learning rate](finding.png)" in text
    minutes = sum(one.seconds for one in made_up().runs) / 60
    assert text.splitlines()[-1] == (
        f"Measured on 2026-01-02, 1 × made-up accelerator, {minutes:.0f} minutes for 18 runs; "
        "Python 3.11.9, JAX 0.10.0."
    )
    assert (tmp_path / "here" / "finding.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "here" / "finding.png").stat().st_size < 100_000
    assert TABLE in capsys.readouterr().out
    main(["rates", "--from", str(tmp_path / "there"), "--measure", "loss"])
    text = (tmp_path / "there" / "finding.md").read_text()
    assert TABLE not in text and "![Held-out loss (nats per text) by learning rate]" in text


@pytest.mark.parametrize(
    "line, said",
    [
        (["nope"], "there is no finding 'nope'. Choose one of rates, "),
        (["rates", "--from", "{}/none"], "compare.json cannot be read .*output folder of train"),
        (["rates", "--from", "{}", "--rows", "8"], "runs nothing, so --rows 8 has no effect"),
        (
            ["rates", "--config", "x"],
            "rates, which uses its own file, .*rates.yaml. Pass options on",
        ),
        (["rates", "--ranks", "0", "--output", "{}/o"], "--ranks 0 is out of range"),
        (["moe", "--from", "{}", "--measure", "score"], "needs a score, .* only has loss"),
    ],
)
def test_what_cannot_be_done_is_said(line, said, tmp_path, capsys):
    loss_alone = Comparison(facts=FACTS, runs=(run(lora(), 0, 0.5),))
    result.write(loss_alone, tmp_path)
    with pytest.raises(SystemExit) as error:
        main([word.format(tmp_path) for word in line])
    assert error.value.code == 2
    assert re.search(said, " ".join(capsys.readouterr().err.split()))


def test_a_comparison_of_which_nothing_ended_has_no_table(tmp_path, capsys):
    found = Comparison(facts=FACTS, runs=(run(lora(), 0, 0.5, status="waiting"),))
    result.write(found, tmp_path)
    with pytest.raises(SystemExit):
        main(["rates", "--from", str(tmp_path)])
    assert "has none: no run ended" in capsys.readouterr().err
    assert not (tmp_path / "finding.md").exists()


def test_each_setting_of_an_arm_is_an_axis():
    """A further setting without an axis would let two arms share a cell."""
    assert {name.replace(" ", "_") for name in AXES} == {*Arm._fields, "trained_parameters"}


def test_what_is_forgotten_and_what_intrudes_have_tables_of_their_own(tmp_path):
    """By hand: rank 8 forgets 0.1 and 0.3 nats, and full fine-tuning 0.5; 2 and 4 intruders."""
    lost = {lora(8): (0.1, 0.3), full(): (0.5, 0.5)}
    runs = [
        run(arm, seed, 1.0, forgetting=Forgetting(2.0, 2.0 + by), intruders=intruders)
        for arm, rises in lost.items()
        for seed, (by, intruders) in enumerate(zip(rises, (2.0, 4.0), strict=True))
    ]
    result.write(Comparison(facts=FACTS, runs=tuple(runs)), tmp_path)
    main(["forgetting", "--from", str(tmp_path)])
    text = (tmp_path / "finding.md").read_text()
    assert "Rise of the loss on other text (nats per token), mean of two seeds" in text
    assert "**0.200** (0.100–0.300)" in text and "**3.000** (2.000–4.000)" in text
    main(["forgetting", "--from", str(tmp_path), "--measure", "intruders"])
    text = (tmp_path / "finding.md").read_text()
    assert "Intruder dimensions of a matrix, mean" in text and "Rise of the loss" not in text


def test_the_intrinsic_dimension_stands_below_its_table():
    arms = [Arm(m, None, None, None, 1e-2, 8, d) for m in ("said", "did") for d in (10, 100)]
    found = [
        run(arm, seed, 1.0, 0.9 * 0.8 * (1.1 if arm.dimension == 100 else 0.9))
        for arm in arms
        for seed in range(3)
    ]
    found += [run(full(), seed, 1.0, 0.8) for seed in range(3)]
    whole = Comparison(facts=FACTS, runs=tuple(found))
    chosen = [pivots(whole, PivotLayout("dimension", "method"))["score"]]
    text = document.document("Title", "Said.", (), whole, chosen, None)
    assert "| dimension | SAID | DID | full |" in text
    for kind in ("SAID", "DID"):
        assert f"{kind} reaches 90% of full fine-tuning's {FACTS.score}" in text
    assert "with 100 numbers" in text
