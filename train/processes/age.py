"""The time since this process began, imports among it."""

import os
import time
from pathlib import Path

_STATUS = Path("/proc/self/stat")
_BEGIN = 19  # the place of the begin among the fields after the program's name, in clock ticks


def process_age() -> float:
    """Returns the seconds since this process began; 0.0 where the system is not Linux."""
    try:
        fields = _STATUS.read_text().rpartition(")")[2].split()
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, AttributeError):
        return 0.0
    return max(0.0, now - int(fields[_BEGIN]) / os.sysconf("SC_CLK_TCK"))
