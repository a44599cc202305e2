"""The memory of this process."""

import resource
import sys
from pathlib import Path


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
