"""PEFT on torch, as it runs by default."""

from pathlib import Path
from typing import Any

import peft

from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.contenders.on_torch import Program


def wrap(model: Any, adapter: Path) -> Any:
    """Returns PEFT's model with the adapter, which trains."""
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)


def make(case: Case, base: Path, adapter: Path) -> Program:
    return Program(case, base, adapter, wrap)
