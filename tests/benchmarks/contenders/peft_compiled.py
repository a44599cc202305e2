"""PEFT on torch under ``torch.compile``."""

from pathlib import Path

from tests.benchmarks.cases import Case
from tests.benchmarks.contenders.on_torch import Program
from tests.benchmarks.contenders.peft_eager import wrap


def make(case: Case, base: Path, adapter: Path) -> Program:
    return Program(case, base, adapter, wrap, compiled=True)
