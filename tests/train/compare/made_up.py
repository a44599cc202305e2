"""A comparison that nobody measured, for tests: its numbers follow from the arms alone."""

import math
from typing import Any

from train.compare.result import (
    Arm,
    Comparison,
    ComparisonFacts,
    Forgetting,
    Latency,
    PlanResult,
    Point,
    Ratio,
    Rung,
    RunResult,
)

FACTS = ComparisonFacts(
    command="python -m train.compare --data <names> --ranks 2 8 32",
    script="train.sft",
    model="made/up-<1B> & co",
    dataset='rows of "made_up.jsonl"',
    steps=200,
    loss="loss (nats per token)",
    score="exact match",
    base_bytes=2_000_000_000,
    machine="1 × made-up accelerator",
    date="2026-01-02T03:04:05+00:00",
    versions={"python": "3.11.9", "jax": "0.10.0"},
    weights="4-bit weights, not the hub's bf16",
    planned_on="8 × TPU v5e at 40 % of the peak, 1.2 USD a device-hour",
    outside="256 rows of other text",
    baselines={"always the same": 0.12},
    rule="after a fifth of the steps, the worst setting is stopped",
)


def lora(rank: int = 8, rate: float = 1e-3, method: str = "lora", on: str = "q_proj") -> Arm:
    """Returns an arm with an adapter."""
    return Arm(method, rank, (on, "v_proj"), 2.0 * rank, rate, 8)


def full(rate: float = 1e-4) -> Arm:
    """Returns an arm of full fine-tuning."""
    return Arm("full", None, None, None, rate, 8)


def run(arm: Arm, seed: int, loss: float, score: float | None = None, **more: Any) -> RunResult:
    """Returns a run that ended with a loss and a score; what it cost follows from its arm."""
    rank = arm.rank or 1500
    rank *= len({*(arm.targets or ())} | {"v_proj"}) if arm.rank else 1
    steps = [20 * i for i in range(1, 11)]
    curve = [loss + 2.0 * math.exp(-step / 45) for step in steps]
    on = (arm.targets or ("all",))[0]
    name = f"{arm.method}-r{arm.rank}-{on}-{arm.learning_rate:g}-seed{seed}"
    of_run: dict[str, Any] = dict(
        name=f"{name}<b>" if arm.method == "dora" else name,
        status="done",
        steps=200,
        losses=tuple(Point(step, value - 0.1) for step, value in zip(steps, curve, strict=True)),
        held_out=tuple(Point(step, value) for step, value in zip(steps, curve, strict=True)),
        held_out_loss=loss,
        score=score,
        trained_parameters=400_000 * rank if arm.rank else 1_000_000_000,
        saved_bytes=1_600_000 * rank if arm.rank else 2_000_000_000,
        compiled_bytes=3_000_000_000 + 6_000_000 * rank,
        peak_bytes=3_500_000_000 + 6_000_000 * rank,
        step_seconds=0.25 + 1e-4 * rank + 0.003 * seed,
        seconds=60.0 + 0.02 * rank,
        forgetting=Forgetting(2.5, 2.5 + 3e-4 * rank + 0.01 * seed),
    )
    return RunResult(arm=arm, seed=seed, **{**of_run, **more})


def runs(arm: Arm, *losses: float, scores: tuple[float, ...] = ()) -> tuple[RunResult, ...]:
    """Returns a run for each loss, with seeds from 0."""
    return tuple(
        run(arm, seed, loss, scores[seed] if scores else None) for seed, loss in enumerate(losses)
    )


def example() -> Comparison:
    """Returns a comparison with all that there can be: failures, rungs, latencies and plans."""
    found: list[RunResult] = []
    arms = [lora(rank, rate) for rank in (2, 8, 32) for rate in (3e-4, 1e-3, 3e-3)]
    arms += [lora(8, 1e-3, on="down_proj"), lora(8, 1e-3, "dora")]
    arms += [full(rate) for rate in (3e-5, 1e-4, 3e-4)]
    for arm in arms:
        best = 1e-4 if arm.rank is None else 1e-3
        loss = 1.1 + 0.15 * math.log10(arm.learning_rate / best) ** 2 + 0.2 / (arm.rank or 16)
        for seed in range(3):
            noise = 0.01 * math.sin(7 * seed + 3 * (arm.rank or 5))
            found.append(run(arm, seed, loss + noise, 0.9 - 0.25 * loss - noise))
    for i in (0, 1):
        found[i] = run(found[i].arm, i, 1.9, status="stopped early", steps=40)
    found[2] = run(
        found[2].arm, 2, 0.0, status="failed", steps=7, held_out_loss=None, held_out=(),
        losses=(Point(1, 3.0), Point(7, math.nan)), forgetting=None, saved_bytes=None,
        error="the loss is not finite after step 7: <nan> & no more",
    )  # fmt: skip
    return Comparison(
        facts=FACTS,
        runs=tuple(found),
        rungs=(
            Rung(
                0.2,
                tuple((arm, 1.4 + 2e-3 * i) for i, arm in enumerate(arms[1:])),
                ((arms[0], 1.9),),
            ),
        ),
        latencies=(
            Latency(
                lora(8),
                0.0101,
                0.0102,
                0.0119,
                "a decoding step of 8 rows",
                merged_ratio=Ratio(1.01, 0.97, 1.04),
                live_ratio=Ratio(1.18, 1.12, 1.31),
            ),
            Latency(full(), 0.0101, 0.0102, 0.0101, "a decoding step of 8 rows"),
        ),
        planned=(
            PlanResult(lora(8), 5_000_000_000, 0.08, 0.036, 0.043),
            PlanResult(full(), 14_000_000_000, None, None, None),
        ),
    )
