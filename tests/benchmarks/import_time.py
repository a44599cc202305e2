"""Measures `import lora_jax` in fresh processes, beside `import jax`, which it stands on.

    python tests/benchmarks/import_time.py

Medians of processes that take turns; seconds of the import statement alone, and of the whole
process.
"""

import statistics
import subprocess
import sys
import time

ROUNDS = 9
NAMES = ("jax", "optax", "lora_jax")  # optax is a dependency of the core, so part of the least cost


def measure(name: str) -> tuple[float, float]:
    """(seconds of the import, seconds of the process), once."""
    code = (
        "import time; began = time.perf_counter();"
        f"import {name}; print(time.perf_counter() - began)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout), time.perf_counter() - began


def main() -> None:
    for name in NAMES:  # files into the page cache, bytecode onto the disk
        measure(name)
    rounds = [{name: measure(name) for name in NAMES} for _ in range(ROUNDS)]
    medians = {
        name: [statistics.median(each[name][i] for each in rounds) for i in (0, 1)]
        for name in NAMES
    }
    for name, (statement, process) in medians.items():
        ratios = (statement / medians["jax"][0], process / medians["jax"][1])
        print(
            f"import {name:8s}  {statement:.2f} s ({ratios[0]:.2f}x jax)"
            f"   process {process:.2f} s ({ratios[1]:.2f}x)"
        )


if __name__ == "__main__":
    main()
