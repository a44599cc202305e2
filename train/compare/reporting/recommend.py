"""The recommendation, by the measurements of a comparison alone."""

import dataclasses
import math
import shlex
from collections.abc import Sequence
from typing import Literal, NamedTuple

from train.compare.options import WITH_OWN_RATE
from train.compare.reporting import gap as gaps
from train.compare.reporting import tables, words
from train.compare.reporting.costs import (
    CostComparison,
    compare_costs,
    cost_clause,
    is_cheaper,
    knows_costs,
)
from train.compare.reporting.gap import FEWEST, LEVEL, UNKNOWN_SPREAD, Gap, gap_of, half_width
from train.compare.reporting.tables import ArmRow, Figures, Spread
from train.compare.result import Arm, Comparison

RULE = (
    "The best adapter is compared with the best full fine-tuning, by the task's score, or by the "
    "held-out loss where there is no score. Quality decides if the gap is beyond the spread: its "
    f"{LEVEL:.0%} interval leaves out zero, and at least {FEWEST} questions were answered "
    "differently. The interval counts the spread over seeds (Welch) and over the questions, in "
    "pairs of both methods' results (Satterthwaite). Where the results of single questions are not "
    "known, the seeds alone decide; seeds that all agree decide nothing. Within the spread, memory "
    "and time of a step decide: LoRA is recommended if it takes less of one of them and no more of "
    "the other, and if full fine-tuning is ahead by at most "
    f"{UNKNOWN_SPREAD:.0%}. With a single seed the spread is not known: only a gap of more than "
    f"{UNKNOWN_SPREAD:.0%} decides for full fine-tuning, and LoRA has to be ahead. Nothing is "
    "decided against a method that may not have been at its best: its best learning rate is the "
    "smallest or largest tried, or its best rank is the largest tried."
)
UNSEEN = (
    "LoRA tends to win where memory or time is short, where the task is narrow, and where many "
    "variants of a model are kept or served together.",
    "Full fine-tuning tends to win where the model has to learn a new vocabulary or language, to "
    "change as a whole on much data, or to unlearn a habit, and where only one model is shipped.",
    "All runs share their data, held-out rows and number of steps: other or more of them may "
    "change the order. The best of many arms looks a little better on these rows than it is.",
)


class Doubt(NamedTuple):
    """A reason why a comparison does not decide.

    Attributes:
      short: a clause for the headline.
      said: a sentence that says what would decide it.
      option: the option of train.compare that would, with its values; "" for none.
      values: the values of the option; of settings, those that were tried are among them.
    """

    short: str
    said: str
    option: str = ""
    values: tuple[float | str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A method to use, and why.

    Attributes:
      verdict: the method; "undecided" if the measurements cannot tell.
      arm: arm of the method; if undecided, the one ahead so far. None if no run has a value.
      headline: the verdict and what it rests on, in one sentence.
      reasons: sentences with their figures.
      undecided: what is not decided, and what would decide it.
      command: the command that would decide it, on one line; None where no option would.
    """

    verdict: Literal["lora", "full", "undecided"]
    arm: Arm | None
    headline: str
    reasons: tuple[str, ...]
    undecided: tuple[str, ...] = ()
    command: str | None = None


def recommend(comparison: Comparison) -> Recommendation:
    """Returns the recommendation by `RULE`; a pure function of the measurements."""
    figures = Figures(comparison)
    lora, full = tables.best_sides(figures.rows)
    if lora is None or full is None:
        return _one_sided(lora, full, figures)
    gap = gap_of(lora, full)
    better = lora if gap.value >= 0 else full
    costs = compare_costs(lora, full)
    cost_sentences = [cost.sentence for cost in costs]
    quality, reasons = _quality(lora, full, gap, figures)
    chosen, other = (full, lora) if gap.decides and better is full else (lora, full)
    doubts = _doubts(other, figures)
    if chosen is full:
        reasons += ["This is the price of the better quality:", *cost_sentences] if costs else []
    else:
        doubts += _spread_doubts(gap, costs, lora, full, figures)
        reasons += [*cost_sentences, *_smaller(lora, figures)]
    if figures.measure.kind == "training":
        lacks = "No score and no held-out loss was measured for both methods, and the training loss"
        lacks += " does not show what a model has learned: hold out rows, and measure their loss."
        chosen, doubts = better, [Doubt("no loss on held-out rows was measured", lacks)]
    clauses = [quality]
    if clause := cost_clause(words.method(lora.arm.method), costs):
        clauses.append(clause)
    verdict: Literal["lora", "full", "undecided"] = "full" if chosen is full else "lora"
    headline = f"Use {figures.label(chosen.arm)}"
    if doubts:
        verdict, chosen = "undecided", better
        headline = f"Not decided between {figures.label(lora.arm)} and {figures.label(full.arm)}"
        clauses += dict.fromkeys(doubt.short for doubt in doubts)
    return Recommendation(
        verdict=verdict,
        arm=chosen.arm,
        headline=f"{headline}: {'; '.join(clauses)}.",
        reasons=tuple(reasons),
        undecided=tuple(doubt.said for doubt in doubts),
        command=_further(comparison.facts.command, doubts),
    )


def _spread_doubts(
    gap: Gap, costs: Sequence[CostComparison], lora: ArmRow, full: ArmRow, figures: Figures
) -> list[Doubt]:
    """Returns the doubts that a wide spread leaves: it may hide that full fine-tuning is better."""
    if gap.decides:
        return []
    if gap.value < 0 and not gap.seeds:
        lead = "Full fine-tuning is ahead by one seed"
    elif gap.is_hidden:
        lead = f"Full fine-tuning is ahead by {-gap.share:.0%}, and the spread may hide that"
    elif is_cheaper(costs):
        return []
    elif not knows_costs(costs):
        text = "Quality does not decide, and memory and time of a step, which then do, were not "
        text += "measured: measure them (--costs)."
        return [Doubt("memory and time are not known", text, "--costs")]
    else:
        lead = "Memory and time of a step do not decide for LoRA"
    return _more_measurements(lead, gap, min(len(lora.runs), len(full.runs)), figures)


def _more_measurements(lead: str, gap: Gap, n_seeds: int, figures: Figures) -> list[Doubt]:
    """Returns the doubts that more questions, or else more seeds, would settle.

    Args:
      lead: the doubt, as a clause.
      gap: by how much the adapter is better than full fine-tuning.
      n_seeds: number of seeds of each.
      figures: the comparison.
    """
    facts = figures.comparison.facts
    promise = "such a gap would be told apart in four of five comparisons"
    n_questions = 0 if gap.questions is None else gap.questions.n
    per_option = n_questions / facts.eval_questions if facts.eval_questions else 1.0
    limit = facts.most_questions or 0
    n_available = int(limit * per_option)
    needed = gaps.questions_to_decide(gap, n_available)
    if needed is not None:
        return [_question_doubt(lead, math.ceil(needed / per_option), promise)]
    doubts = []
    seeds_needed = gaps.seeds_to_decide(gap, n_seeds)
    if seeds_needed is None and n_available > n_questions:
        seeds_needed = gaps.seeds_to_decide(gaps.with_questions(gap, n_available), n_seeds)
        doubts = [_question_doubt(lead, limit, "more seeds are needed as well")]
    if seeds_needed is not None:
        promise = f"with {seeds_needed}, {promise}"
        return [*doubts, _seed_doubt(lead, seeds_needed - n_seeds, figures, promise)]
    if gap.seeds and gap.value and any(variance.value for variance in gap.variances):
        text = f"{lead}. Not even {gaps.MOST_SEEDS} seeds would tell such a gap apart"
        text += " on these questions: hold out more." if gap.questions else "."
        return [Doubt("the gap is too small for what can be measured", text)]
    n_compared = len({run.seed for run in figures.comparison.runs})
    return [_seed_doubt(lead, max(2, n_compared), figures, "how many it takes is not known")]


def _question_doubt(lead: str, n: int, promise: str) -> Doubt:
    text = f"{lead}: ask {n:,} questions (--eval-questions); {promise}."
    return Doubt("more questions are needed", text, "--eval-questions", (n,))


def _seed_doubt(lead: str, n: int, figures: Figures, promise: str) -> Doubt:
    """Returns the doubt that so many seeds beside those of the comparison would settle."""
    seeds = sorted({run.seed for run in figures.comparison.runs})
    further = range(seeds[-1] + 1, seeds[-1] + 1 + n)
    text = f"{lead}: train more seeds (--seeds); {promise}."
    return Doubt("more seeds are needed", text, "--seeds", (*seeds, *further))


def _further(command: str, doubts: Sequence[Doubt]) -> str | None:
    """Returns a command with options that would settle the doubts, into another folder."""
    changes = {doubt.option: doubt.values for doubt in doubts if doubt.option}
    if not changes:
        return None
    without = ("--resume", "--overwrite", *["--no-costs"] * ("--costs" in changes))
    given = [word for word in shlex.split(command) if word not in without]
    output = "runs/compare"
    if "--output" in given[:-1]:
        output = given[given.index("--output") + 1]
    of = {option: [*map(_word, values)] for option, values in changes.items()}
    for option, values in {**of, "--output": [f"{output.rstrip('/')}-2"]}.items():
        at = given.index(option) if option in given else len(given)
        end = next((i for i in range(at + 1, len(given)) if given[i][:2] == "--"), len(given))
        given[at:end] = [option, *values]
    return shlex.join(given)


def _word(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _one_sided(lora: ArmRow | None, full: ArmRow | None, figures: Figures) -> Recommendation:
    rows = figures.rows
    missing = "full fine-tuning" if full is None else "an adapter"
    sides = [row for row in rows if (row.is_full if full is None else row.is_adapter)]
    runs = [run for row in sides for run in row.runs]
    failed = [run for run in runs if run.status == "failed"]
    reasons = [f"No run of {missing} ended with a value."]
    if lora is None and full is None:
        reasons = ["No run ended with a value."]
        runs = failed = [run for row in rows for run in row.runs if run.status == "failed"]
    if failed:
        reasons.append(f"{len(failed)} of {len(runs)} failed, the first with: {failed[0].error}")
    top = lora or full
    methods = dict.fromkeys([*(row.arm.method for row in rows), "lora", "full"])
    text = f"There is nothing to compare: run at least two seeds of {missing} (--methods)."
    option = "" if sides else "--methods"  # which helps where no run of it was asked for
    doubt = Doubt("there is nothing to compare", text, option, tuple(methods))
    return Recommendation(
        verdict="undecided",
        arm=top.arm if top else None,
        headline=f"Not decided: {reasons[0][0].lower()}{reasons[0][1:]}",
        reasons=tuple(reasons),
        undecided=(doubt.said,),
        command=_further(figures.comparison.facts.command, [doubt]),
    )


def _quality(lora: ArmRow, full: ArmRow, gap: Gap, figures: Figures) -> tuple[str, list[str]]:
    """Returns a comparison of the qualities: a clause of a headline, and sentences with both."""
    one, other = lora.quality, full.quality
    assert one and other
    values = [words.beside(side.mean, gap.error or side.deviation) for side in (one, other)]
    measured = (
        f"{words.capital(figures.measure.name)}: {values[0]} with {figures.label(lora.arm)} "
        f"({_seeds(one)}), {values[1]} with {figures.label(full.arm)} ({_seeds(other)})."
    )
    by = f"{words.rough(abs(gap.value))}, {100 * abs(gap.share):.2g}% of the larger"
    leader = words.method((lora if gap.value >= 0 else full).arm.method)
    clause = _quality_clause(leader, gap)
    return clause, [measured, _gap_sentence(leader, by, clause, gap), *_questions(gap)]


def _quality_clause(leader: str, gap: Gap) -> str:
    """Returns a clause of the headline: the result that seeds and questions show."""
    if gap.decides:
        return f"{leader} is better"
    if not gap.seeds:
        return "quality not told apart by one seed"
    if gap.is_separate:
        return f"so few {gap.spread_over} do not tell the methods apart"
    return f"quality not told apart by these {gap.spread_over}" if gap.is_hidden else "quality tied"


def _gap_sentence(leader: str, by: str, clause: str, gap: Gap) -> str:
    """Returns a sentence on the gap beside its spread.

    Args:
      leader: the method that is ahead.
      by: by how much, in words.
      clause: what that shows; see `_quality_clause`.
      gap: the gap.
    """
    if gap.error is None:
        side = "more" if abs(gap.share) > UNKNOWN_SPREAD else "no more"
        return (
            f"The gap is {by}, {side} than {UNKNOWN_SPREAD:.0%}; the spread over seeds is not "
            "known, since a side has a single seed."
        )
    spread = f"± {words.rough(gap.error)}, its {LEVEL:.0%} interval over {gap.spread_over}"
    if gap.decides:
        return f"{words.capital(leader)} is better by {by}: beyond the spread ({spread})."
    text = f"The gap is {by}: within the spread ({spread})."
    if abs(gap.value) > gap.error:
        text = f"The gap is {by} ({spread})."
    if gap.is_separate:
        return f"{text} Every seed of {leader} is ahead, but {clause}."
    return text if gap.is_hidden else f"{text} Quality is tied: memory and time count."


def _questions(gap: Gap) -> list[str]:
    """Returns a sentence on the questions; none where the interval says it all."""
    questions = gap.questions
    if questions is None:
        return ["The results of single questions are not known: the seeds alone decide."]
    count = f"{questions.differing:,} of {questions.n:,} questions were answered differently"
    if questions.differing < FEWEST:
        return [f"Only {count}: fewer than {FEWEST} decide nothing."]
    if gap.seeds:
        return []
    error = words.rough(half_width([questions.variance]))
    return [f"{words.capital(count)}: over them alone, the gap is ± {error}."]


def _seeds(values: Spread) -> str:
    return f"{values.n} seeds" if values.n > 1 else "one seed"


def _smaller(lora: ArmRow, figures: Figures) -> list[str]:
    """Names the smallest adapter that is within the spread of the best one."""
    size = lora.trained_parameters or 0
    for row in sorted(figures.rows, key=lambda row: row.trained_parameters or 0):
        n = row.trained_parameters
        if not row.is_adapter or not row.is_whole or not n or n >= size:
            continue
        gap = gap_of(row, lora)
        if gap.error is not None and not gap.decides:
            return [
                f"{figures.label(row.arm)} is within the spread of {figures.label(lora.arm)}, and "
                f"trains {n / size:.2g} as many parameters."
            ]
    return []


def _doubts(side: ArmRow, figures: Figures) -> list[Doubt]:
    """Returns reasons why a method may do better than its best row here, and what would show it."""
    doubts = []
    tried = tables.rates_of(side, figures.rows)
    rate, who = side.arm.learning_rate, words.method(side.arm.method)
    option = "--full-lrs" if side.is_full else "--lrs"
    if tried.edge:
        lower, higher = (float(f"{x:.2g}") for x in (rate / 3, rate * 3))
        beyond = {"smallest": (lower,), "largest": (higher,)}.get(tried.edge, (lower, higher))
        text = f"try {' and '.join(f'{x:g}' for x in beyond)} too ({option})."
        if tried.edge == "only":
            text = f"{figures.label(side.arm)}: one learning rate alone was tried; {text}"
        else:
            text = f"The best learning rate of {who}, {rate:g}, is the {tried.edge} tried: {text}"
        if side.arm.method in WITH_OWN_RATE:  # its rates are multiples of those that --lrs names
            option = ""
        values = sorted({*beyond, *(row.arm.learning_rate for row in tried.tried)})
        short = f"the best rate of {who} is at the edge of what was tried"
        doubts.append(Doubt(short, text, option, tuple(values)))
    for row in figures.rows:
        is_rival = (row.is_full, row.is_adapter) == (side.is_full, side.is_adapter)
        if row.quality is None or not is_rival or row.is_whole or row.order >= side.order:
            continue
        lost = len(row.runs) - row.quality.n
        text = (
            f"{figures.label(row.arm)} has {words.figure(row.quality.mean)}, but {lost} of its "
            f"{len(row.runs)} runs {'has' if lost == 1 else 'have'} no value: run it again."
        )
        doubts.append(Doubt(f"a better setting of {who} lacks a run", text))
    rank = side.arm.rank
    if rank is None:
        return doubts
    alike = [row for row in figures.rows if row.arm.method == side.arm.method]
    ranks = {row.arm.rank for row in alike if row.arm.rank and tables.is_tried(row)}
    whole = max((row.trained_parameters or 0 for row in figures.rows if row.is_full), default=0)
    is_half = bool(whole) and 2 * (side.trained_parameters or 0) >= whole
    if rank >= max(ranks) and not is_half:
        short = f"the best rank of {who} is the largest tried"
        text = (
            f"The best rank of {who}, {rank}, is the largest tried: try {4 * rank} too (--ranks)."
        )
        doubts.append(Doubt(short, text, "--ranks", tuple(sorted({*ranks, 4 * rank}))))
    return doubts
