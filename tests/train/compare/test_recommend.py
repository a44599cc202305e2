import dataclasses

import pytest

from tests.train.compare.made_up import FACTS, full, lora, run, runs
from train.compare.reporting import tables
from train.compare.reporting.recommend import recommend
from train.compare.result import Arm, Comparison, Forgetting

# The best rate of each method has neighbours, and the best rank is not the largest.
AROUND = (
    *(runs(lora(8, rate), 2.0, 2.01) for rate in (3e-4, 3e-3)),
    *(runs(full(rate), 2.0, 2.01) for rate in (3e-5, 3e-4)),
    runs(lora(32), 2.0, 2.01),
)


def compared(*groups, around=AROUND, **facts):
    every = tuple(run for group in (*groups, *around) for run in group)
    return recommend(Comparison(facts=dataclasses.replace(FACTS, **facts), runs=every))


def test_within_the_spread_cost_decides():
    found = compared(runs(lora(), 1.01, 1.03, 1.02), runs(full(), 1.0, 1.02, 1.03))
    assert (found.verdict, found.arm) == ("lora", lora())
    said = " ".join(found.reasons)
    assert "within the spread (± 0.0" in said and "95% interval over seeds" in said
    assert "1.020 with LoRA r=8, lr 0.001 (3 seeds), 1.017 with full fine-tuning" in said
    assert "3.1 GB with LoRA, 12 GB in full" in said and "78 times as much" in said
    assert found.headline == (
        "Use LoRA r=8, lr 0.001: quality tied; LoRA is ahead in memory, time, files and forgetting."
    )
    assert found.command is None
    assert not any(word in said for word in ("worse", "not decided", "ahead"))


def test_full_fine_tuning_that_is_better_beyond_the_spread_is_recommended_with_its_price():
    found = compared(runs(lora(), 1.2, 1.21, 1.19), runs(full(), 1.0, 1.01, 0.99))
    assert (found.verdict, found.arm, found.undecided) == ("full", full(), ())
    assert "price" in " ".join(found.reasons)
    # The same gap of means with a wider spread does not decide.
    wide = compared(runs(lora(), 1.0, 1.2, 1.11), runs(full(), 0.9, 1.02, 1.2))
    assert wide.verdict == "lora"


def test_a_better_adapter_is_recommended_for_its_quality():
    found = compared(runs(lora(), 1.0, 1.01, 0.99), runs(full(), 1.2, 1.21, 1.19))
    assert found.verdict == "lora" and "beyond the spread" in found.reasons[1]


@pytest.mark.parametrize(
    ("without", "said"),
    [
        (4, "best rank of LoRA, 8, is the largest tried: try 32"),
        (0, "rate of LoRA, 0.001, is the smallest tried: try 0.00033 too"),
        (1, "rate of LoRA, 0.001, is the largest tried: try 0.003 too"),
    ],
)
def test_nothing_is_decided_against_an_adapter_at_an_edge(without, said):
    around = tuple(group for i, group in enumerate(AROUND) if i != without)
    found = compared(runs(lora(), 1.2, 1.21, 1.19), runs(full(), 1.0, 1.01, 0.99), around=around)
    assert (found.verdict, found.arm) == ("undecided", full())
    assert said in " ".join(found.undecided)


def test_nothing_is_decided_against_full_fine_tuning_at_an_edge():
    around = tuple(group for i, group in enumerate(AROUND) if i not in (2, 3))
    found = compared(runs(lora(), 1.0, 1.01, 0.99), runs(full(), 1.2, 1.21, 1.19), around=around)
    assert (found.verdict, found.arm) == ("undecided", lora())
    assert "one learning rate alone" in found.undecided[0]


def test_the_headline_says_all_at_once_and_a_command_would_decide():
    around = tuple(group for i, group in enumerate(AROUND) if i != 3)
    command = "python -m train.compare sft --full-lrs 3e-5 1e-4 --dataset 'my rows' --resume"
    tied = runs(lora(), 1.01, 1.03, 1.02), runs(full(), 1.0, 1.02, 1.03)
    found = compared(*tied, around=around, command=command)
    assert found.headline == (
        "Not decided between LoRA r=8, lr 0.001 and full fine-tuning, lr 0.0001: quality tied; "
        "LoRA is ahead in memory, time, files and forgetting; the best rate of full fine-tuning is "
        "at the edge of what was tried."
    )
    assert found.command == (
        "python -m train.compare sft --full-lrs 3e-05 0.0001 0.0003 --dataset 'my rows' "
        "--output runs/compare-2"
    )
    one_seed = compared(runs(lora(), 1.05), runs(full(), 1.0), command="c sft --output a --seeds 0")
    assert one_seed.command == "c sft --output a-2 --seeds 0 1 2 3"


def test_one_seed_decides_by_a_large_gap_alone():
    near = compared(runs(lora(), 1.05), runs(full(), 1.0))
    assert near.verdict == "undecided" and "seeds" in near.undecided[0]
    assert "not known" in near.reasons[1]
    assert compared(runs(lora(), 1.2), runs(full(), 1.0)).verdict == "full"
    assert compared(runs(lora(), 1.0), runs(full(), 1.0)).verdict == "lora"


def test_a_spread_that_hides_a_large_gap_does_not_decide():
    found = compared(runs(lora(), 1.6, 1.0), runs(full(), 1.0, 1.01))
    assert found.verdict == "undecided" and "more seeds" in found.undecided[0]
    assert "not told apart by these seeds" in found.headline
    assert "tied" not in " ".join([found.headline, *found.reasons])


def test_a_missing_side_is_said():
    alone = compared(runs(lora(), 1.0, 1.1), around=())
    assert (alone.verdict, alone.arm) == ("undecided", lora())
    assert "No run of full fine-tuning" in alone.reasons[0]
    assert "an adapter" in compared(runs(full(), 1.0), around=()).reasons[0]
    assert compared(around=()).arm is None


def test_the_score_goes_before_the_loss_where_both_methods_have_it():
    scored = [
        runs(arm, *losses, scores=scores)
        for arm, losses, scores in (
            (lora(), (1.2, 1.21), (0.9, 0.91)),
            (lora(8, 3e-4), (1.2, 1.21), (0.3, 0.3)),
            (lora(8, 3e-3), (1.2, 1.21), (0.3, 0.3)),
            (full(), (1.0, 1.01), (0.5, 0.51)),
            (full(3e-5), (1.0, 1.01), (0.3, 0.3)),
            (full(3e-4), (1.0, 1.01), (0.3, 0.3)),
        )
    ]
    found = compared(*scored, around=())
    assert found.verdict == "lora" and found.reasons[0].startswith("Exact match: 0.905 ")


def test_the_training_loss_alone_decides_nothing():
    bare = [
        dataclasses.replace(run, held_out_loss=None)
        for group in (*AROUND, runs(lora(), 1.2, 1.21), runs(full(), 1.0, 1.01))
        for run in group
    ]
    found = recommend(Comparison(facts=FACTS, runs=tuple(bare)))
    assert (found.verdict, found.arm) == ("undecided", full())
    assert "hold out rows" in found.undecided[0]


def test_a_head_that_trains_alone_is_no_adapter():
    head = Arm("head-only", None, None, None, 1e-3, 8)
    found = compared(runs(head, 0.1, 0.11), runs(lora(), 1.0, 1.01), runs(full(), 1.0, 1.01))
    assert (found.verdict, found.arm) == ("lora", lora())


def test_storage_counts_one_base_for_all_adapters():
    every = (*runs(lora(), 1.0), *runs(full(), 1.0))
    stored = tables.storage(Comparison(facts=FACTS, runs=every))
    adapter, model = every[0].saved_bytes, every[1].saved_bytes
    assert [one.tasks for one in stored] == [1, 10, 100, 1000]
    assert (stored[2].full, stored[2].adapters) == (100 * model, model + 100 * adapter)
    saved = dataclasses.replace(FACTS, base_saved_bytes=123_456_789)
    stored = tables.storage(Comparison(facts=saved, runs=every))
    assert (stored[0].full, stored[0].adapters) == (model, 123_456_789 + adapter)
    assert tables.rate_ratio(tables.rows(Comparison(facts=FACTS, runs=every))) == pytest.approx(10)


def costing(arm, **costs):
    """Returns three runs with such costs, whose qualities are tied."""
    losses = (1.01, 1.03, 1.02) if arm.rank else (1.0, 1.02, 1.03)
    return tuple(run(arm, seed, loss, **costs) for seed, loss in enumerate(losses))


def spread_of_steps(median):
    """Returns a step's median time with its quartiles, a tenth around it."""
    lows = {"step_seconds_low": 0.9 * median, "step_seconds_high": 1.1 * median}
    return {"step_seconds": median, **lows}


def test_the_headline_names_costs_on_both_sides():
    """LoRA forgets nine times as much, and its steps are not told apart from those in full."""
    adapter = costing(
        lora(), compiled_bytes=10**9, forgetting=Forgetting(2.0, 2.9), **spread_of_steps(0.0059)
    )
    whole = costing(
        full(), compiled_bytes=3 * 10**9, forgetting=Forgetting(2.0, 2.1), **spread_of_steps(0.006)
    )
    found = compared(adapter, whole)
    assert found.verdict == "lora"
    assert found.headline.endswith("LoRA is ahead in memory and files and behind in forgetting.")
    said = " ".join(found.reasons)
    assert "Time of a step: 5.9 ms with LoRA, 6.0 ms in full; they are about equal." in said
    slower = costing(full(), compiled_bytes=3 * 10**9, **spread_of_steps(0.009))
    assert "full takes 1.5 times as much" in " ".join(compared(adapter, slower).reasons)


@pytest.mark.parametrize(
    ("memory", "time", "verdict"),
    [
        (0.5, 0.5, "lora"),
        (0.5, 1.0, "lora"),
        (1.0, 0.5, "lora"),
        (0.5, 2.0, "undecided"),
        (2.0, 0.5, "undecided"),
        (1.0, 1.0, "undecided"),
    ],
)
def test_memory_and_time_decide_within_the_spread(memory, time, verdict):
    """Files and forgetting, which speak for LoRA here, do not decide."""
    of_adapter = {"compiled_bytes": int(memory * 10**9), **spread_of_steps(time)}
    of_full = {"compiled_bytes": 10**9, **spread_of_steps(1.0)}
    assert compared(costing(lora(), **of_adapter), costing(full(), **of_full)).verdict == verdict


def test_a_seed_that_diverged_keeps_an_arm_from_being_the_best():
    every = (*runs(lora(), 0.5, float("nan")), *runs(lora(32), 1.0, 1.1), *runs(full(), 1.2, 1.3))
    top = tables.best(tables.rows(Comparison(facts=FACTS, runs=every)))
    assert top.arm == lora(32)
    assert (top.quality.mean, top.quality.low, top.quality.high) == pytest.approx((1.05, 1.0, 1.1))
    assert top.quality.deviation == pytest.approx(0.005**0.5)
