"""The base alone, by transformers on torch."""

from pathlib import Path

from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.contenders.on_torch import Program


def make(case: Case, base: Path, adapter: Path) -> Program:
    return Program(case, base, adapter, lambda model, _: model)
