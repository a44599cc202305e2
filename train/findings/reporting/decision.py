"""Writes sentences about what a finding decides, by the criteria of `train.compare`."""

from collections.abc import Sequence

from train.compare.reporting import tables, words
from train.compare.reporting.gap import gap_of, with_error
from train.compare.reporting.tables import ArmRow, Criterion
from train.compare.result import Arm, Comparison
from train.findings.reporting import same_score
from train.findings.reporting.pivot import shown


def edges(comparison: Comparison, measure: Criterion) -> str | None:
    """Returns a sentence on settings that are best at an edge of the grid, or None."""
    rows = tables.rows(comparison, measure)
    arms = [row.arm for row in rows]
    clauses: list[str] = []
    # The best learning rate of each setting.
    for rates in tables.rates(rows):
        name = words.adapter(rates.tried[0].arm, arms)
        learning_rates = [row.arm.learning_rate for row in rates.tried]
        clauses += _edge_clause(f"the rate of {name}", learning_rates, rates.best)
    # The best alpha among settings that differ in alpha alone, each at its best rate.
    best_rows = tables.best_of_each(rows, Arm.rate_group)
    for group in tables.groups(best_rows, lambda arm: arm._replace(learning_rate=0, alpha=None)):
        group.sort(key=lambda row: row.arm.alpha or 0)
        best_row = tables.best(group)
        if best_row is not None and len(group) > 1:
            alphas = [row.arm.alpha or 0 for row in group]
            name = f"the alpha at rank {best_row.arm.rank}"
            clauses += _edge_clause(name, alphas, group.index(best_row))
    if not clauses:
        return None
    return f"The best may lie beyond the grid: {'; '.join(clauses)}."


def _edge_clause(name: str, values: Sequence[float], best_index: int) -> list[str]:
    """Returns a clause if the best value is at an end of the tried values; else []."""
    best_value = shown(values[best_index])
    if len(values) == 1:
        return [f"{name} is {best_value}, the only one tried"]
    if best_index == 0:
        return [f"{name} is best at {best_value}, the smallest tried"]
    if best_index == len(values) - 1:
        return [f"{name} is best at {best_value}, the largest tried"]
    return []


def sentences(comparison: Comparison, measure: Criterion | None = None) -> list[str]:
    """Returns sentences that compare the settings for each batch size, at their best rates.

    A setting falls behind where its gap to the best one decides (`Gap.decides`). Where none does,
    nothing is decided: what a small model does not show, a large one may.

    Args:
      comparison: the measurements.
      measure: what settings are compared by; by default as `tables.criterion_of` says.
    """
    best_rows = tables.best_of_each(tables.rows(comparison, measure), Arm.rate_group)
    arms = [row.arm for row in best_rows]
    batch_groups = sorted(
        tables.groups(best_rows, lambda arm: arm.batch_size),
        key=lambda rows: rows[0].arm.batch_size,
    )
    lines: list[str] = []
    n_behind = 0
    for rows in batch_groups:
        prefix = f"batch {rows[0].arm.batch_size}: " if len(batch_groups) > 1 else ""
        n_group_behind, line = _batch_sentence(rows, arms)
        n_behind += n_group_behind
        lines.append(words.capital(f"{prefix}{line}"))
    ratio = tables.rate_ratio(best_rows)
    if ratio is not None:
        lines.append(
            "By the means, the best adapter's learning rate is "
            f"{words.times(ratio)} that of full fine-tuning."
        )
    lines += same_score.sentences(comparison)
    if not n_behind:
        lines.append(
            "This decides nothing: no setting at its best rate falls behind another, and what does "
            f"not collapse on {comparison.facts.dataset} may in a larger model, or on a harder "
            "task."
        )
    return lines


def _batch_sentence(rows: Sequence[ArmRow], arms: Sequence[Arm]) -> tuple[int, str]:
    """Returns the number of settings that are worse than the best one, and a sentence on them."""
    best_row = tables.best(rows)
    if best_row is None or best_row.quality is None:
        return 0, "no run ended with a value."
    spread_over = ""
    behind: list[str] = []
    separate: list[str] = []
    within_spread: list[str] = []
    for row in rows:
        if row is best_row or not row.quality:
            continue
        gap = gap_of(best_row, row)
        spread_over = spread_over or gap.spread_over
        name = words.label(row.arm, arms)
        if gap.decides:
            behind.append(f"{name} by {with_error(gap)}")
        elif gap.is_separate:
            separate.append(f"{name} by {with_error(gap)}")
        else:
            within_spread.append(name)
    best_name = words.label(best_row.arm, arms)
    clauses = [f"{best_name} is the best, with {words.figure(best_row.quality.mean)}"]
    for text, names in (
        (f"behind it, beyond the spread over {spread_over}, are", behind),
        ("behind it in every seed, but not told apart by so few, are", separate),
        ("within the spread of it are", within_spread),
    ):
        if names:
            clauses.append(f"{text} {', '.join(names)}")
    return len(behind), "; ".join(clauses) + "."
