"""PEFT on torch under ``torch.compile``."""

from pathlib import Path

from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.contenders.on_torch import Program
from tests.benchmarks.peers.contenders.peft_eager import wrap


def make(case: Case, base: Path, adapter: Path) -> Program:
    return Program(case, base, adapter, wrap, compiled=True)
