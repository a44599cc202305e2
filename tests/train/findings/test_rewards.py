"""Findings by rewards: what is decided, and where a method stands at the same score."""

import dataclasses

import pytest

from tests.train.compare.made_up import FACTS, full, lora, run
from train.compare.reporting import tables
from train.compare.reporting.recommend import recommend
from train.compare.result import Comparison, Point
from train.findings.reporting import decision, document, same_score
from train.findings.reporting.pivot import PivotLayout, pivot_of

REWARDS = dataclasses.replace(
    FACTS, script="train.grpo", score="reward", by_score=True, baselines={"base": 0.5}
)


def made_up(scores):
    """A comparison of arms whose seeds have these scores."""
    runs = [run(arm, seed, 0.0, x) for arm, of in scores.items() for seed, x in enumerate(of)]
    return Comparison(facts=REWARDS, runs=tuple(runs))


def test_where_nothing_falls_behind_nothing_is_decided():
    alike = {lora(1): (0.90, 0.92, 0.91), lora(16): (0.91, 0.90, 0.92), full(): (0.92, 0.91, 0.9)}
    *_, last = decision.sentences(made_up(alike))
    assert last.startswith("This decides nothing: no setting at its best rate falls behind")
    behind = alike | {lora(1): (0.60, 0.62, 0.61)}
    first, *others = decision.sentences(made_up(behind))
    assert "behind it, beyond the spread over seeds, are LoRA r=1, lr 0.001 by 0.3" in first
    assert "within the spread of it are full fine-tuning" in first
    assert not any("decides nothing" in line for line in others)


def test_each_setting_counts_at_its_best_rate_and_each_batch_size_alone():
    large = lora(16)._replace(batch_size=256)
    scores = {lora(16): (0.9, 0.91), lora(16, 1e-1): (0.1, 0.1), full(): (0.9, 0.91)}
    scores |= {large: (0.2, 0.21), full()._replace(batch_size=256): (0.8, 0.81)}
    lines = decision.sentences(made_up(scores))
    assert lines[0].startswith("Batch 8: ") and "behind" not in lines[0]
    assert lines[1].startswith("Batch 256: full fine-tuning batch 256, lr 0.0001 is the best")
    assert "LoRA r=16 batch 256, lr 0.001 by 0.60" in lines[1]
    assert any("learning rate is 10 times that of full fine-tuning" in line for line in lines)


def curve(arm, seed, scores, divergences):
    """A run with a score and a divergence after each ten steps."""
    steps = range(10, 10 * len(scores) + 1, 10)
    points = [tuple(map(Point, steps, values)) for values in (scores, divergences)]
    return run(arm, seed, 0.0, scores[-1], scores=points[0], divergences=points[1])


def test_the_divergence_is_taken_where_all_methods_have_the_same_score():
    sft = lora(16, method="sft")
    runs = (
        curve(lora(16), 0, (0.6, 0.8, 0.9), (0.01, 0.02, 0.06)),
        curve(lora(16), 1, (0.7, 0.84, 0.9), (0.02, 0.04, 0.08)),
        curve(sft, 0, (0.9, 1.0), (0.5, 0.7)),
        curve(sft, 1, (0.7, 0.8), (0.2, 0.3)),
    )
    common = same_score.common_score(Comparison(facts=REWARDS, runs=runs))
    ours, theirs = common.rows
    assert common.level == pytest.approx(0.5 + 0.9 * 0.4)
    assert ours.quality.low == pytest.approx(0.02 + 0.6 * 0.04)  # 0.86 is 0.6 of 0.8 to 0.9
    assert ours.quality.high == pytest.approx(0.04 + 0.02 / 0.06 * 0.04)
    assert (theirs.quality.n, len(theirs.runs)) == (1, 2)
    assert theirs.quality.mean == pytest.approx(0.9 * 0.5)  # of 0.5 to 0.9, from the start
    (text,) = same_score.sentences(Comparison(facts=REWARDS, runs=runs))
    assert "reaches 0.860" in text and "2 of 2 and 1 of 2 runs" in text and "too few" in text


def test_rewards_and_examples_are_compared_at_equal_rates_alone():
    """Rewards at 1e-3 move the model less than examples at 3e-3, but as much as at 1e-3."""
    moved = {(1e-3, "lora"): 0.1, (1e-3, "sft"): 0.11, (3e-3, "lora"): 0.2, (3e-3, "sft"): 0.4}
    runs = [
        curve(lora(16, rate, method), seed, (0.9,), (divergence + seed * 0.01,))
        for (rate, method), divergence in moved.items()
        for seed in range(3)
    ]
    near, far = same_score.sentences(Comparison(facts=REWARDS, runs=tuple(runs)))
    assert near.startswith("At the rate 1e-3 for both,") and "do not tell" in near
    assert far.startswith("At the rate 3e-3 for both,") and "less, by 0.18 (± 0." in far
    *_, last = decision.sentences(Comparison(facts=REWARDS, runs=tuple(runs[3:9])))
    assert "At the rate" not in last, "no rate is shared"


def test_without_a_divergence_or_a_rise_there_is_no_common_score():
    assert same_score.sentences(made_up({lora(): (0.9, 0.9)})) == []
    flat = (curve(lora(), 0, (0.5, 0.5), (0.1, 0.2)),)
    assert same_score.sentences(Comparison(facts=REWARDS, runs=flat)) == []


def test_what_is_best_at_an_edge_of_the_grid_is_said_first():
    """Rank 1 is best at its largest rate and smallest alpha, rank 16 within, full has one rate."""
    scores = {lora(1, rate): (score, score) for rate, score in ((1e-3, 0.5), (3e-3, 0.9))}
    scores |= {lora(1, 3e-3)._replace(alpha=8.0): (0.7, 0.7)}
    scores |= {lora(16, rate): (x, x) for rate, x in ((1e-3, 0.5), (3e-3, 0.9), (1e-2, 0.1))}
    scores |= {full(): (0.8, 0.8)}
    comparison = made_up(scores)
    measure = tables.criterion_of(comparison)
    text = decision.edges(comparison, measure)
    assert text.startswith("The best may lie beyond the grid: ")
    assert "the rate of LoRA r=1 α=2 is best at 3e-3, the largest tried" in text
    assert "the alpha at rank 1 is best at 2, the smallest tried" in text
    assert "the rate of full fine-tuning is 1e-4, the only one tried" in text and "r=16" not in text
    pivots = [pivot_of(comparison, PivotLayout("learning rate", "rank"), measure)]
    page = document.document("Title", "Said.", (), comparison, pivots, None)
    assert page.index(text) < page.index("| learning rate |") < page.index("is the best, with")
    within = {lora(16, rate): (x, x) for rate, x in ((1e-3, 0.5), (3e-3, 0.9), (1e-2, 0.1))}
    assert decision.edges(made_up(within), measure) is None


def test_findings_and_verdicts_have_one_standard():
    """0.893 against 0.927 ± 0.09 is decided neither by the seeds nor where all of them differ."""
    near = made_up({lora(1): (0.895, 0.898, 0.891), full(): (0.891, 0.961, 0.93)})
    assert "within the spread of it are LoRA r=1" in decision.sentences(near)[0]
    apart = made_up({lora(1): (0.80, 0.89, 0.85), full(): (0.90, 0.96, 0.93)})
    line = decision.sentences(apart)[0]
    assert "behind it in every seed, but not told apart by so few, are LoRA r=1" in line
    assert recommend(near).verdict == recommend(apart).verdict == "undecided"
    assert "so few seeds" in recommend(apart).headline
