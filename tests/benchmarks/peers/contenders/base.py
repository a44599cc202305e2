"""The base alone, in JAX."""

from pathlib import Path
from typing import Any

from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.contenders.on_jax import Method, Program, plain


def method(case: Case, model: Any, params: Any, adapter: Path) -> Method:
    """Returns the model, on its own parameters."""
    return Method({}, params, lambda _, frozen: frozen, plain)


def make(case: Case, base: Path, adapter: Path) -> Program:
    return Program(case, base, adapter, method)
