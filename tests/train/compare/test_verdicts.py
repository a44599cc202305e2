"""Verdicts on made-up results of single questions, which are known beforehand."""

import dataclasses
import re

import numpy as np
import pytest
from scipy import stats

from tests.benchmarks import verdicts
from tests.train.compare.made_up import FACTS, full, lora, run
from train.compare import result
from train.compare.reporting import gap as gaps
from train.compare.reporting import tables
from train.compare.reporting.pages import write_report
from train.compare.reporting.recommend import recommend
from train.compare.result import Comparison

N = 64
LOW = [1] + [0] * (N - 1)


def right(n, of=N, shift=0):
    """The results of `of` questions, of which n are right, from the question `shift` on."""
    return np.roll([1] * n + [0] * (of - n), shift).tolist()


def answered(arm, *seeds, **more):
    """Returns a run for each seed, with these results of its questions."""
    return [
        run(arm, seed, 1.0, float(np.mean(row)), question_scores=tuple(map(float, row)), **more)
        for seed, row in enumerate(seeds)
    ]


def compared(lora_seeds, full_seeds, *, is_known=True, extra=(), cost=(), **facts):
    """Returns the recommendation of a comparison in which the best rates have neighbours."""
    n = len(lora_seeds[0]) if lora_seeds else N
    low = [0] * n
    arms = (lora(8, 3e-4), lora(8, 3e-3), lora(32), full(3e-5), full(3e-4))
    runs = [one for arm in arms for one in answered(arm, low, low)] if n > 4 else []
    runs += [*answered(lora(), *lora_seeds), *answered(full(), *full_seeds), *extra]
    if not is_known:
        runs = [dataclasses.replace(one, question_scores=()) for one in runs]
    free = {name: None for name in cost}
    runs = [dataclasses.replace(one, **free) for one in runs]
    whole = dataclasses.replace(FACTS, script="train.grpo", by_score=True, **facts)
    return recommend(Comparison(facts=whole, runs=tuple(runs)))


CASES = {
    "full must win": ([right(n) for n in (20, 22, 21)], [right(n) for n in (44, 45, 43)], "full"),
    "LoRA must win": ([right(n) for n in (44, 45, 43)], [right(n) for n in (20, 22, 21)], "lora"),
    "undecidable by seeds": ([right(n) for n in (30, 50, 9)], [right(n) for n in (2, 52, 8)], None),
    "undecidable by questions": ([right(9, 16)] * 3, [right(8, 16)] * 3, None),
    "one seed": ([right(33)], [right(32)], None),
    "one seed, far apart": ([right(50)], [right(12)], "lora"),
    "one seed, five questions": ([right(5, 8)], [right(0, 8)], None),
    "equal scores": ([right(30)] * 3, [right(30)] * 3, None),
    "every question right": ([right(N)] * 3, [right(N)] * 3, None),
    "every question wrong": ([right(0)] * 3, [right(0)] * 3, None),
    "one all right, six questions": ([right(6, 6)] * 3, [right(0, 6)] * 3, "lora"),
    "one all right, five questions": ([right(5, 5)] * 3, [right(0, 5)] * 3, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_winner_is_named_where_there_is_one(name):
    of_lora, of_full, winner = CASES[name]
    advice = compared(of_lora, of_full)
    named = {"LoRA is better": "lora", "full fine-tuning is better": "full"}
    (*found,) = (who for text, who in named.items() if text in advice.headline)
    assert found == ([winner] if winner else []), advice.headline
    if winner == "full":
        assert advice.verdict == "full"
    elif winner is None:
        assert advice.verdict != "full"


def test_a_setting_of_which_a_run_failed_may_be_the_best():
    of_lora, of_full, _ = CASES["full must win"]
    lost = dict(score=None, status="failed", held_out_loss=None, error="no memory")
    poor = compared(of_lora, of_full, extra=[run(full(3e-5), 3, 0.0, **lost)])
    assert poor.verdict == "full" and "full fine-tuning is better" in poor.headline
    best = compared(of_lora, of_full, extra=[run(full(), 3, 0.0, **lost)])
    assert best.verdict == "undecided" and "a better setting of full" in best.headline
    assert (
        "full fine-tuning, lr 0.0001 has 0.688, but 1 of its 4 runs has no value"
        in best.undecided[-1]
    )
    none = compared(of_lora, [], extra=[run(full(), 3, 0.0, **lost)])
    assert none.verdict == "undecided"


@pytest.mark.parametrize("is_known", [True, False])
def test_one_question_of_four_decides_nothing(is_known):
    """Three seeds that all agree show no spread, and one question is no proof."""
    advice = compared([right(1, 4)] * 3, [right(2, 4)] * 3, is_known=is_known)
    assert advice.verdict == "undecided" and "better" not in advice.headline
    assert "tied" not in " ".join([advice.headline, *advice.reasons])
    assert "so few seeds" in advice.headline
    known = "The results of single questions are not known: the seeds alone decide."
    assert (known in advice.reasons) == (not is_known)


def test_the_interval_counts_seeds_and_paired_questions():
    """Against the textbook formulas, from the raw results."""
    rng = np.random.default_rng(0)
    shared = rng.random(N) < 0.3
    first, second = ((rng.random((3, N)) < p) | shared for p in (0.5, 0.45))
    advice = compared(first.astype(int).tolist(), second.astype(int).tolist())
    means = first.mean(1), second.mean(1)
    parts = [(x.var(ddof=1) / 3, 2) for x in means]
    paired = first.mean(0) - second.mean(0)
    parts.append((paired.var(ddof=1) / N, N - 1))
    total = sum(v for v, _ in parts)
    freedom = total**2 / sum(v**2 / f for v, f in parts)
    width = stats.t.ppf(0.975, freedom) * total**0.5
    (shown,) = re.findall(
        r"± ([\d.]+), its 95% interval over seeds and 64 questions", " ".join(advice.reasons)
    )
    assert float(shown) == pytest.approx(width, rel=0.05)


def test_seeds_that_are_apart_are_never_called_tied():
    """Each seed of full is above each of LoRA, by less than three seeds can tell."""
    of_lora, of_full = [right(n) for n in (30, 33, 36)], [right(n) for n in (37, 40, 44)]
    advice = compared(of_lora, of_full)
    assert "so few seeds and 64 questions do not tell the methods apart" in advice.headline
    assert advice.verdict == "undecided" and "ahead by 18%" in advice.undecided[0]
    near = compared(of_lora, [right(n) for n in (37, 37, 38)])
    assert "so few seeds" in near.headline and "tied" not in " ".join(
        [near.headline, *near.reasons]
    )


COMMAND = "train.compare grpo --output a --eval-questions 64 --quick"


def test_the_command_asks_for_as_many_questions_as_tell_the_gap_apart():
    """Drawn anew with as many questions, such a gap is told apart in about four of five."""
    rng = np.random.default_rng(1)
    of_lora, of_full = right(24), right(30, shift=4)
    facts = dict(command=COMMAND, eval_questions=N, most_questions=1_000)
    advice = compared([of_lora] * 3, [of_full] * 3, **facts)
    assert advice.verdict == "undecided"
    (n,) = map(int, re.findall(r"--eval-questions (\d+) --quick", advice.command))
    assert N < n <= 1_000 and f"ask {n:,} questions (--eval-questions)" in advice.undecided[0]
    decided = 0
    for _ in range(100):
        drawn = rng.integers(0, N, n)
        sides = ([np.array(side)[drawn].tolist()] * 3 for side in (of_lora, of_full))
        comparison = verdicts.comparison_of(np.array([*sides], float))
        decided += verdicts.winner_of(comparison) == "full"
    assert 65 <= decided <= 95
    few = compared([of_lora] * 3, [of_full] * 3, **facts | {"most_questions": n - 1})
    assert few.command is None and "hold out more" in few.undecided[0]


def test_the_command_asks_for_as_many_seeds_as_tell_the_gap_apart():
    rng = np.random.default_rng(2)
    of_lora, of_full = [right(n) for n in (24, 36, 30)], [right(n) for n in (34, 44, 30)]
    advice = compared(of_lora, of_full, command="train.compare grpo --seeds 0 1 2")
    (seeds,) = re.findall(r"--seeds ([\d ]+)", advice.command)
    n = len(seeds.split())
    assert 3 < n <= gaps.MAX_SEEDS and f"with {n}, such a gap" in advice.undecided[0]
    decided = 0
    for _ in range(100):
        counts = [np.clip(rng.normal(mean, deviation, n).round(), 0, N).astype(int)
                  for mean, deviation in ((30, 6), (36, 7.2))]  # fmt: skip
        sides = [[right(count) for count in of_arm] for of_arm in counts]
        decided += verdicts.winner_of(verdicts.comparison_of(np.array(sides, float))) == "full"
    assert 65 <= decided <= 95


def test_a_side_that_was_not_run_is_asked_for():
    advice = recommend(Comparison(
        facts=dataclasses.replace(FACTS, command="train.compare sft --methods lora"),
        runs=tuple(answered(lora(), LOW, LOW)),
    ))  # fmt: skip
    assert advice.command == "train.compare sft --methods lora full --output runs/compare-2"


def test_costs_that_were_not_measured_are_asked_for():
    same = [right(30)] * 3
    bare = ("compiled_bytes", "step_seconds", "peak_bytes")
    advice = compared(same, same, cost=bare, command="train.compare grpo --no-costs --seeds 0 1 2")
    assert advice.verdict == "undecided" and "memory and time are not known" in advice.headline
    assert advice.command == "train.compare grpo --seeds 0 1 2 --costs --output runs/compare-2"


def test_an_undecided_report_highlights_the_best_mean(tmp_path):
    """As once measured: full fine-tuning had 0.16, LoRA 0.094, and LoRA stood out."""
    runs = [
        *answered(lora(), right(1, 16), right(2, 16)),
        *answered(full(), right(1, 16), right(4, 16)),
    ]
    comparison = Comparison(facts=FACTS, runs=tuple(runs))
    assert write_report(comparison, tmp_path).verdict == "undecided"
    (row,) = re.findall(r"<tr class=best>(.*?)</tr>", (tmp_path / "report.html").read_text())
    assert "full fine-tuning" in row and tables.rows(comparison)[0].arm == full()
    assert "ahead so far: its mean is the best" in (tmp_path / "report.md").read_text()


def test_results_of_questions_survive_the_file_and_old_files_have_none(tmp_path):
    some = dataclasses.replace(run(lora(), 0, 1.0, 0.5), question_scores=(1.0, None, 0.0))
    result.write(Comparison(facts=FACTS, runs=(some, run(full(), 0, 1.0))), tmp_path)
    assert result.read(tmp_path).runs[0].question_scores == (1.0, None, 0.0)
    text = (tmp_path / result.JSON).read_text()
    old = re.sub(r'\s*"(question_scores": \[[^]]*\]|(eval|most)_questions": null),?', "", text)
    old = re.sub(r",(\s*})", r"\1", old)
    (tmp_path / result.JSON).write_text(old)
    assert "question" not in old and result.read(tmp_path).runs[0].question_scores == ()


@pytest.mark.parametrize("design", verdicts.DESIGNS[2:4], ids=lambda design: design.name)
def test_winners_are_named_where_there_is_a_difference(design):
    assert verdicts.share_of_winners(design, 0, 100) <= 0.1
    assert verdicts.share_of_winners(design, 5, 100) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("design", verdicts.DESIGNS, ids=lambda design: design.name)
def test_a_false_winner_is_named_in_at_most_one_of_twenty(design):
    assert verdicts.share_of_winners(design, 0, 1_000) <= 0.05
    assert verdicts.share_of_winners(design, 5, 300) >= 0.8
    if design.questions == N and design.seeds < 0.01:
        assert verdicts.share_of_winners(design, 3, 300) >= 0.75
