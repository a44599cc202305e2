"""The report of a comparison: report.md and report.html, with its pictures beside them."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_jax.training.processes import write_text
from train.compare.intruders import ALIKE, FIRST
from train.compare.reporting import dimension, tables, words
from train.compare.reporting.document import (
    Block,
    Code,
    Gallery,
    Grid,
    Heading,
    Lines,
    Paragraph,
    markdown,
    page,
)
from train.compare.reporting.pictures import Picture, draw
from train.compare.reporting.recommend import RULE, UNSEEN, Recommendation, recommend
from train.compare.reporting.tables import ArmRow, Figures, Spread
from train.compare.result import Arm, Comparison, ComparisonFacts, Ratio

MARKDOWN, HTML = "report.md", "report.html"
PICTURES = "pictures"  # the folder of the PNGs
_SPREAD = ("Mean", "Deviation", "Lowest", "Highest", "Seeds")
_ERROR = "Standard error"
_ENDINGS = {"failed": "failed", "stopped early": "stopped early", "waiting": "not run yet"}
_OF_MEMORY = (
    "The memory of the step is what its compiled program needs: weights, optimiser state, "
    "gradients and activations. The peak of its process is what the operating system saw while "
    "the step ran alone, Python, the compiler and the reading of the model included."
)
_OF_ONE_SEED = (
    "Memory and time of a step are those of one seed of the best arm of each method, which was run "
    "again alone. The time of a run is a mean over seeds."
)


def write_report(comparison: Comparison, folder: Path) -> Recommendation:
    """Writes report.md and report.html into a folder, and the PNGs into a folder in it.

    Args:
      comparison: the measurements.
      folder: exists.

    Returns:
      What the report recommends.
    """
    (folder / PICTURES).mkdir(exist_ok=True)
    pictures = [
        each._replace(file=f"{PICTURES}/{each.file}")
        for each in draw(comparison, folder / PICTURES)
    ]
    recommendation = recommend(comparison)
    blocks = report_of(comparison, recommendation, pictures)
    write_text(folder / MARKDOWN, markdown(blocks))
    title = f"LoRA or full fine-tuning: {comparison.facts.model}"
    write_text(folder / HTML, page(title, blocks, folder))
    return recommendation


def report_of(
    comparison: Comparison, recommendation: Recommendation, pictures: Sequence[Picture]
) -> list[Block]:
    """Returns the report: what to use and why, then all that was measured."""
    figures = Figures(comparison)
    blocks: list[Block] = [
        Heading("LoRA or full fine-tuning?", 1),
        Paragraph(_task(comparison.facts), "note"),
        *_recommended(recommendation),
        *_quality(figures, recommendation),
    ]
    if pictures:
        blocks += [Heading("Pictures"), Gallery(pictures)]
    for section in _SECTIONS:
        blocks += section(figures)
    return blocks


def _task(facts: ComparisonFacts) -> str:
    """Returns a sentence about model and data, and the scores without training."""
    weights = "" if facts.weights is None else f" ({facts.weights})"
    text = f"{facts.model}{weights}, trained on {facts.dataset} for {facts.steps} steps."
    if not facts.baselines:
        return text
    baselines = (f"{words.figure(value)} by {name}" for name, value in facts.baselines.items())
    return f"{text} Without training, {facts.score} is {', '.join(baselines)}."


def _recommended(recommendation: Recommendation) -> list[Block]:
    blocks: list[Block] = [
        Paragraph(recommendation.headline, "verdict"),
        Lines(recommendation.reasons),
    ]
    if recommendation.undecided:
        blocks += [Heading("What would decide it", 3), Lines(recommendation.undecided)]
    if recommendation.command:
        blocks += [Paragraph("All of it, ready to paste:"), Code(recommendation.command)]
    return [
        *blocks,
        Heading("What these measurements cannot see", 3),
        Lines(UNSEEN),
        Paragraph(f"The rule. {RULE}", "note"),
    ]


def _table(
    heading: Heading, header: Sequence[str], body: Sequence[Sequence[str]], text: str = ""
) -> list[Block]:
    """Returns a heading, a sentence if there is one, and a table; nothing without rows."""
    if not body:
        return []
    return [heading, *([Paragraph(text)] if text else []), Grid(header, body)]


def _quality(figures: Figures, recommendation: Recommendation) -> list[Block]:
    measure, rows = figures.measure, figures.rows
    losses = [row.spread_of("held_out_loss") for row in rows]
    loss = measure.kind == "score" and any(losses)
    errors = [row.mean("score_error") for row in rows]
    error = measure.kind == "score" and any(x is not None for x in errors)
    header = ["Arm", *_SPREAD, *[_ERROR] * error, *["Held-out loss"] * loss]
    header += ["Trained parameters", "Other runs"]
    body = []
    for row, of_loss, of_rows in zip(rows, losses, errors, strict=True):
        cells = [figures.label(row.arm), *_spread(row.quality), *[words.rough(of_rows)] * error]
        cells += [_mean(of_loss)] * loss
        body.append([*cells, words.count(row.trained_parameters), _others(row)])
    is_undecided = recommendation.verdict == "undecided"
    outstanding = rows[0].arm if is_undecided and rows and rows[0].quality else recommendation.arm
    marked = next((i for i, row in enumerate(rows) if row.arm == outstanding), None)
    better = "larger" if measure.larger else "smaller"
    marking = "" if marked is None else " The row that stands out is the one recommended above."
    if marked is not None and is_undecided:
        marking = " The row that stands out is ahead so far: its mean is the best."
    blocks: list[Block] = [
        Heading("Quality"),
        Paragraph(
            f"{words.capital(measure.name)} over seeds, {better} is better; the "
            f"best arm comes first. Runs that did not end do not count.{marking}"
            + f" {_ERROR}: of a run's mean over the held-out rows."
            * error
        ),
        Grid(header, body, marked),
    ]
    return [*blocks, *_best(figures), *_rates(figures)]


def _best(figures: Figures) -> list[Block]:
    body = []
    groups: tuple[tuple[str, Callable[[Arm], str | None]], ...] = (
        ("method", lambda arm: words.method(arm.method)),
        ("rank", lambda arm: f"r={arm.rank}" if arm.rank else None),
        ("dimension", lambda arm: f"d={arm.dimension:,}" if arm.dimension else None),
        ("targets", lambda arm: " ".join(arm.targets) if arm.targets else None),
    )
    for what, key in groups:
        among = [row for row in figures.rows if key(row.arm) is not None]
        if len({key(row.arm) for row in among}) > 1:
            body += [
                [f"{what}: {key(row.arm)}", figures.label(row.arm), _mean(row.quality)]
                for row in tables.best_of_each(among, key)
            ]
    heading = Heading("The best of each method, rank and targets", 3)
    return _table(heading, ["Of each", "Best arm", figures.measure.name], body)


def _rates(figures: Figures) -> list[Block]:
    body = []
    for group in tables.rates(figures.rows):
        cells = [figures.adapter(group.tried[0].arm)]
        for at in (group.best - 1, group.best, group.best + 1):
            if not 0 <= at < len(group.tried):
                cells.append("not tried")
                continue
            row = group.tried[at]
            value = _mean(row.quality) if row.quality else row.runs[0].status
            cells.append(f"{row.arm.learning_rate:g}: {value}")
        body.append(cells)
    heading = Heading("Learning rates", 3)
    blocks = _table(heading, ["", "Next smaller", "Best", "Next larger"], body)
    if blocks and (ratio := tables.rate_ratio(figures.rows)) is not None:
        blocks.append(
            Paragraph(f"The best adapter's rate is {words.times(ratio)} full fine-tuning's.")
        )
    return blocks


def _dimensions(figures: Figures) -> list[Block]:
    measured = dimension.dimensions(figures.comparison)
    sentences = [dimension.sentence(each, figures.measure.name) for each in measured]
    return [Heading("Intrinsic dimension"), Lines(sentences)] if sentences else []


def _costs(figures: Figures) -> list[Block]:
    header = ["Arm", "Trained parameters", "Files of a task", "Memory of the step"]
    header += ["Peak of its process", "Time of a step", "Time of a run"]
    body = [
        [
            figures.label(row.arm),
            words.count(row.trained_parameters),
            *(words.size(row.mean(f"{name}_bytes")) for name in ("saved", "compiled", "peak")),
            *(words.seconds(row.mean(name)) for name in ("step_seconds", "seconds")),
        ]
        for row in figures.series
    ]
    if not body:
        return []
    blocks: list[Block] = [Heading("Costs"), Grid(header, body), Paragraph(_OF_MEMORY, "note")]
    if any(row.mean("step_seconds") for row in figures.series):
        blocks.append(Paragraph(_OF_ONE_SEED, "note"))
    together = max(run.side_by_side for row in figures.series for run in row.runs)
    if together > 1:
        share = f"Up to {together} runs shared their steps; the time of such a run is its even "
        blocks.append(Paragraph(f"{share}share of theirs.", "note"))
    return [*blocks, *_planned(figures)]


def _planned(figures: Figures) -> list[Block]:
    header = ["Arm", "Memory of a device", "Time of a step", "Device hours", "Cost"]
    body = [
        [
            figures.label(plan.arm),
            words.size(plan.bytes_per_device),
            words.seconds(plan.step_seconds),
            words.rough(plan.device_hours),
            words.rough(plan.cost),
        ]
        for plan in figures.comparison.planned
    ]
    on = figures.comparison.facts.planned_on or "another machine"
    return _table(Heading(f"Computed, not measured: {on}", 3), header, body)


def _rungs(figures: Figures) -> list[Block]:
    facts = figures.comparison.facts
    body = [
        [figures.label(arm), f"{rung.share:.1%}", words.figure(value), went]
        for rung in figures.comparison.rungs
        for went, arms in (("goes on", rung.kept), ("stopped", rung.stopped))
        for arm, value in arms
    ]
    header = ["Arm", "After", words.capital(tables.decided_by(facts)), "Decision"]
    rule = f"The rule: {facts.rule}." if facts.rule else ""
    return _table(Heading("Early stopping"), header, body, rule)


def _latencies(figures: Figures) -> list[Block]:
    body = [
        [
            figures.label(latency.arm),
            latency.what,
            *map(words.seconds, (latency.base, latency.merged, latency.live)),
            _ratio(latency.merged / latency.base if latency.base else None, latency.merged_ratio),
            _ratio(latency.live / latency.base if latency.base else None, latency.live_ratio),
        ]
        for latency in figures.comparison.latencies
    ]
    header = ["Arm", "What", "Base alone", "Merged", "Beside the base"]
    header += ["Merged ÷ base", "Beside ÷ base"]
    text = (
        "Medians of rounds in which the three took turns. Of a ratio, the smallest and the largest "
        "of a round stand behind it. Where they lie on both sides of 1, the two times are not told "
        "apart."
    )
    return _table(Heading("Latency of inference"), header, body, text)


def _ratio(value: float | None, rounds: Ratio | None) -> str:
    """Returns a ratio of times in words, with its spread over the rounds where that is known."""
    if rounds is None:
        return words.rough(value)
    spread = f"{words.figure(rounds.low)} to {words.figure(rounds.high)}"
    if rounds.is_told_apart:
        return f"{words.figure(rounds.median)} ({spread})"
    return f"not told apart ({spread})"


def _storage(figures: Figures) -> list[Block]:
    body = [
        [f"{tasks:,}", words.size(full), words.size(adapters), words.rough(full / adapters)]
        for tasks, full, adapters in tables.storage(figures.comparison)
    ]
    header = ["Tasks", "Full models", "One base and adapters", "Full ÷ adapters"]
    text = "Files of one form: the base is saved as a full model is, with an adapter for each task."
    return _table(Heading("Storage"), header, body, text)


def _forgetting(figures: Figures) -> list[Block]:
    outside = figures.comparison.facts.outside or "text outside the task"
    text = f"How much the loss (nats a token) on {outside} rose in training; smaller is better."
    return _seeds_table(figures, "forgotten", "Forgetting", text)


def _divergence(figures: Figures) -> list[Block]:
    prompts = figures.comparison.facts.diverging_on or "the held-out prompts"
    text = (
        "How far a run has moved from the base: KL(base ‖ run) of the next token, over the whole "
        f"vocabulary, on the base's completions of {prompts} (nats a token)."
    )
    return _seeds_table(figures, "divergence", "Divergence from the base", text)


def _intruders(figures: Figures) -> list[Block]:
    text = (
        f"Of the {FIRST} strongest singular vectors of a trained matrix, those that have a cosine "
        f"below {ALIKE:g} with each of the base's (Shuttleworth et al., arXiv 2410.21228); a mean "
        "over matrices of all layers."
    )
    return _seeds_table(figures, "intruders", "Intruder dimensions", text)


def _seeds_table(figures: Figures, field: str, heading: str, text: str) -> list[Block]:
    """Returns a table of a field of `RunResult`, with a row for each arm that has it."""
    measured = ((row.arm, row.spread_of(field)) for row in figures.rows)
    body = [[figures.label(arm), *_spread(spread)] for arm, spread in measured if spread]
    return _table(Heading(heading), ["Arm", *_SPREAD], body, text)


def _failed(figures: Figures) -> list[Block]:
    failed = [run for run in figures.comparison.runs if run.status == "failed"]
    blocks: list[Block] = [Heading("Failed runs")] if failed else []
    for run in failed:
        blocks.append(Paragraph(f"{run.name}, after {run.steps} steps:"))
        blocks.append(Code(run.error or "no error was recorded"))
    return blocks


def _facts(figures: Figures) -> list[Block]:
    facts = figures.comparison.facts
    lines = {
        "Model": facts.model if facts.weights is None else f"{facts.model}: {facts.weights}",
        "Data": facts.dataset,
        "Script": facts.script,
        "Steps of a run": f"{facts.steps:,}",
        "Base in memory": words.size(facts.base_bytes),
        "Machine": facts.machine,
        "Date": facts.date,
        "Versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
    }
    facts_shown = [f"{name}: {value}" for name, value in lines.items()]
    return [Heading("Facts"), Code(facts.command), Lines(facts_shown)]


_SECTIONS = (
    *(_dimensions, _costs, _rungs, _latencies, _storage, _forgetting, _divergence, _intruders),
    *(_failed, _facts),
)


def _others(row: ArmRow) -> str:
    """Returns the number of a row's runs without a value, by how they ended."""
    counts: Counter[str] = Counter(run.status for run in row.runs)
    endings = [f"{counts[status]} {name}" for status, name in _ENDINGS.items() if counts[status]]
    if n := counts["done"] - (row.quality.n if row.quality else 0):
        endings.append(f"{n} without a finite value")
    return ", ".join(endings) or words.NOTHING


def _spread(values: Spread | None) -> list[str]:
    """Returns the cells of `_SPREAD`."""
    if values is None:
        return [*[words.NOTHING] * 4, "0"]
    mean, low, high = (
        words.beside(value, values.deviation) for value in (values.mean, values.low, values.high)
    )
    return [mean, words.rough(values.deviation), low, high, f"{values.n}"]


def _mean(values: Spread | None) -> str:
    return words.NOTHING if values is None else words.beside(values.mean, values.deviation)
