"""The machine and the versions that figures belong to."""

import datetime
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "flax", "optax", "qwix", "quax", "torch", "transformers", "peft", "unsloth")
BUSY = 0.3  # load average from which on the machine is not idle

# Published dense bf16 peaks in FLOP/s, by a part of the device's name.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def peak_of(device_kind: str) -> float | None:
    """Returns a device's peak in bf16, FLOP/s; None if it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device_kind), None)


def has_gpu() -> bool:
    """Returns True if NVIDIA's driver lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and "GPU" in done.stdout


def describe() -> dict[str, Any]:
    """Returns the machine, the versions, the checkout's commit and the date."""
    versions = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": versions,
        "commit": _commit(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def warnings(machine: dict[str, Any]) -> list[str]:
    """Returns what speaks against the figures of this run."""
    found = []
    if machine["load_average"] > BUSY:
        found.append(
            f"the machine is not idle (load average {machine['load_average']}): times, and less so "
            "their ratios, will be off"
        )
    if machine["xla_flags"]:
        found.append(f"XLA_FLAGS is set ({machine['xla_flags']}): JAX may not be at its best")
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Returns the checkout's commit, with "+" if files were changed; "" outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    if head.returncode:
        return ""
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"],
        capture_output=True,
        text=True,
        check=False,
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
