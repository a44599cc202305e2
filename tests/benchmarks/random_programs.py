"""Prints what random programs cover: ``python tests/benchmarks/random_programs.py [how many]``."""

import sys
from pathlib import Path

import jax
from hypothesis import HealthCheck, Phase, given, settings

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.adapt.random_programs import Program, histogram, programs


def main(n: int) -> None:
    drawn: list[Program] = []

    @settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def collect(program: Program) -> None:
        drawn.append(program)

    collect()
    with jax.enable_x64(True):
        print(histogram(drawn))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
