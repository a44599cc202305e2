"""The longest row, or the largest batch, that fits: found by compiling, in few steps.

What a step needs grows about linearly with either, so that two plans tell where the next should be.
"""

from collections.abc import Callable

from train.plan.compile import Plan

_EXACT = 64  # the result is within one part of so many


def largest_fit(
    plan_of: Callable[[int], Plan], first: int, unit: int, limit: int, share: float
) -> int | None:
    """Returns the largest size that fits into a share of the memory; None if even a unit does not.

    Args:
      plan_of: makes the plan of a size.
      first: the size to begin with.
      unit: sizes are multiples of it.
      limit: the largest size that there is.
      share: the share of a device's memory.

    Returns:
      The size, within a unit or a 64th of it.
    """
    limit -= limit % unit
    size = min(limit, max(unit, first - first % unit))
    if limit < unit:
        return None
    fit, over = 0, limit + unit  # the largest that fits, the smallest that does not
    totals: dict[int, int] = {}
    over_before = False
    while True:
        made = plan_of(size)
        total = made.per_chip_bytes["total"]
        if total is not None:
            totals[size] = total
        if made.fits_share[f"{share:g}"]:
            fit = size
        else:
            over = size
        step = max(unit, fit // _EXACT // unit * unit)
        if over - fit <= step:
            return fit or None
        capacity = share * (made.per_chip_bytes["capacity"] or 0)
        guess = _where(totals, capacity) if len(totals) > 1 else None
        if guess is None or (over_before and size == over):  # a curve leads the line astray
            guess = 2 * fit if over > limit else (fit + over) // 2
        elif size == fit and guess < fit + step:
            guess = fit + step  # the one before it fits: does the next?
        over_before = size == over
        size = min(over - unit, max(fit + unit, int(guess) // unit * unit))


def _where(totals: dict[int, int], capacity: float) -> float | None:
    """Returns the size at which a line through the two nearest plans meets the capacity."""
    (one, low), (other, high) = sorted(
        sorted(totals.items(), key=lambda item: abs(item[1] - capacity))[:2]
    )
    return one + (other - one) * (capacity - low) / (high - low) if high > low else None
