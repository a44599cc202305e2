"""Makes the virtual environments of the table, and runs their cases in a process each."""

import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.foreign.registry import Environment, cases_of

ROOT = Path(__file__).parent.parent.parent
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "KERAS_BACKEND": "jax",
    # As in the tests: machine code that nobody runs for long need not be fast.
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
}
MINUTES = 60


class EnvironmentFailed(Exception):
    """An environment that cannot be made, or whose process ended early; says why."""


def interpreter(releases: tuple[str, ...]) -> str:
    """Returns the first Python of these releases that makes virtual environments."""
    pyenv = os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))
    for release in releases:
        installed = sorted(glob.glob(f"{pyenv}/versions/{release}*/bin/python"))
        for candidate in filter(None, [*installed, shutil.which(f"python{release}")]):
            check = [candidate, "-c", "import ensurepip, venv"]
            if subprocess.run(check, capture_output=True, check=False).returncode == 0:
                return candidate
    raise EnvironmentFailed(f"no Python of the releases {', '.join(releases)} was found")


def python_of(environment: Environment, cache: Path) -> str:
    """Returns the environment's Python; makes the environment where the cache has none.

    Args:
      environment: one without requirements is the one that this runs in.
      cache: folder of the virtual environments.

    Raises:
      EnvironmentFailed: there is no Python of its releases, or pip fails.
    """
    if not environment.requirements:
        return sys.executable
    base = interpreter(environment.python)
    wanted = f"{base} {environment.requirements} {(ROOT / 'pyproject.toml').read_text()}"
    digest = hashlib.sha256(wanted.encode()).hexdigest()[:8]
    folder = cache / f"{environment.name.replace(' ', '-')}-{digest}"
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([base, "-m", "venv", folder], check=True)
        run_command(
            [python, "-m", "pip", "install", "--quiet", "-e", ROOT, *environment.requirements]
        )
        complete.touch()
    return str(python)


def results_of(environment: Environment, libraries: list[str], cache: Path) -> list[dict[str, Any]]:
    """Returns the versions in an environment, and a row for each of its cases.

    A case that could not run, for whatever reason, has a row that says why.
    """
    cases = [c for c in cases_of(environment) if not libraries or c.library in libraries]
    cache.mkdir(parents=True, exist_ok=True)
    output = cache / f"{environment.name.replace(' ', '-')}.jsonl"
    output.unlink(missing_ok=True)
    why = "its process ended before it"
    try:
        python = python_of(environment, cache)
        run_command([python, "-m", "tests.foreign.run", output, environment.name, *libraries])
    except EnvironmentFailed as error:
        why = str(error)
    lines = output.read_text().splitlines() if output.exists() else []
    versions, *rows = map(json.loads, lines or ['{"Python": "none"}'])
    done = {row["case"]: row for row in rows}
    missing = {"weights": "", "merges": "", "error": why}
    return [versions, *(done.get(c.name, {"case": c.name, **missing}) for c in cases)]


def run_command(command: list[Any]) -> None:
    """Runs a command from this checkout; raises EnvironmentFailed with its last line."""
    try:
        done = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=os.environ | SETTINGS,
            capture_output=True,
            text=True,
            timeout=60 * MINUTES,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentFailed(f"it took longer than {MINUTES} minutes") from None
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise EnvironmentFailed(said[-1].strip() if said else f"exit code {done.returncode}")
