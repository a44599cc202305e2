"""Sentences that say what a finding decides, by the standard of `train.compare`'s verdicts."""

from collections.abc import Sequence

from train.compare.reporting import tables, words
from train.compare.reporting.gap import gap_of, with_error
from train.compare.reporting.tables import ArmRow, Criterion
from train.compare.result import Arm, Comparison
from train.findings.reporting import same_score
from train.findings.reporting.pivot import shown


def edges(comparison: Comparison, measure: Criterion) -> str | None:
    """Returns a sentence on settings that are best at an edge of the grid; None for none."""
    rows = tables.rows(comparison, measure)
    arms = [row.arm for row in rows]
    clauses: list[str] = []
    for rates in tables.rates(rows):
        name = words.adapter(rates.tried[0].arm, arms)
        tried = [row.arm.learning_rate for row in rates.tried]
        clauses += _edge(f"the rate of {name}", tried, rates.best)
    at_best_rate = tables.best_of_each(rows, Arm.rate_group)
    for group in tables.groups(at_best_rate, lambda arm: arm._replace(learning_rate=0, alpha=None)):
        group.sort(key=lambda row: row.arm.alpha or 0)
        if (top := tables.best(group)) is not None and len(group) > 1:
            tried = [row.arm.alpha or 0 for row in group]
            clauses += _edge(f"the alpha at rank {top.arm.rank}", tried, group.index(top))
    if not clauses:
        return None
    return f"The best may lie beyond the grid: {'; '.join(clauses)}."


def _edge(name: str, tried: Sequence[float], best: int) -> list[str]:
    """Returns a clause that says at which end of the values tried the best one is, if at one."""
    value = shown(tried[best])
    if len(tried) == 1:
        return [f"{name} is {value}, the only one tried"]
    if best == 0:
        return [f"{name} is best at {value}, the smallest tried"]
    return [f"{name} is best at {value}, the largest tried"] if best == len(tried) - 1 else []


def sentences(comparison: Comparison, measure: Criterion | None = None) -> list[str]:
    """Returns sentences on settings at their best learning rates, for each batch size.

    A setting falls behind where its gap to the best one decides (`Gap.decides`). Where none does,
    nothing is decided: what a small model does not show, a large one may.

    Args:
      comparison: the measurements.
      measure: what settings are compared by; by default as `tables.criterion_of` says.
    """
    best = tables.best_of_each(tables.rows(comparison, measure), Arm.rate_group)
    arms = [row.arm for row in best]
    by_size = sorted(
        tables.groups(best, lambda arm: arm.batch_size), key=lambda rows: rows[0].arm.batch_size
    )
    lines: list[str] = []
    n_behind = 0
    for rows in by_size:
        prefix = f"batch {rows[0].arm.batch_size}: " if len(by_size) > 1 else ""
        n, line = _batch_sentence(rows, arms)
        n_behind += n
        lines.append(words.capital(f"{prefix}{line}"))
    ratio = tables.rate_ratio(best)
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
    """Returns the number of settings that fall behind the best one, and a sentence on them."""
    top = tables.best(rows)
    if top is None or top.quality is None:
        return 0, "no run ended with a value."
    gaps = [(words.label(x.arm, arms), gap_of(top, x)) for x in rows if x is not top and x.quality]
    behind = [f"{name} by {with_error(gap)}" for name, gap in gaps if gap.decides]
    open_gaps = [(name, gap) for name, gap in gaps if not gap.decides]
    separate = [f"{name} by {with_error(gap)}" for name, gap in open_gaps if gap.is_separate]
    within = [name for name, gap in open_gaps if not gap.is_separate]
    spread_over = gaps[0][1].spread_over if gaps else ""
    clauses = [f"{words.label(top.arm, arms)} is the best, with {words.figure(top.quality.mean)}"]
    for text, names in (
        (f"behind it, beyond the spread over {spread_over}, are", behind),
        ("behind it in every seed, but not told apart by so few, are", separate),
        ("within the spread of it are", within),
    ):
        clauses += [f"{text} {', '.join(names)}"] if names else []
    return len(behind), "; ".join(clauses) + "."
