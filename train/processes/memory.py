"""The memory of this process, and of its devices."""

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax


def peak_bytes() -> int:
    """Returns the peak resident memory of this process, in bytes.

    On Linux the peak is VmHWM. `ru_maxrss` is not usable there: a process inherits the value
    of its parent process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        kilobytes = fields["VmHWM"].split()[0]
        return int(kilobytes) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak_bytes(devices: Iterable[Any]) -> int | None:
    """Returns the peak memory of the fullest device; None if a device does not report it.

    It is the peak since this process started. A CPU reports none.

    Args:
      devices: devices of this process.
    """
    peaks: list[int] = []
    for device in devices:
        try:
            peaks.append(int(device.memory_stats()["peak_bytes_in_use"]))
        except (AttributeError, KeyError, TypeError, jax.errors.JaxRuntimeError):
            return None
    return max(peaks, default=None)


def reset_peak() -> None:
    """Sets the peak to the present size, without freed memory, on Linux; elsewhere it stays."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
