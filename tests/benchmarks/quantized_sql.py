"""Compares QLoRA with LoRA on the SQL task: same seeds, same questions, paired.

    python -m tests.benchmarks.quantized_sql --output out/qlora

Trains `train.sft`'s default task for each seed over the base as it is and over a base in codes,
asks every adapter the same questions, and prints the accuracies and the mean paired difference with
its 95 % interval, over questions and over seeds. A run or answers that are there already are kept,
so that the command may be interrupted and given again. Two idle cores need about five minutes for
each of the six runs.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from lora_jax.training.processes import write_json
from train.adapters.source import find_adapter, prepare_to_run
from train.environments.sql.examples import score
from train.run.pretrained import read_model, read_model_info
from train.run.task import EvaluatedModel
from train.sft import main as sft
from train.tasks.sql_scores import answer, draw_questions

ANSWERS = "answers.json"
Outcome = list[int]  # of each question, 1 where the answer is right


def outcomes(folder: Path, codes: str, seed: int, questions: int, steps: int | None) -> Outcome:
    """Trains an adapter and asks it; what an earlier call did is read."""
    name = folder / f"{codes}-{seed}"
    kept = name / ANSWERS
    if kept.exists():
        saved = json.loads(kept.read_text())
        if len(saved) == 2 * questions:
            return saved
    if not (name / "report.json").exists():
        options = ["--quantize", codes, "--seed", str(seed), "--eval-questions", "0"]
        options += [] if steps is None else ["--steps", str(steps)]
        resume = ["--resume"] if (name / "config.yaml").exists() else []
        sft(["--output", str(name), *options, *resume, "--report-to", "none"])
    drawn = draw_questions(questions)
    found = find_adapter(str(name))
    outline = read_model_info(found.base()).quantized(found.quantize)
    model, params = read_model(outline.name, dtype="float32", **outline.head)
    forward, params = prepare_to_run(model, found.load(model, params, outline.name))
    answers = answer(EvaluatedModel(model, params, forward), outline, drawn)
    right = [
        int(score(example, given))
        for kind, examples in drawn.items()
        for example, given in zip(examples, answers[kind], strict=True)
    ]
    write_json(kept, right)
    return right


def interval(values: list[float]) -> tuple[float, float]:
    """Returns the mean and half the width of its 95 % interval, by Student's t for few values."""
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 1.96)
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def report(of: dict[str, dict[int, Outcome]], codes: str) -> dict[str, Any]:
    """Prints the comparison, and returns its figures, in points."""
    seeds = list(of["none"])
    for name, runs in of.items():
        shares = ", ".join(f"{100 * statistics.mean(right):.1f}" for right in runs.values())
        print(f"{name:>12}: {shares} % right, of seeds {', '.join(map(str, seeds))}")
    paired = [
        [100.0 * (q - f) for q, f in zip(of[codes][seed], of["none"][seed], strict=True)]
        for seed in seeds
    ]
    by_question = [statistics.mean(one) for one in zip(*paired, strict=True)]
    by_seed = [statistics.mean(one) for one in paired]
    figures = {"questions": interval(by_question), "seeds": interval(by_seed)}
    for name, (mean, half) in figures.items():
        print(f"{codes} - none, over {name}: {mean:+.1f} ± {half:.1f} points")
    return figures


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="the folder of the runs")
    add("--codes", default="nf4", help="the codes to compare with: nf4, int8, …")
    add("--seeds", type=int, default=3, help="the number of seeds")
    add("--questions", type=int, default=250, help="of each of the two kinds")
    add("--steps", type=int, help="steps of each run; by default the task's")
    asked = parser.parse_args()
    of = {
        name: {
            seed: outcomes(asked.output, name, seed, asked.questions, asked.steps)
            for seed in range(asked.seeds)
        }
        for name in ("none", asked.codes)
    }
    report(of, asked.codes)


if __name__ == "__main__":
    main()
