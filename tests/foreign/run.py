"""Runs the cases of an environment in its own interpreter.

``python -m tests.foreign.run FILE ENVIRONMENT [LIBRARY …]`` writes a JSON object a line into FILE:
what is installed, then one case each.
"""

import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from tests.foreign.case import Case
from tests.foreign.registry import ENVIRONMENTS, Environment, cases_of


def versions(environment: Environment) -> dict[str, str]:
    """Returns the releases of Python, JAX, Flax and the environment's own packages."""
    found = {"Python": platform.python_version()}
    for name in dict.fromkeys(("jax", "flax", *environment.shown)):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def row(case: Case) -> dict[str, Any]:
    """Returns a case's row: figures, or what went wrong."""
    from tests.foreign.judge import judged

    start = time.process_time()
    try:
        verdict = judged(case)
    except Exception as error:  # of any library; the row says it
        return {"case": case.name, "error": f"{type(error).__name__}: {error}"}
    found = {"weights": len(verdict.paths), "merges": len(verdict.merges)}
    seconds = time.process_time() - start
    return {"case": case.name, **found, "errors": verdict.errors, "cpu_seconds": seconds}


def main(output: str, name: str, *libraries: str) -> None:
    """Writes the rows of an environment's cases, of some libraries or of all."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    environment = next(e for e in ENVIRONMENTS if e.name == name)
    with Path(output).open("w") as file:
        print(json.dumps(versions(environment)), file=file, flush=True)
        for case in cases_of(environment):
            if not libraries or case.library in libraries:
                print(json.dumps(row(case)), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
