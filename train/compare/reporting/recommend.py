"""Makes the recommendation from the measurements of a comparison."""

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
from train.compare.reporting.gap import (
    LEVEL,
    MIN_DIFFERING_QUESTIONS,
    UNKNOWN_SPREAD,
    Gap,
    gap_of,
    half_width,
)
from train.compare.reporting.tables import ArmRow, Figures, Spread
from train.compare.result import Arm, Comparison

RULE = (
    "The best adapter is compared with the best full fine-tuning, by the task's score, or by the "
    "held-out loss where there is no score. Quality decides if the gap is beyond the spread: its "
    f"{LEVEL:.0%} interval leaves out zero, and at least {MIN_DIFFERING_QUESTIONS} questions were "
    "answered differently. The interval counts the spread over seeds (Welch) and over the "
    "questions, in pairs of both methods' results (Satterthwaite). Where the results of single "
    "questions are not known, the seeds alone decide; seeds that all agree decide nothing. Within "
    "the spread, memory "
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
    """A reason why a comparison is undecided.

    Attributes:
      headline_clause: a clause for the headline.
      sentence: a sentence that says what would decide it.
      option: the option of train.compare that would, with its values; "" for none.
      values: the values of the option; of settings, those that were tried are among them.
    """

    headline_clause: str
    sentence: str
    option: str = ""
    values: tuple[float | str, ...] = ()


_NO_HELD_OUT = Doubt(
    "no loss on held-out rows was measured",
    "No score and no held-out loss was measured for both methods, and the training loss does not "
    "show what a model has learned: hold out rows, and measure their loss.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The recommended method and its reasons.

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
        return _recommend_without_a_rival(lora, full, figures)
    gap = gap_of(lora, full)
    better_row = lora if gap.value >= 0 else full
    costs = compare_costs(lora, full)
    cost_sentences = [cost.sentence for cost in costs]
    quality_clause, reasons = _describe_quality(lora, full, gap, figures)
    is_full_better = gap.decides and better_row is full
    if is_full_better:
        recommended_row = full
        doubts = _doubts_about_best_row(lora, figures)
        if costs:
            reasons += ["This is the price of the better quality:", *cost_sentences]
    else:
        recommended_row = lora
        doubts = [
            *_doubts_about_best_row(full, figures),
            *_doubts_of_wide_spread(gap, costs, lora, full, figures),
        ]
        reasons += [*cost_sentences, *_describe_smaller_adapter(lora, figures)]
    if figures.measure.kind == "training":
        doubts = [_NO_HELD_OUT]
    clauses = [quality_clause]
    costs_clause = cost_clause(words.method(lora.arm.method), costs)
    if costs_clause:
        clauses.append(costs_clause)
    verdict: Literal["lora", "full", "undecided"] = "full" if is_full_better else "lora"
    headline = f"Use {figures.label(recommended_row.arm)}"
    if doubts:
        verdict = "undecided"
        recommended_row = better_row
        headline = f"Not decided between {figures.label(lora.arm)} and {figures.label(full.arm)}"
        clauses += dict.fromkeys(doubt.headline_clause for doubt in doubts)
    return Recommendation(
        verdict=verdict,
        arm=recommended_row.arm,
        headline=f"{headline}: {'; '.join(clauses)}.",
        reasons=tuple(reasons),
        undecided=tuple(doubt.sentence for doubt in doubts),
        command=_command_to_decide(comparison.facts.command, doubts),
    )


def _doubts_of_wide_spread(
    gap: Gap, costs: Sequence[CostComparison], lora: ArmRow, full: ArmRow, figures: Figures
) -> list[Doubt]:
    """Returns the doubts that remain if quality and costs do not decide for the adapter."""
    if gap.decides:
        return []
    if gap.value < 0 and not gap.seeds:
        doubt_clause = "Full fine-tuning is ahead by one seed"
    elif gap.is_hidden:
        doubt_clause = (
            f"Full fine-tuning is ahead by {-gap.share:.0%}, and the spread may hide that"
        )
    elif is_cheaper(costs):
        return []
    elif not knows_costs(costs):
        text = "Quality does not decide, and memory and time of a step, which then do, were not "
        text += "measured: measure them (--costs)."
        return [Doubt("memory and time are not known", text, "--costs")]
    else:
        doubt_clause = "Memory and time of a step do not decide for LoRA"
    return _doubts_for_more_measurements(
        doubt_clause, gap, min(len(lora.runs), len(full.runs)), figures
    )


def _doubts_for_more_measurements(
    doubt_clause: str, gap: Gap, n_seeds: int, figures: Figures
) -> list[Doubt]:
    """Returns the doubts that more questions, or otherwise more seeds, would resolve.

    Args:
      doubt_clause: the doubt, as a clause.
      gap: by how much the adapter is better than full fine-tuning.
      n_seeds: number of seeds of each.
      figures: the comparison.
    """
    facts = figures.comparison.facts
    promise = "such a gap would be told apart in four of five comparisons"
    # --eval-questions counts examples, and a task may ask several questions for each example.
    n_questions = 0 if gap.questions is None else gap.questions.n
    questions_per_option = 1.0
    if facts.eval_questions:
        questions_per_option = n_questions / facts.eval_questions
    option_limit = facts.most_questions or 0
    n_available = int(option_limit * questions_per_option)
    # More questions alone are enough.
    questions_needed = gaps.questions_to_decide(gap, n_available)
    if questions_needed is not None:
        option_value = math.ceil(questions_needed / questions_per_option)
        return [_make_question_doubt(doubt_clause, option_value, promise)]
    # More seeds are enough, if need be together with all questions that there are.
    doubts: list[Doubt] = []
    seeds_needed = gaps.seeds_to_decide(gap, n_seeds)
    if seeds_needed is None and n_available > n_questions:
        gap_with_all_questions = gaps.with_questions(gap, n_available)
        seeds_needed = gaps.seeds_to_decide(gap_with_all_questions, n_seeds)
        question_promise = "more seeds are needed as well"
        doubts = [_make_question_doubt(doubt_clause, option_limit, question_promise)]
    if seeds_needed is not None:
        promise = f"with {seeds_needed}, {promise}"
        n_further_seeds = seeds_needed - n_seeds
        return [*doubts, _make_seed_doubt(doubt_clause, n_further_seeds, figures, promise)]
    # The gap is so small, beside its known spread, that no affordable number of seeds is enough.
    has_variance = any(variance.value for variance in gap.variances)
    if gap.seeds and gap.value and has_variance:
        sentence = f"{doubt_clause}. Not even {gaps.MAX_SEEDS} seeds would tell such a gap apart"
        sentence += " on these questions: hold out more." if gap.questions else "."
        return [Doubt("the gap is too small for what can be measured", sentence)]
    # The spread is not known: twice as many seeds would show it.
    n_compared_seeds = len({run.seed for run in figures.comparison.runs})
    n_further_seeds = max(2, n_compared_seeds)
    promise = "how many it takes is not known"
    return [_make_seed_doubt(doubt_clause, n_further_seeds, figures, promise)]


def _make_question_doubt(doubt_clause: str, n_questions: int, promise: str) -> Doubt:
    """Returns the doubt that more questions would resolve."""
    return Doubt(
        headline_clause="more questions are needed",
        sentence=f"{doubt_clause}: ask {n_questions:,} questions (--eval-questions); {promise}.",
        option="--eval-questions",
        values=(n_questions,),
    )


def _make_seed_doubt(
    doubt_clause: str, n_further_seeds: int, figures: Figures, promise: str
) -> Doubt:
    """Returns the doubt that a number of further seeds would resolve."""
    seeds = sorted({run.seed for run in figures.comparison.runs})
    first_further_seed = seeds[-1] + 1
    further_seeds = range(first_further_seed, first_further_seed + n_further_seeds)
    return Doubt(
        headline_clause="more seeds are needed",
        sentence=f"{doubt_clause}: train more seeds (--seeds); {promise}.",
        option="--seeds",
        values=(*seeds, *further_seeds),
    )


def _command_to_decide(command: str, doubts: Sequence[Doubt]) -> str | None:
    """Returns a command that would resolve the doubts, with another output folder.

    Args:
      command: the command of the comparison.
      doubts: the doubts; None is returned if no option settles any of them.
    """
    option_values: dict[str, list[str]] = {}
    for doubt in doubts:
        if doubt.option:
            option_values[doubt.option] = [_format_option_value(value) for value in doubt.values]
    if not option_values:
        return None
    removed_options = {"--resume", "--overwrite"}
    if "--costs" in option_values:
        removed_options.add("--no-costs")
    command_words = [word for word in shlex.split(command) if word not in removed_options]
    output = "runs/compare"
    if "--output" in command_words[:-1]:
        output = command_words[command_words.index("--output") + 1]
    option_values["--output"] = [f"{output.rstrip('/')}-2"]
    for option, values in option_values.items():
        _set_option(command_words, option, values)
    return shlex.join(command_words)


def _set_option(command_words: list[str], option: str, values: list[str]) -> None:
    """Sets the values of an option in a command, in place."""
    if option not in command_words:
        command_words += [option, *values]
        return
    start = command_words.index(option)
    end = start + 1
    while end < len(command_words) and not command_words[end].startswith("--"):
        end += 1
    command_words[start:end] = [option, *values]


def _format_option_value(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _recommend_without_a_rival(
    lora: ArmRow | None, full: ArmRow | None, figures: Figures
) -> Recommendation:
    """Returns the recommendation if the adapter or full fine-tuning has no value."""
    rows = figures.rows
    missing_method = "full fine-tuning" if full is None else "an adapter"
    missing_rows = [row for row in rows if (row.is_full if full is None else row.is_adapter)]
    if lora is None and full is None:
        reasons = ["No run ended with a value."]
        failed_runs = [run for row in rows for run in row.runs if run.status == "failed"]
        n_runs = len(failed_runs)
    else:
        reasons = [f"No run of {missing_method} ended with a value."]
        runs = [run for row in missing_rows for run in row.runs]
        failed_runs = [run for run in runs if run.status == "failed"]
        n_runs = len(runs)
    if failed_runs:
        first_error = failed_runs[0].error
        reasons.append(f"{len(failed_runs)} of {n_runs} failed, the first with: {first_error}")
    best_row = lora or full
    methods = dict.fromkeys([*(row.arm.method for row in rows), "lora", "full"])
    doubt = Doubt(
        headline_clause="there is nothing to compare",
        sentence=f"There is nothing to compare: run at least two seeds of {missing_method} "
        "(--methods).",
        # The option helps where no run of the method was asked for.
        option="" if missing_rows else "--methods",
        values=tuple(methods),
    )
    return Recommendation(
        verdict="undecided",
        arm=best_row.arm if best_row else None,
        headline=f"Not decided: {reasons[0][0].lower()}{reasons[0][1:]}",
        reasons=tuple(reasons),
        undecided=(doubt.sentence,),
        command=_command_to_decide(figures.comparison.facts.command, [doubt]),
    )


def _describe_quality(
    lora: ArmRow, full: ArmRow, gap: Gap, figures: Figures
) -> tuple[str, list[str]]:
    """Returns a headline's clause that compares the qualities, and sentences with both values."""
    sides: list[str] = []
    for row in (lora, full):
        assert row.quality
        value = words.beside(row.quality.mean, gap.error or row.quality.deviation)
        sides.append(f"{value} with {figures.label(row.arm)} ({_format_seed_count(row.quality)})")
    values_sentence = f"{words.capital(figures.measure.name)}: {', '.join(sides)}."
    size = f"{words.rough(abs(gap.value))}, {100 * abs(gap.share):.2g}% of the larger"
    leader = words.method((lora if gap.value >= 0 else full).arm.method)
    clause = _quality_clause(leader, gap)
    gap_sentence = _gap_sentence(leader, size, clause, gap)
    return clause, [values_sentence, gap_sentence, *_question_sentences(gap)]


def _quality_clause(leader: str, gap: Gap) -> str:
    """Returns a headline's clause about the difference that seeds and questions show."""
    if gap.decides:
        return f"{leader} is better"
    if not gap.seeds:
        return "quality not told apart by one seed"
    if gap.is_separate:
        return f"so few {gap.spread_over} do not tell the methods apart"
    if gap.is_hidden:
        return f"quality not told apart by these {gap.spread_over}"
    return "quality tied"


def _gap_sentence(leader: str, size: str, clause: str, gap: Gap) -> str:
    """Returns a sentence about the gap and its spread.

    Args:
      leader: the method that is ahead.
      size: by how much, in words.
      clause: what that shows; see `_quality_clause`.
      gap: the gap.
    """
    if gap.error is None:
        comparative = "more" if abs(gap.share) > UNKNOWN_SPREAD else "no more"
        return (
            f"The gap is {size}, {comparative} than {UNKNOWN_SPREAD:.0%}; the spread over seeds is "
            "not known, since a side has a single seed."
        )
    spread = f"± {words.rough(gap.error)}, its {LEVEL:.0%} interval over {gap.spread_over}"
    if gap.decides:
        return f"{words.capital(leader)} is better by {size}: beyond the spread ({spread})."
    sentence = f"The gap is {size}: within the spread ({spread})."
    if abs(gap.value) > gap.error:
        sentence = f"The gap is {size} ({spread})."
    if gap.is_separate:
        return f"{sentence} Every seed of {leader} is ahead, but {clause}."
    if gap.is_hidden:
        return sentence
    return f"{sentence} Quality is tied: memory and time count."


def _question_sentences(gap: Gap) -> list[str]:
    """Returns a sentence about the spread over questions; [] if the interval includes it."""
    questions = gap.questions
    if questions is None:
        return ["The results of single questions are not known: the seeds alone decide."]
    count = f"{questions.differing:,} of {questions.n:,} questions were answered differently"
    if questions.differing < MIN_DIFFERING_QUESTIONS:
        return [f"Only {count}: fewer than {MIN_DIFFERING_QUESTIONS} decide nothing."]
    if gap.seeds:
        return []
    error = words.rough(half_width([questions.variance]))
    return [f"{words.capital(count)}: over them alone, the gap is ± {error}."]


def _format_seed_count(quality: Spread) -> str:
    return f"{quality.n} seeds" if quality.n > 1 else "one seed"


def _describe_smaller_adapter(lora: ArmRow, figures: Figures) -> list[str]:
    """Returns a sentence about the smallest adapter within the spread of the best one."""
    best_size = lora.trained_parameters or 0
    for row in sorted(figures.rows, key=lambda row: row.trained_parameters or 0):
        size = row.trained_parameters
        if not row.is_adapter or not row.is_whole or not size or size >= best_size:
            continue
        gap = gap_of(row, lora)
        is_within_spread = gap.error is not None and not gap.decides
        if is_within_spread:
            return [
                f"{figures.label(row.arm)} is within the spread of {figures.label(lora.arm)}, and "
                f"trains {size / best_size:.2g} as many parameters."
            ]
    return []


def _doubts_about_best_row(side: ArmRow, figures: Figures) -> list[Doubt]:
    """Returns doubts whether a method's best row is really its best."""
    return [
        *_rate_doubts(side, figures),
        *_failed_run_doubts(side, figures),
        *_rank_doubts(side, figures),
    ]


def _rate_doubts(side: ArmRow, figures: Figures) -> list[Doubt]:
    """Returns a doubt if the best learning rate is the smallest or the largest that was tried."""
    rates = tables.rates_of(side, figures.rows)
    if rates.edge is None:
        return []
    method = words.method(side.arm.method)
    option = "--full-lrs" if side.is_full else "--lrs"
    best_rate = side.arm.learning_rate
    further_rates: list[float] = []
    if rates.edge != "largest":
        further_rates.append(float(f"{best_rate / 3:.2g}"))
    if rates.edge != "smallest":
        further_rates.append(float(f"{best_rate * 3:.2g}"))
    rate_list = " and ".join(f"{rate:g}" for rate in further_rates)
    finding = f"The best learning rate of {method}, {best_rate:g}, is the {rates.edge} tried:"
    if rates.edge == "only":
        finding = f"{figures.label(side.arm)}: one learning rate alone was tried;"
    tried_rates = [row.arm.learning_rate for row in rates.tried]
    # The rates of such a method are multiples of those that --lrs names.
    has_multiples = side.arm.method in WITH_OWN_RATE
    doubt = Doubt(
        headline_clause=f"the best rate of {method} is at the edge of what was tried",
        sentence=f"{finding} try {rate_list} too ({option}).",
        option="" if has_multiples else option,
        values=tuple(sorted({*further_rates, *tried_rates})),
    )
    return [doubt]


def _failed_run_doubts(side: ArmRow, figures: Figures) -> list[Doubt]:
    """Returns a doubt for each better setting of the method that has failed runs."""
    method = words.method(side.arm.method)
    doubts: list[Doubt] = []
    for row in figures.rows:
        is_rival = (row.is_full, row.is_adapter) == (side.is_full, side.is_adapter)
        is_better = row.order < side.order
        if row.quality is None or row.is_whole or not is_rival or not is_better:
            continue
        n_missing = len(row.runs) - row.quality.n
        text = (
            f"{figures.label(row.arm)} has {words.figure(row.quality.mean)}, but {n_missing} of "
            f"its {len(row.runs)} runs {'has' if n_missing == 1 else 'have'} no value: run it "
            "again."
        )
        doubts.append(Doubt(f"a better setting of {method} lacks a run", text))
    return doubts


def _rank_doubts(side: ArmRow, figures: Figures) -> list[Doubt]:
    """Returns a doubt if the best rank is the largest tried and trains less than half of all."""
    rank = side.arm.rank
    if rank is None:
        return []
    ranks = {
        row.arm.rank
        for row in figures.rows
        if row.arm.method == side.arm.method and row.arm.rank and tables.is_tried(row)
    }
    full_sizes = [row.trained_parameters or 0 for row in figures.rows if row.is_full]
    full_size = max(full_sizes, default=0)
    trains_half = full_size > 0 and 2 * (side.trained_parameters or 0) >= full_size
    if rank < max(ranks) or trains_half:
        return []
    method = words.method(side.arm.method)
    doubt = Doubt(
        headline_clause=f"the best rank of {method} is the largest tried",
        sentence=f"The best rank of {method}, {rank}, is the largest tried: try {4 * rank} too "
        "(--ranks).",
        option="--ranks",
        values=tuple(sorted({*ranks, 4 * rank})),
    )
    return [doubt]
