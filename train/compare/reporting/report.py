"""The report of a comparison: report.md and report.html, with its pictures beside them."""

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
    Text,
    Verdict,
    markdown,
    page,
)
from train.compare.reporting.pictures import Picture, draw
from train.compare.reporting.recommend import RULE, Recommendation, recommend
from train.compare.reporting.tables import ArmRow, Spread
from train.compare.result import Arm, Comparison, Facts

MARKDOWN, HTML = "report.md", "report.html"
PICTURES = "pictures"  # the folder of the PNGs
_SPREAD = ("Mean", "Deviation", "Lowest", "Highest")  # over seeds
_ENDINGS = {"failed": "failed", "stopped early": "stopped early", "waiting": "not run yet"}


_OF_MEMORY = (
    "The memory of the step is what its compiled program needs: weights, optimiser state, "
    "gradients and activations. The peak of its process is what the operating system saw while "
    "the step ran alone, Python, the compiler and the reading of the model included."
)


class _Figures:
    """The figures of a comparison that several sections show."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.measure = tables.measure_of(comparison)
        self.rows = tables.rows(comparison)
        self.series = tables.series(self.rows, self.measure)
        self._arms = [row.arm for row in self.rows]

    def label(self, arm: Arm) -> str:
        """Names an arm as far as it differs from others."""
        return words.label(arm, self._arms)

    def adapter(self, arm: Arm) -> str:
        """Names an arm without its learning rate."""
        return words.adapter(arm, self._arms)


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
        one._replace(file=f"{PICTURES}/{one.file}") for one in draw(comparison, folder / PICTURES)
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
    figures = _Figures(comparison)
    facts = comparison.facts
    blocks: list[Block] = [
        Heading("LoRA or full fine-tuning?", 1),
        Text(_task(facts), is_note=True),
        *_recommended(recommendation, figures),
        *_quality(figures, recommendation),
    ]
    if pictures:
        blocks += [Heading("Pictures"), Gallery(pictures)]
    for section in _SECTIONS:
        blocks += section(figures)
    return blocks


def _task(facts: Facts) -> str:
    """Returns what was trained on what, and what reaches how much without training."""
    text = f"{facts.model}, trained on {facts.dataset} for {facts.steps} steps."
    if not facts.baselines:
        return text
    said = (f"{words.figure(value)} by {name}" for name, value in facts.baselines.items())
    return f"{text} Without training, {facts.score} is {', '.join(said)}."


def _recommended(recommendation: Recommendation, figures: _Figures) -> list[Block]:
    blocks: list[Block] = [Verdict(recommendation.headline), Lines(recommendation.reasons)]
    if recommendation.undecided:
        blocks += [Heading("What would decide it", 3), Lines(recommendation.undecided)]
    if recommendation.command:
        blocks += [Text("All of it, ready to paste:"), Code(recommendation.command)]
    return [
        *blocks,
        Heading("What these measurements cannot see", 3),
        Lines(recommendation.unseen),
        Text(f"The rule. {RULE}", is_note=True),
    ]


def _quality(figures: _Figures, recommendation: Recommendation) -> list[Block]:
    measure, rows = figures.measure, figures.rows
    loss = measure.kind == "score" and any(row.held_out_loss for row in rows)
    header = ["Arm", *_SPREAD, "Seeds"]
    header += ["Held-out loss"] * loss
    header += ["Trained parameters", "Other runs"]
    body = []
    for row in rows:
        seeds = f"{row.quality.n if row.quality else 0}"
        cells = [figures.label(row.arm), *_spread(row.quality), seeds]
        of_loss = row.held_out_loss
        cells += [words.beside(of_loss and of_loss.mean, of_loss and of_loss.deviation)] * loss
        body.append([*cells, words.count(row.trained_parameters), _others(row)])
    marked = next((i for i, row in enumerate(rows) if row.arm == recommendation.arm), None)
    better = "larger" if measure.larger else "smaller"
    said = "" if marked is None else " The row that stands out is the one recommended above."
    if marked is not None and recommendation.verdict == "undecided":
        said = " The row that stands out is ahead so far."
    blocks: list[Block] = [
        Heading("Quality"),
        Text(
            f"{words.capital(measure.name)} over seeds, {better} is better; the "
            f"best arm comes first. Runs that did not end do not count.{said}"
        ),
        Grid(header, body, marked),
    ]
    return [*blocks, *_best(figures), *_rates(figures)]


def _best(figures: _Figures) -> list[Block]:
    body = []
    groups: tuple[tuple[str, Callable[[Arm], str | None]], ...] = (
        ("method", lambda arm: words.method(arm.method)),
        ("rank", lambda arm: f"r={arm.rank}" if arm.rank else None),
        ("dimension", lambda arm: f"d={arm.dimension:,}" if arm.dimension else None),
        ("targets", lambda arm: " ".join(arm.targets) if arm.targets else None),
    )
    for what, key in groups:
        among = [row for row in figures.rows if key(row.arm) is not None]
        if len({key(row.arm) for row in among}) < 2:
            continue
        for row in tables.best_of_each(among, key, figures.measure):
            name = f"{what}: {key(row.arm)}"
            quality = row.quality
            mean = words.beside(quality and quality.mean, quality and quality.deviation)
            body.append([name, figures.label(row.arm), mean])
    if not body:
        return []
    header = ["Of each", "Best arm", figures.measure.name]
    return [Heading("The best of each method, rank and targets", 3), Grid(header, body)]


def _rates(figures: _Figures) -> list[Block]:
    body = []
    for found in tables.rates(figures.rows, figures.measure):
        cells = [figures.adapter(found.tried[0].arm)]
        for at in (found.best - 1, found.best, found.best + 1):
            if not 0 <= at < len(found.tried):
                cells.append("not tried")
                continue
            row = found.tried[at]
            value: str = row.runs[0].status
            if row.quality:
                value = words.beside(row.quality.mean, row.quality.deviation)
            cells.append(f"{row.arm.learning_rate:g}: {value}")
        body.append(cells)
    if not body:
        return []
    blocks: list[Block] = [
        Heading("Learning rates", 3),
        Grid(["", "Next smaller", "Best", "Next larger"], body),
    ]
    ratio = tables.rate_ratio(figures.rows, figures.measure)
    if ratio is not None:
        blocks.append(Text(f"The best adapter's rate is {words.times(ratio)} full fine-tuning's."))
    return blocks


def _dimensions(figures: _Figures) -> list[Block]:
    found = dimension.dimensions(figures.comparison)
    if not found:
        return []
    said = [dimension.sentence(one, figures.measure.name) for one in found]
    return [Heading("Intrinsic dimension"), Lines(said)]


def _costs(figures: _Figures) -> list[Block]:
    header = ["Arm", "Trained parameters", "Files of a task", "Memory of the step"]
    header += ["Peak of its process", "Time of a step", "Time of a run"]
    body = [
        [
            figures.label(row.arm),
            words.count(row.trained_parameters),
            words.size(row.saved_bytes),
            words.size(row.compiled_bytes),
            words.size(row.peak_bytes),
            words.seconds(row.step_seconds),
            words.seconds(row.seconds),
        ]
        for row in figures.series
    ]
    if not body:
        return []
    blocks: list[Block] = [Heading("Costs"), Grid(header, body), Text(_OF_MEMORY, is_note=True)]
    together = max(run.side_by_side for row in figures.series for run in row.runs)
    if together > 1:
        share = f"Up to {together} runs shared their steps; the time of such a run is its even "
        blocks.append(Text(f"{share}share of theirs.", is_note=True))
    return [*blocks, *_planned(figures)]


def _planned(figures: _Figures) -> list[Block]:
    planned = figures.comparison.planned
    if not planned:
        return []
    header = ["Arm", "Memory of a device", "Time of a step", "Device hours", "Cost"]
    body = [
        [
            figures.label(one.arm),
            words.size(one.bytes_per_device),
            words.seconds(one.step_seconds),
            words.rough(one.device_hours),
            words.rough(one.cost),
        ]
        for one in planned
    ]
    on = figures.comparison.facts.planned_on or "another machine"
    return [Heading(f"Computed, not measured: {on}", 3), Grid(header, body)]


def _rungs(figures: _Figures) -> list[Block]:
    rungs, rule = figures.comparison.rungs, figures.comparison.facts.rule
    if not rungs:
        return []
    body = []
    for rung in rungs:
        for went, arms in (("goes on", rung.kept), ("stopped", rung.stopped)):
            body += [
                [figures.label(arm), f"{rung.share:.1%}", words.figure(loss), went]
                for arm, loss in arms
            ]
    header = ["Arm", "After", f"Held-out {figures.comparison.facts.loss}", "Decision"]
    stopped: list[Block] = [Text(f"The rule: {rule}.")] if rule else []
    return [Heading("Early stopping"), *stopped, Grid(header, body)]


def _latencies(figures: _Figures) -> list[Block]:
    if not figures.comparison.latencies:
        return []
    body = [
        [
            figures.label(one.arm),
            one.what,
            *map(words.seconds, (one.base, one.merged, one.live)),
            words.rough(one.live / one.base if one.base else None),
        ]
        for one in figures.comparison.latencies
    ]
    header = ["Arm", "What", "Base alone", "Merged", "Beside the base", "Beside ÷ base"]
    return [Heading("Latency of inference"), Grid(header, body)]


def _storage(figures: _Figures) -> list[Block]:
    stored = tables.storage(figures.comparison)
    if not stored:
        return []
    body = [
        [f"{one.tasks:,}", words.size(one.full), words.size(one.adapters)]
        + [words.rough(one.full / one.adapters)]
        for one in stored
    ]
    header = ["Tasks", "Full models", "One base and adapters", "Full ÷ adapters"]
    return [Heading("Storage"), Grid(header, body)]


def _forgetting(figures: _Figures) -> list[Block]:
    measured = [(row, row.forgetting) for row in figures.rows if row.forgetting]
    if not measured:
        return []
    outside = figures.comparison.facts.outside or "text outside the task"
    body = [[figures.label(row.arm), *_spread(found), f"{found.n}"] for row, found in measured]
    header = ["Arm", *_SPREAD, "Seeds"]
    text = f"How much the loss (nats a token) on {outside} rose in training; smaller is better."
    return [Heading("Forgetting"), Text(text), Grid(header, body)]


def _intruders(figures: _Figures) -> list[Block]:
    counted = [(row, row.intruders) for row in figures.rows if row.intruders]
    if not counted:
        return []
    body = [[figures.label(row.arm), *_spread(found), f"{found.n}"] for row, found in counted]
    text = (
        f"Of the {FIRST} strongest singular vectors of a trained matrix, those that have a cosine "
        f"below {ALIKE:g} with each of the base's (Shuttleworth et al., arXiv 2410.21228); a mean "
        "over matrices of all layers."
    )
    header = ["Arm", *_SPREAD, "Seeds"]
    return [Heading("Intruder dimensions"), Text(text), Grid(header, body)]


def _failed(figures: _Figures) -> list[Block]:
    failed = [run for run in figures.comparison.runs if run.status == "failed"]
    blocks: list[Block] = [Heading("Failed runs")] if failed else []
    for run in failed:
        blocks.append(Text(f"{run.name}, after {run.steps} steps:"))
        blocks.append(Code(run.error or "no error was recorded"))
    return blocks


def _facts(figures: _Figures) -> list[Block]:
    facts = figures.comparison.facts
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    body = [
        ["Model", facts.model],
        ["Data", facts.dataset],
        ["Script", facts.script],
        ["Steps of a run", f"{facts.steps:,}"],
        ["Base in memory", words.size(facts.base_bytes)],
        ["Machine", facts.machine],
        ["Date", facts.date],
        ["Versions", versions],
    ]
    lines = [f"{name}: {value}" for name, value in body]
    return [Heading("Facts"), Code(facts.command), Lines(lines)]


_SECTIONS = (
    _dimensions,
    _costs,
    _rungs,
    _latencies,
    _storage,
    _forgetting,
    _intruders,
    _failed,
    _facts,
)


def _others(row: ArmRow) -> str:
    """Returns how the runs of a row ended that have no value."""
    said = []
    for status, name in _ENDINGS.items():
        if n := sum(run.status == status for run in row.runs):
            said.append(f"{n} {name}")
    done = sum(run.status == "done" for run in row.runs)
    if n := done - (row.quality.n if row.quality else 0):
        said.append(f"{n} without a finite value")
    return ", ".join(said) or words.NOTHING


def _spread(values: Spread | None) -> list[str]:
    if values is None:
        return [words.NOTHING] * 4
    mean, low, high = (
        words.beside(one, values.deviation) for one in (values.mean, values.low, values.high)
    )
    return [mean, words.rough(values.deviation), low, high]
