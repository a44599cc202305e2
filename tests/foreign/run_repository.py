"""Runs the models of a repository in its own interpreter.

``python -m tests.foreign.run_repository FILE NAME CHECKOUT`` writes a JSON object a line into FILE:
the versions, then one model each.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from tests.foreign.absent import leave_out
from tests.foreign.repositories import REPOSITORIES
from tests.foreign.repository import Model
from tests.foreign.run import versions


def row(model: Model) -> dict[str, Any]:
    """Returns the figures of a model, or what went wrong."""
    import jax

    import lora_jax as lj
    from tests.foreign.judge import measured

    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with jax.numpy_dtype_promotion("standard"):
                made = model.make()
                fn, params, args, rules, _ = made
                reasons = lj.left_out(params, rules, trace=(fn, params, *args))
            verdict = measured(made, eagerly=False)
    except Exception as error:  # of any repository; the page says it
        return {"model": model.name, "error": f"{type(error).__name__}: {error}"}
    return {
        "model": model.name,
        "kernels": sorted(verdict.paths),
        "left_out": reasons,
        "merges": verdict.merges,
        "errors": verdict.errors,
        "cpu_seconds": time.process_time() - start,
    }


def main(output: str, name: str, checkout: str) -> None:
    """Writes the rows of a repository's models."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    repository = next(r for r in REPOSITORIES if r.name == name)
    leave_out(repository.absent)
    sys.path.insert(0, str(Path(checkout) / repository.source))
    with Path(output).open("w") as file:
        print(json.dumps(versions(repository.environment)), file=file, flush=True)
        repository.prepare()
        for model in repository.models:
            print(json.dumps(row(model)), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
