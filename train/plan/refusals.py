"""The messages of a compiler that refuses a step for want of memory."""

import re

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def refused_bytes(message: str, held: dict[str, int], capacity: int) -> dict[str, int | None]:
    """Returns the memory that the compiler's refusal names, with the bytes `held` by arguments."""
    temporaries = total = None
    if found := re.search(r"HLO temporaries \((\d[\d.]*[KMGT]?)\)", message):
        temporaries = _bytes(found[1])
        total = temporaries + sum(held.values())
    elif found := re.search(r"[Uu]sed (\d[\d.]*[KMGT]?) of \d[\d.]*[KMGT]? hbm", message):
        total = _bytes(found[1])
        temporaries = total - sum(held.values())
    return {
        **held,
        "temporaries": temporaries,
        "other": None,
        "total": total,
        "capacity": capacity,
        "host": None,
    }


def _bytes(text: str) -> int:
    """Parses a size such as "48.3G" into bytes."""
    number = text.rstrip("KMGT")
    return round(float(number) * _UNITS[text[len(number) :]])


def reason_of(error: Exception) -> str:
    """Returns the compiler's message, without its links."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines[:2] if line and not line.startswith("See "))[:500]
