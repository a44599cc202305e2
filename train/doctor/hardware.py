"""Finds the accelerators that the system reports, without JAX and its plugins."""

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_NVIDIA = ("dev/nvidia0", "dev/nvidiactl", "dev/dxg")  # a machine's, a container's, WSL's
_GOOGLE = "0x1ae0"  # the vendor of TPUs on the PCI bus
# The devices of Google's that are TPUs (jax/_src/hardware_utils.py).
_TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
_SECONDS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """The accelerators that the system has.

    Attributes:
      nvidia: whether NVIDIA's driver shows a device.
      driver: the version of that driver; None where it is not known.
      cards: each GPU as `nvidia-smi` describes it: its name, memory, and memory in use.
      tpus: the number of TPU chips.
      tpu_holders: processes that hold a TPU open, by their numbers, as far as this user sees them.
    """

    nvidia: bool = False
    driver: str | None = None
    cards: tuple[str, ...] = ()
    tpus: int = 0
    tpu_holders: tuple[int, ...] = ()


def find_hardware(root: Path = Path("/")) -> Hardware:
    """Returns the accelerators of this machine.

    Args:
      root: the folder of `dev`, `proc` and `sys`.
    """
    driver, cards = _ask_nvidia_smi() if root == Path("/") else (None, ())
    return Hardware(
        nvidia=any((root / name).exists() for name in _NVIDIA),
        driver=driver or _driver(root),
        cards=cards,
        tpus=sum(_is_tpu(path) for path in root.glob("sys/bus/pci/devices/*/vendor")),
        tpu_holders=tuple(_holders(root)),
    )


def _driver(root: Path) -> str | None:
    match = re.search(r"\b(\d{3}\.[\d.]+)\b", _read(root / "proc/driver/nvidia/version"))
    return match and match[1]


def _ask_nvidia_smi() -> tuple[str | None, tuple[str, ...]]:
    """Returns the driver's version and the cards; (None, ()) if `nvidia-smi` gives no answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None, ()
    fields = "driver_version,name,memory.total,memory.used"
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None, ()
    rows = [line.split(", ") for line in ended.stdout.splitlines() if line.count(", ") == 3]
    if ended.returncode or not rows:
        return None, ()
    return rows[0][0], tuple(f"{name} ({total}, {used} used)" for _, name, total, used in rows)


def _is_tpu(vendor: Path) -> bool:
    return _read(vendor) == _GOOGLE and _read(vendor.with_name("device")) in _TPUS


def _holders(root: Path) -> list[int]:
    """Returns the processes that have opened a TPU's device or libtpu's lock file."""
    holders = set()
    for process in root.glob("proc/[0-9]*"):
        for file in _open_files(process):
            if re.search(r"/dev/(accel|vfio/)\d+$|/libtpu_lockfile$", file):
                holders.add(int(process.name))
    return sorted(holders)


def _open_files(process: Path) -> Iterator[str]:
    """Yields the files that a process has open; none if they cannot be listed."""
    with suppress(OSError):
        for link in (process / "fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                yield str(link.readlink())


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
