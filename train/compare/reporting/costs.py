"""Compares the costs of an adapter with those of full fine-tuning."""

from collections.abc import Sequence
from typing import NamedTuple

from train.compare.reporting import words
from train.compare.reporting.tables import ArmRow, Spread

# A cost's name in a headline, its name in a sentence, the field of `RunResult`, and its form.
_MEASURED_COSTS = (
    ("memory", "Memory of the compiled step", "compiled_bytes", words.size),
    ("time", "Time of a step", "step_seconds", words.seconds),
    ("files", "Files of a task", "saved_bytes", words.size),
)
_DECIDING_COSTS = ("memory", "time")


class CostComparison(NamedTuple):
    """A cost that was measured for an adapter and for full fine-tuning.

    Attributes:
      name: its name in a headline, such as "memory".
      side: 1 where the adapter costs less, -1 where it costs more, 0 where neither is told apart.
      sentence: a sentence with both figures.
    """

    name: str
    side: int
    sentence: str


def compare_costs(lora: ArmRow, full: ArmRow) -> tuple[CostComparison, ...]:
    """Returns the costs that were measured for both arms."""
    costs = []
    method = words.method(lora.arm.method)
    for name, title, field, show in _MEASURED_COSTS:
        lora_spread = lora.spread_of(field)
        full_spread = full.spread_of(field)
        if not lora_spread or not full_spread or not lora_spread.mean or not full_spread.mean:
            continue
        lora_range = _cost_range(lora, field, lora_spread)
        full_range = _cost_range(full, field, full_spread)
        side = _cheaper_side(lora_range, full_range)
        if side == 0:
            relation = "they are about equal"
        elif side > 0:
            relation = f"full takes {words.times(full_spread.mean / lora_spread.mean)} as much"
        else:
            relation = f"{method} takes {words.times(lora_spread.mean / full_spread.mean)} as much"
        figures = f"{show(lora_spread.mean)} with {method}, {show(full_spread.mean)} in full"
        costs.append(CostComparison(name, side, f"{title}: {figures}; {relation}."))
    lora_spread = lora.spread_of("forgotten")
    full_spread = full.spread_of("forgotten")
    if lora_spread and full_spread:
        lora_range = (lora_spread.low, lora_spread.high)
        full_range = (full_spread.low, full_spread.high)
        side = _cheaper_side(lora_range, full_range)
        sentence = (
            f"Forgetting: the loss outside the task changes by {lora_spread.mean:+.2g} with "
            f"{method} and by {full_spread.mean:+.2g} in full."
        )
        costs.append(CostComparison("forgetting", side, sentence))
    return tuple(costs)


def is_cheaper(costs: Sequence[CostComparison]) -> bool:
    """Returns True if the adapter is ahead in memory or in time, and behind in neither."""
    sides = [cost.side for cost in costs if cost.name in _DECIDING_COSTS]
    return any(side > 0 for side in sides) and all(side >= 0 for side in sides)


def knows_costs(costs: Sequence[CostComparison]) -> bool:
    """Returns True if memory or time of a step was measured for both arms."""
    return any(cost.name in _DECIDING_COSTS for cost in costs)


def cost_clause(method: str, costs: Sequence[CostComparison]) -> str:
    """Returns a headline's clause about the costs in which a method is ahead or behind.

    Args:
      method: the adapter's method, in words.
      costs: its costs beside those of full fine-tuning.

    Returns:
      The clause; "" where no cost is told apart.
    """
    smaller_costs = [cost.name for cost in costs if cost.side > 0]
    larger_costs = [cost.name for cost in costs if cost.side < 0]
    phrases: list[str] = []
    if smaller_costs:
        phrases.append(f"ahead in {_join_names(smaller_costs)}")
    if larger_costs:
        phrases.append(f"behind in {_join_names(larger_costs)}")
    return f"{method} is {' and '.join(phrases)}" if phrases else ""


def _cost_range(row: ArmRow, field: str, seed_spread: Spread) -> tuple[float, float]:
    """Returns the lowest and highest cost: a step's time over steps, any other cost over seeds."""
    if field == "step_seconds":
        low_seconds = row.mean("step_seconds_low")
        high_seconds = row.mean("step_seconds_high")
        if low_seconds is not None and high_seconds is not None:
            return low_seconds, high_seconds
    return seed_spread.low, seed_spread.high


def _cheaper_side(lora_range: tuple[float, float], full_range: tuple[float, float]) -> int:
    """Returns 1 if the adapter's range is below full fine-tuning's, -1 if it is above, else 0."""
    lora_low, lora_high = lora_range
    full_low, full_high = full_range
    if lora_high < full_low:
        return 1
    return -1 if full_high < lora_low else 0


def _join_names(names: Sequence[str]) -> str:
    """Returns names as an enumeration: "memory, time and files"."""
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} and {names[-1]}"
