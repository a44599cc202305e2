"""lora_jax's adapter merged into the base before the program runs, as for inference."""

from pathlib import Path
from typing import Any

import jax

import lora_jax as lj
import lora_jax.peft
from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.contenders.on_jax import Method, Program, plain


def method(case: Case, model: Any, params: Any, adapter: Path) -> Method:
    """Returns the model, on W + s·AB."""
    tree = jax.jit(lj.merge)(lj.peft.load(adapter, model, params))
    return Method({}, tree, lambda _, frozen: frozen, plain)


def make(case: Case, base: Path, adapter: Path) -> Program:
    return Program(case, base, adapter, method)
