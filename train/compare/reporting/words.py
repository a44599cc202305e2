"""Formats arms and figures as text for tables, pictures and sentences."""

import math
from collections.abc import Iterable

from train.compare.options import METHODS
from train.compare.result import Arm

NOTHING = "–"  # in the place of a figure that was not measured
_SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def method(name: str) -> str:
    """Returns the usual name of a method."""
    return METHODS[name].name if name in METHODS else name


def family(arm: Arm, others: Iterable[Arm] = ()) -> str:
    """Returns an arm's name without rank, dimension and rate: "LoRA", or "LoRA on mlp"."""
    name = method(arm.method)
    if arm.targets and len({other.targets for other in others if other.targets}) > 1:
        name += f" on {' '.join(arm.targets)}"
    return name


def adapter(arm: Arm, others: Iterable[Arm] = ()) -> str:
    """Returns an arm's name without its learning rate: "LoRA r=8 on q_proj v_proj".

    Args:
      arm: the arm.
      others: arms beside which it is named; only what differs among them is said.
    """
    name = method(arm.method)
    adapted = [other for other in others if other.rank is not None]
    if arm.rank is not None:
        name += f" r={arm.rank}"
        if len({other.targets for other in adapted}) > 1:
            name += f" on {' '.join(arm.targets or ())}"
        scales = {(other.alpha or 0.0) / (other.rank or 1) for other in adapted}
        if len(scales) > 1 and arm.alpha is not None:
            name += f" α={arm.alpha:g}"
    if arm.dimension is not None:
        name += f" d={arm.dimension:,}"
    if len({other.batch_size for other in others}) > 1:
        name += f" batch {arm.batch_size}"
    return name


def label(arm: Arm, others: Iterable[Arm] = ()) -> str:
    """Returns the name of an arm: "LoRA r=8, lr 0.001"; see `adapter`."""
    return f"{adapter(arm, others)}, lr {arm.learning_rate:g}"


def figure(value: float | None, digits: int = 3) -> str:
    """Returns a number with a number of significant digits."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not finite"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded number
    if not -5 <= exponent < 7:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def rough(value: float | None) -> str:
    """Returns a spread or a ratio: a number with two significant digits."""
    return figure(value, 2)


def beside(value: float | None, spread: float | None) -> str:
    """Returns a number with as many decimals as `rough` gives its spread."""
    if value is None or not math.isfinite(value) or not spread or not math.isfinite(spread):
        return figure(value)
    decimals = len(rough(spread).partition(".")[2])
    return f"{value:.{decimals}f}"


def count(value: float | None) -> str:
    """Returns a whole number with commas between thousands: "1,234"."""
    return NOTHING if value is None else f"{value:,.0f}"


def short_count(value: float) -> str:
    """Returns a whole number for a tick of an axis: "200", "10k", "5M"."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def size(n_bytes: float | None) -> str:
    """Returns bytes in decimal units: "20 MB"."""
    if n_bytes is None:
        return NOTHING
    for unit, name in _SIZES:
        if n_bytes >= unit * 0.995:
            return f"{_two_digits(n_bytes / unit)} {name}"
    return f"{n_bytes:.0f} bytes"


def seconds(value: float | None) -> str:
    """Returns a time: "12 ms", "1.5 s", "3.2 h"."""
    if value is None:
        return NOTHING
    if value < 0.9995:
        return f"{_two_digits(value * 1e3)} ms"
    if value < 600:
        return f"{_two_digits(value)} s"
    return f"{_two_digits(value / 60)} min" if value < 7200 else f"{_two_digits(value / 3600)} h"


def times(ratio: float) -> str:
    """Returns a ratio as text: "1.2 times"."""
    return f"{_two_digits(ratio)} times"


def _two_digits(value: float) -> str:
    """Returns a number with two significant digits; a large number without decimals."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else rough(value)


def capital(text: str) -> str:
    """Returns text with a capital first letter."""
    return text[:1].upper() + text[1:]
