"""The report of a comparison: report.md and report.html, with its pictures beside them."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_jax.training.processes import write_text
from train.compare.intruders import MIN_COSINE, N_LEADING_VECTORS
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
_MEMORY_NOTE = (
    "The memory of the step is what its compiled program needs: weights, optimiser state, "
    "gradients and activations. The peak of its process is what the operating system saw while "
    "the step ran alone, Python, the compiler and the reading of the model included."
)
_ONE_SEED_NOTE = (
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
        picture._replace(file=f"{PICTURES}/{picture.file}")
        for picture in draw(comparison, folder / PICTURES)
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
    """Returns the report: the recommendation and its reasons, and then all measurements."""
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
    """Returns the verdict with its reasons and its rule, and how to decide an open question."""
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
    """Returns the table of the arms' quality, and what follows from it."""
    measure = figures.measure
    is_score = measure.kind == "score"
    losses = [row.spread_of("held_out_loss") for row in figures.rows]
    shows_losses = is_score and any(losses)
    errors = [row.mean("score_error") for row in figures.rows]
    shows_errors = is_score and any(error is not None for error in errors)
    header = ["Arm", *_SPREAD]
    if shows_errors:
        header.append(_ERROR)
    if shows_losses:
        header.append("Held-out loss")
    header += ["Trained parameters", "Other runs"]
    body: list[list[str]] = []
    for row, loss, error in zip(figures.rows, losses, errors, strict=True):
        cells = [figures.label(row.arm), *_spread(row.quality)]
        if shows_errors:
            cells.append(words.rough(error))
        if shows_losses:
            cells.append(_mean(loss))
        cells += [words.count(row.trained_parameters), _other_runs(row)]
        body.append(cells)
    better = "larger" if measure.larger else "smaller"
    marked_row, marking = _marked_row(figures, recommendation)
    text = (
        f"{words.capital(measure.name)} over seeds, {better} is better; the "
        f"best arm comes first. Runs that did not end do not count.{marking}"
    )
    if shows_errors:
        text += f" {_ERROR}: of a run's mean over the held-out rows."
    blocks: list[Block] = [Heading("Quality"), Paragraph(text), Grid(header, body, marked_row)]
    return [*blocks, *_best(figures), *_rates(figures)]


def _marked_row(figures: Figures, recommendation: Recommendation) -> tuple[int | None, str]:
    """Returns the index of the marked row (or None), and a sentence that explains the mark."""
    is_undecided = recommendation.verdict == "undecided"
    rows = figures.rows
    marked_arm = recommendation.arm
    if is_undecided and rows and rows[0].quality:
        marked_arm = rows[0].arm
    if marked_arm not in figures.arms:
        return None, ""
    sentence = " The row that stands out is the one recommended above."
    if is_undecided:
        sentence = " The row that stands out is ahead so far: its mean is the best."
    return figures.arms.index(marked_arm), sentence


def _best(figures: Figures) -> list[Block]:
    """Returns the table of the best arm of each method, rank, dimension and target."""
    groups: dict[str, Callable[[Arm], str | None]] = {
        "method": lambda arm: words.method(arm.method),
        "rank": lambda arm: f"r={arm.rank}" if arm.rank else None,
        "dimension": lambda arm: f"d={arm.dimension:,}" if arm.dimension else None,
        "targets": lambda arm: " ".join(arm.targets) if arm.targets else None,
    }
    body: list[list[str]] = []
    for group, name_of in groups.items():
        rows = [row for row in figures.rows if name_of(row.arm) is not None]
        names = {name_of(row.arm) for row in rows}
        if len(names) < 2:  # nothing to compare
            continue
        for row in tables.best_of_each(rows, name_of):
            title = f"{group}: {name_of(row.arm)}"
            body.append([title, figures.label(row.arm), _mean(row.quality)])
    heading = Heading("The best of each method, rank and targets", 3)
    return _table(heading, ["Of each", "Best arm", figures.measure.name], body)


def _rates(figures: Figures) -> list[Block]:
    """Returns the table of the best learning rates, beside the next smaller and larger ones."""
    body: list[list[str]] = []
    for rates in tables.rates(figures.rows):
        cells = [figures.adapter(rates.tried[0].arm)]
        for index in (rates.best - 1, rates.best, rates.best + 1):
            if not 0 <= index < len(rates.tried):
                cells.append("not tried")
                continue
            row = rates.tried[index]
            value = _mean(row.quality) if row.quality else row.runs[0].status
            cells.append(f"{row.arm.learning_rate:g}: {value}")
        body.append(cells)
    heading = Heading("Learning rates", 3)
    blocks = _table(heading, ["", "Next smaller", "Best", "Next larger"], body)
    ratio = tables.rate_ratio(figures.rows)
    if blocks and ratio is not None:
        blocks.append(
            Paragraph(f"The best adapter's rate is {words.times(ratio)} full fine-tuning's.")
        )
    return blocks


def _dimensions(figures: Figures) -> list[Block]:
    """Returns the intrinsic dimension by each method, in sentences."""
    sentences = [
        dimension.sentence(measured, figures.measure.name)
        for measured in dimension.dimensions(figures.comparison)
    ]
    return [Heading("Intrinsic dimension"), Lines(sentences)] if sentences else []


def _costs(figures: Figures) -> list[Block]:
    """Returns the table of files, memory and time, with notes on them."""
    header = [
        "Arm",
        "Trained parameters",
        "Files of a task",
        "Memory of the step",
        "Peak of its process",
        "Time of a step",
        "Time of a run",
    ]
    body = [
        [
            figures.label(row.arm),
            words.count(row.trained_parameters),
            words.size(row.mean("saved_bytes")),
            words.size(row.mean("compiled_bytes")),
            words.size(row.mean("peak_bytes")),
            words.seconds(row.mean("step_seconds")),
            words.seconds(row.mean("seconds")),
        ]
        for row in figures.series
    ]
    if not body:
        return []
    blocks: list[Block] = [Heading("Costs"), Grid(header, body), Paragraph(_MEMORY_NOTE, "note")]
    if any(row.mean("step_seconds") for row in figures.series):
        blocks.append(Paragraph(_ONE_SEED_NOTE, "note"))
    n_side_by_side = max(run.side_by_side for row in figures.series for run in row.runs)
    if n_side_by_side > 1:
        text = (
            f"Up to {n_side_by_side} runs shared their steps; the time of such a run is its even "
            "share of theirs."
        )
        blocks.append(Paragraph(text, "note"))
    return [*blocks, *_planned(figures)]


def _planned(figures: Figures) -> list[Block]:
    """Returns the table of the plans for another machine."""
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
    machine = figures.comparison.facts.planned_on or "another machine"
    return _table(Heading(f"Computed, not measured: {machine}", 3), header, body)


def _rungs(figures: Figures) -> list[Block]:
    """Returns the table of the decisions that stopped settings early."""
    facts = figures.comparison.facts
    body: list[list[str]] = []
    for rung in figures.comparison.rungs:
        for decision, arms in (("goes on", rung.kept), ("stopped", rung.stopped)):
            for arm, value in arms:
                cells = [figures.label(arm), f"{rung.share:.1%}", words.figure(value), decision]
                body.append(cells)
    header = ["Arm", "After", words.capital(tables.decided_by(facts)), "Decision"]
    rule = f"The rule: {facts.rule}." if facts.rule else ""
    return _table(Heading("Early stopping"), header, body, rule)


def _latencies(figures: Figures) -> list[Block]:
    """Returns the table of the times of an answer."""
    body: list[list[str]] = []
    for latency in figures.comparison.latencies:
        base = latency.base
        cells = [
            figures.label(latency.arm),
            latency.what,
            words.seconds(base),
            words.seconds(latency.merged),
            words.seconds(latency.live),
            _ratio(latency.merged / base if base else None, latency.merged_ratio),
            _ratio(latency.live / base if base else None, latency.live_ratio),
        ]
        body.append(cells)
    header = [
        "Arm",
        "What",
        "Base alone",
        "Merged",
        "Beside the base",
        "Merged ÷ base",
        "Beside ÷ base",
    ]
    text = (
        "Medians of rounds in which the three took turns. Of a ratio, the smallest and the largest "
        "of a round stand behind it. Where they lie on both sides of 1, the two times are not told "
        "apart."
    )
    return _table(Heading("Latency of inference"), header, body, text)


def _ratio(value: float | None, rounds: Ratio | None) -> str:
    """Returns a ratio of times as text, with its spread over the rounds if that is known."""
    if rounds is None:
        return words.rough(value)
    spread = f"{words.figure(rounds.low)} to {words.figure(rounds.high)}"
    if rounds.is_told_apart:
        return f"{words.figure(rounds.median)} ({spread})"
    return f"not told apart ({spread})"


def _storage(figures: Figures) -> list[Block]:
    """Returns the table of disk space by the number of tasks."""
    body = [
        [f"{tasks:,}", words.size(full), words.size(adapters), words.rough(full / adapters)]
        for tasks, full, adapters in tables.storage(figures.comparison)
    ]
    header = ["Tasks", "Full models", "One base and adapters", "Full ÷ adapters"]
    text = "Files of one form: the base is saved as a full model is, with an adapter for each task."
    return _table(Heading("Storage"), header, body, text)


def _forgetting(figures: Figures) -> list[Block]:
    outside = figures.comparison.facts.outside or "text outside the task"
    text = f"How much the loss (nats per token) on {outside} rose in training; smaller is better."
    return _seeds_table(figures, "forgotten", "Forgetting", text)


def _divergence(figures: Figures) -> list[Block]:
    """Returns the table of divergences from the base, by arm."""
    prompts = figures.comparison.facts.diverging_on or "the held-out prompts"
    text = (
        "How far a run has moved from the base: KL(base ‖ run) of the next token, over the whole "
        f"vocabulary, on the base's completions of {prompts} (nats per token)."
    )
    return _seeds_table(figures, "divergence", "Divergence from the base", text)


def _intruders(figures: Figures) -> list[Block]:
    """Returns the table of intruder dimensions, by arm."""
    text = (
        f"Of the {N_LEADING_VECTORS} strongest singular vectors of a trained matrix, those that "
        f"have a cosine below {MIN_COSINE:g} with each of the base's (Shuttleworth et al., arXiv "
        "2410.21228); a mean over matrices of all layers."
    )
    return _seeds_table(figures, "intruders", "Intruder dimensions", text)


def _seeds_table(figures: Figures, field: str, heading: str, text: str) -> list[Block]:
    """Returns a table of a field of `RunResult`, with a row for each arm that has it."""
    body: list[list[str]] = []
    for row in figures.rows:
        spread = row.spread_of(field)
        if spread:
            body.append([figures.label(row.arm), *_spread(spread)])
    return _table(Heading(heading), ["Arm", *_SPREAD], body, text)


def _failed(figures: Figures) -> list[Block]:
    """Returns the errors of the runs that failed."""
    failed_runs = [run for run in figures.comparison.runs if run.status == "failed"]
    blocks: list[Block] = [Heading("Failed runs")] if failed_runs else []
    for run in failed_runs:
        blocks.append(Paragraph(f"{run.name}, after {run.steps} steps:"))
        blocks.append(Code(run.error or "no error was recorded"))
    return blocks


def _facts(figures: Figures) -> list[Block]:
    """Returns the command, and the facts that all runs share."""
    facts = figures.comparison.facts
    values = {
        "Model": facts.model if facts.weights is None else f"{facts.model}: {facts.weights}",
        "Data": facts.dataset,
        "Script": facts.script,
        "Steps of a run": f"{facts.steps:,}",
        "Base in memory": words.size(facts.base_bytes),
        "Machine": facts.machine,
        "Date": facts.date,
        "Versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
    }
    lines = [f"{name}: {value}" for name, value in values.items()]
    return [Heading("Facts"), Code(facts.command), Lines(lines)]


_SECTIONS = (
    _dimensions,
    _costs,
    _rungs,
    _latencies,
    _storage,
    _forgetting,
    _divergence,
    _intruders,
    _failed,
    _facts,
)


def _other_runs(row: ArmRow) -> str:
    """Returns the number of a row's runs without a value, by how they ended."""
    counts: Counter[str] = Counter(run.status for run in row.runs)
    endings = [f"{counts[status]} {name}" for status, name in _ENDINGS.items() if counts[status]]
    n_finite = row.quality.n if row.quality else 0
    n_not_finite = counts["done"] - n_finite
    if n_not_finite:
        endings.append(f"{n_not_finite} without a finite value")
    return ", ".join(endings) or words.NOTHING


def _spread(spread: Spread | None) -> list[str]:
    """Returns the table cells of a spread: mean, deviation, lowest, highest and number of seeds."""
    if spread is None:
        return [*[words.NOTHING] * 4, "0"]
    return [
        words.beside(spread.mean, spread.deviation),
        words.rough(spread.deviation),
        words.beside(spread.low, spread.deviation),
        words.beside(spread.high, spread.deviation),
        f"{spread.n}",
    ]


def _mean(values: Spread | None) -> str:
    return words.NOTHING if values is None else words.beside(values.mean, values.deviation)
