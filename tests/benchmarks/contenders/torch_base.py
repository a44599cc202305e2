"""The base alone, by transformers on torch."""

from pathlib import Path

from tests.benchmarks.cases import Case
from tests.benchmarks.contenders.on_torch import Program


def make(case: Case, base: Path, adapter: Path) -> Program:
    return Program(case, base, adapter, lambda model, _: model)
