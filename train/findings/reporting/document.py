"""Writes the table of a finding as Markdown."""

from collections.abc import Sequence

from train.compare.reporting import dimension, words
from train.compare.reporting.tables import ArmRow
from train.compare.result import Comparison
from train.console import markdown
from train.findings.reporting import decision
from train.findings.reporting.pivot import Block, Pivot, headed, shown

MARKDOWN = "finding.md"
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def document(
    title: str,
    said: str,
    notes: Sequence[str],
    comparison: Comparison,
    pivots: Sequence[Pivot],
    picture: str | None,
) -> str:
    """Returns the Markdown document of a finding.

    Args:
      title: the finding's.
      said: what was published.
      notes: sentences about what was made for it.
      comparison: the measurements.
      pivots: its tables, by one measure each.
      picture: its picture, in GitHub's Markdown; None without one.
    """
    paragraphs = [f"# {title}", said, *notes]
    measures = [pivot.measure for pivot in pivots]
    quality_measures = [measure for measure in measures if measure.kind in ("score", "held out")]
    if quality_measures:
        edges = decision.edges(comparison, quality_measures[0])
        if edges:
            paragraphs.append(edges)
    for pivot in pivots:
        paragraphs.append(
            f"{words.capital(pivot.measure.name)}, {_describe_conditions(comparison)}:"
        )
        for block in pivot.blocks:
            if block.title:
                paragraphs.append(f"**{words.capital(block.title)}**")
            paragraphs.append(table(pivot, block))
    score = comparison.facts.score or "score"
    for result in dimension.dimensions(comparison):
        paragraphs.append(dimension.sentence(result, score))
    if quality_measures:
        paragraphs += decision.sentences(comparison, quality_measures[0])
    if picture is not None:
        paragraphs.append(picture)
    paragraphs.append(measured(comparison))
    return "\n\n".join(paragraphs) + "\n"


def table(pivot: Pivot, block: Block) -> str:
    """Returns a table in GitHub's Markdown; the best cell of each column is bold."""
    header = [pivot.rows.name]
    rows = [[shown(row)] for row in block.rows]
    for column in block.columns:
        header.append(headed(pivot.columns, column))
        best_rows = block.best(column, pivot.measure)
        for row, cells in zip(block.rows, rows, strict=True):
            arm = block.cells.get((row, column))
            cells.append(cell_text(arm, is_best=row in best_rows))
    return markdown.table(header, rows)


def cell_text(cell: ArmRow | None, *, is_best: bool) -> str:
    """Returns the text of a cell: "**0.887** (0.879–0.896)"; "" without runs.

    Args:
      cell: the arm.
      is_best: whether its mean is bold.
    """
    if cell is None:
        return ""
    value = cell.quality
    if value is None:
        endings = dict.fromkeys(run.status for run in cell.runs if run.status != "done")
        return ", ".join(endings) or words.NOTHING
    mean, low, high = (f"{number:.3f}" for number in (value.mean, value.low, value.high))
    text = f"**{mean}**" if is_best else mean
    if not low == mean == high:
        text += f" ({low}–{high})"
    return text if cell.is_whole else f"{text}, {value.n} of {len(cell.runs)} runs"


def measured(comparison: Comparison) -> str:
    """Returns a sentence with the date, machine, duration, number of runs, and versions."""
    facts = comparison.facts
    seconds = sum(run.seconds or 0.0 for run in comparison.runs)
    time = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    titles = {"python": "Python", "jax": "JAX"}
    versions = [
        f"{title} {facts.versions[name]}"
        for name, title in titles.items()
        if name in facts.versions
    ]
    return (
        f"Measured on {facts.date[:10]}, {facts.machine}, {time} for {len(comparison.runs)} "
        f"runs; {', '.join(versions)}."
    )


def _describe_conditions(comparison: Comparison) -> str:
    """Returns a phrase on seeds and steps: "mean of three seeds (lowest to highest); 75 steps"."""
    n_seeds = len({run.seed for run in comparison.runs})
    steps = [run.steps for run in comparison.runs if run.status == "done"]
    batch_sizes = [run.arm.batch_size for run in comparison.runs]
    count = _NUMBERS[n_seeds] if n_seeds < len(_NUMBERS) else n_seeds
    seeds = f"mean of {count} seeds (lowest to highest)"
    if n_seeds == 1:
        seeds = f"seed {comparison.runs[0].seed}"
    step_range = _format_range(steps or [comparison.facts.steps])
    return f"{seeds}; {step_range} steps of {_format_range(batch_sizes)} rows"


def _format_range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
