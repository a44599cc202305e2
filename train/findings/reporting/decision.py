"""Sentences that say which settings of a comparison by rewards fall behind, if any does."""

from collections.abc import Sequence

from train.compare.reporting import tables, words
from train.compare.reporting.recommend import gap_of
from train.compare.reporting.tables import ArmRow, Figures
from train.compare.result import Arm, Comparison
from train.findings.reporting import same_score


def sentences(comparison: Comparison) -> list[str]:
    """Returns sentences on settings at their best learning rates, for each batch size.

    A setting falls behind where the 95% interval of the difference over seeds (Welch) leaves out
    zero. Where none does, nothing is decided: what a small model does not show, a large one may.
    """
    figures = Figures(comparison)
    best = tables.best_of_each(figures.rows, Arm.rate_group)
    by_size = [[*group] for group in tables.groups(best, lambda arm: arm.batch_size)]
    several = len(by_size) > 1
    lines: list[str] = []
    behind = 0
    for rows in sorted(by_size, key=lambda rows: rows[0].arm.batch_size):
        where = f"batch {rows[0].arm.batch_size}: " if several else ""
        n, line = _batch_sentence(rows, figures)
        behind += n
        lines.append(words.capital(f"{where}{line}"))
    lines += _rate_sentences(best, figures)
    if distance := same_score.sentence(comparison):
        lines.append(distance)
    if not behind:
        lines.append(
            "This decides nothing: no setting at its best rate falls behind another, and what does "
            f"not collapse on {comparison.facts.dataset} may in a larger model, or on a harder "
            "task."
        )
    return lines


def _batch_sentence(rows: Sequence[ArmRow], figures: Figures) -> tuple[int, str]:
    """Returns the number of settings that fall behind the best one, and a sentence on them."""
    top = tables.best(rows)
    if top is None:
        return 0, "no run ended with a value."
    others = [row for row in rows if row is not top and row.quality]
    apart = [(row, gap_of(top, row)) for row in others]
    lost = [(row, gap) for row, gap in apart if gap.decides]
    of_rest = {id(row) for row, _ in lost}
    tied = [figures.label(row.arm) for row in others if id(row) not in of_rest]
    parts = [f"{figures.label(top.arm)} is the best, with {words.figure(_mean(top))}"]
    if lost:
        told = (
            f"{figures.label(row.arm)} by {words.rough(gap.value)}"
            + (f" (± {words.rough(gap.error)})" if gap.error else "")
            for row, gap in lost
        )
        parts.append(f"behind it, beyond the spread over seeds, are {', '.join(told)}")
    if tied:
        parts.append(f"within the spread of it are {', '.join(tied)}")
    return len(lost), "; ".join(parts) + "."


def _rate_sentences(best: Sequence[ArmRow], figures: Figures) -> list[str]:
    """Returns the ratio of the best rates, and which of them were at the edge of those tried."""
    ratio, lines = tables.rate_ratio(best), []
    if ratio is not None:
        lines.append(
            f"The best adapter's learning rate is {words.times(ratio)} that of full fine-tuning."
        )
    edges = [
        f"{figures.adapter(row.arm)} ({row.arm.learning_rate:g}, the {edge} tried)"
        for row in best
        if (edge := tables.rates_of(row, figures.rows).edge) in ("smallest", "largest")
    ]
    if edges:
        lines.append(f"A better rate may lie beyond those tried for {', '.join(edges)}.")
    return lines


def _mean(row: ArmRow) -> float:
    assert row.quality is not None
    return row.quality.mean
