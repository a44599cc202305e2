"""The table of a finding, as Markdown."""

from collections.abc import Sequence

from train.compare.reporting import dimension, words
from train.compare.reporting.tables import ArmRow
from train.compare.result import Comparison
from train.console import markdown
from train.findings.reporting import decision
from train.findings.reporting.pivot import Block, Key, Pivot, headed, shown

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
    """Returns the document of a finding.

    Args:
      title: the finding's.
      said: what was published.
      notes: sentences about what was made for it.
      comparison: the measurements.
      pivots: its tables, by one measure each.
      picture: its picture, in GitHub's Markdown; None without one.
    """
    parts = [f"# {title}", said, *notes]
    decided_by = next((p.measure for p in pivots if p.measure.kind in ("score", "held out")), None)
    if decided_by and (edges := decision.edges(comparison, decided_by)):
        parts.append(edges)
    for pivot in pivots:
        parts.append(f"{words.capital(pivot.measure.name)}, {_conditions(comparison)}:")
        for block in pivot.blocks:
            parts += [f"**{words.capital(block.title)}**"] if block.title else []
            parts.append(table(pivot, block))
    score = comparison.facts.score or "score"
    parts += [dimension.sentence(result, score) for result in dimension.dimensions(comparison)]
    if decided_by:
        parts += decision.sentences(comparison, decided_by)
    if picture is not None:
        parts.append(picture)
    parts.append(measured(comparison))
    return "\n\n".join(parts) + "\n"


def table(pivot: Pivot, block: Block) -> str:
    """Returns a table in GitHub's Markdown; the best cell of each column is bold."""
    best = {column: block.best(column, pivot.measure) for column in block.columns}
    head = [pivot.rows.name, *(headed(pivot.columns, column) for column in block.columns)]

    def cells(row: Key) -> list[str]:
        cells_of_row = ((block.cells.get((row, key)), row in best[key]) for key in block.columns)
        return [shown(row), *(cell_text(cell, is_best=is_best) for cell, is_best in cells_of_row)]

    return markdown.table(head, map(cells, block.rows))


def cell_text(cell: ArmRow | None, *, is_best: bool) -> str:
    """Returns a cell: "**0.887** (0.879–0.896)"; empty where nothing was run.

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
    """Returns a sentence with date, machine, duration, number of runs, and versions."""
    facts = comparison.facts
    took = sum(run.seconds or 0.0 for run in comparison.runs)
    minutes = f"{took / 60:.0f} minutes" if took >= 90 else f"{took:.0f} seconds"
    named = (("Python", "python"), ("JAX", "jax"))
    versions = ", ".join(f"{a} {facts.versions[b]}" for a, b in named if b in facts.versions)
    return (
        f"Measured on {facts.date[:10]}, {facts.machine}, {minutes} for {len(comparison.runs)} "
        f"runs; {versions}."
    )


def _conditions(comparison: Comparison) -> str:
    """Returns a phrase on seeds and steps: "mean of three seeds (lowest to highest); 75 steps"."""
    seeds = len({run.seed for run in comparison.runs})
    steps = [run.steps for run in comparison.runs if run.status == "done"]
    sizes = [run.arm.batch_size for run in comparison.runs]
    count = _NUMBERS[seeds] if seeds < len(_NUMBERS) else seeds
    over = f"mean of {count} seeds (lowest to highest)"
    if seeds == 1:
        over = f"seed {comparison.runs[0].seed}"
    return f"{over}; {_range(steps or [comparison.facts.steps])} steps of {_range(sizes)} rows"


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
