"""Full fine-tuning in JAX, from W + s·AB on, so that it starts from the same function as LoRA."""

from pathlib import Path
from typing import Any

import jax

from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.contenders import naive
from tests.benchmarks.peers.contenders.on_jax import Method, Program, plain


def method(case: Case, model: Any, params: Any, adapter: Path) -> Method:
    """Returns the model; all of its parameters train."""
    start = naive.method(case, model, params, adapter)
    merged = jax.jit(start.params)(start.train, start.frozen)
    return Method(merged, {}, lambda train, _: train, plain)


def make(case: Case, base: Path, adapter: Path) -> Program:
    return Program(case, base, adapter, method)
