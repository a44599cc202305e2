"""Examines the memory of the host, the disks, and the caches."""

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.doctor.troubles import Trouble

_GIB = 2**30
_MIN_FREE_BYTES = 5 * _GIB  # of room on a disk: less than a small model's files
_SECONDS = 2.0  # to add up the sizes of a folder's files


def describe_memory(device: int | None) -> dict[str, Any]:
    """Returns the memory of a device, if it is known, and of the host."""
    host = {name: gib_text(size) for name, size in host_memory().items()}
    return {"a device": device and gib_text(device), "host": host or None}


def host_memory(file: Path = Path("/proc/meminfo")) -> dict[str, int]:
    """Returns the bytes of the host's memory, in total and available."""
    try:
        fields = dict(line.split(":", 1) for line in file.read_text().splitlines())
        total_kib = int(fields["MemTotal"].split()[0])
        free_kib = int(fields["MemAvailable"].split()[0])
        return {"in all": 1024 * total_kib, "free": 1024 * free_kib}
    except (OSError, KeyError, ValueError):
        return {}


def examine_disks(folders: Mapping[str, Path]) -> tuple[dict[str, Any], list[Trouble]]:
    """Returns the free space of folders, and the troubles with it.

    Args:
      folders: the folders by what is written there; those that do not exist would be made.
    """
    facts, troubles = {}, []
    for name, folder in folders.items():
        # Path.exists raises an error below a folder that this user may not read.
        existing = [path for path in (folder, *folder.parents) if os.path.exists(path)]
        nearest = existing[0]
        free_bytes = shutil.disk_usage(nearest).free
        facts[name] = f"{folder} ({gib_text(free_bytes)} free)"
        is_writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
        is_output = name == "output"
        if not is_writable:
            remedy = "give this user the right to write there, or use another folder"
            if not is_output:
                remedy += " (XDG_CACHE_HOME, HF_HOME)"
            troubles.append(Trouble(f"{nearest} cannot be written", remedy, fatal=is_output))
        elif free_bytes < _MIN_FREE_BYTES:
            problem = f"{nearest} only has room for {gib_text(free_bytes)} more"
            troubles.append(Trouble(problem, "make room, or use another folder", fatal=False))
    return facts, troubles


def describe_folder_size(folder: Path, seconds: float = _SECONDS) -> str:
    """Returns the size of a folder as text; a lower bound if counting takes too long."""
    if not os.path.isdir(folder):
        return "empty"
    deadline = time.monotonic() + seconds
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(parent, name))
            except OSError:  # deleted meanwhile
                continue
            total += status.st_size
        if time.monotonic() > deadline:
            return f"at least {gib_text(total)}"
    return gib_text(total)


def cache_folders(variables: Mapping[str, str]) -> dict[str, Path]:
    """Returns the folders of the caches, by their contents.

    Args:
      variables: the environment.
    """
    caches = Path(variables.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hub = Path(variables.get("HF_HOME") or caches / "huggingface").expanduser()
    ours = caches / "lora_jax"
    return {
        "compiled programs": Path(variables.get("JAX_COMPILATION_CACHE_DIR") or ours / "jax"),
        "tokens": ours / "tokens",
        "copies from buckets": ours / "buckets",
        "models": Path(variables.get("HF_HUB_CACHE") or hub / "hub").expanduser(),
        "data sets": Path(variables.get("HF_DATASETS_CACHE") or hub / "datasets").expanduser(),
    }


def gib_text(size: int) -> str:
    """Returns a number of bytes as text in GiB."""
    return f"{size / _GIB:.1f} GiB" if size >= _GIB / 10 else f"{size / 2**20:.0f} MiB"
