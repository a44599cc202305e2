"""Naive LoRA in JAX: W + s·AB is formed in every step, and differentiated with respect to A, B."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.contenders.on_jax import (
    Method,
    Program,
    plain,
    read_adapter,
    with_leaves,
)


def method(case: Case, model: Any, params: Any, adapter: Path) -> Method:
    """Returns the model on W + s·AB, formed inside of the step."""
    factors, trained, scale = read_adapter(adapter)
    train = {path: {"a": jnp.asarray(a), "b": jnp.asarray(b)} for path, (a, b) in factors.items()}
    train |= {path: {"value": jnp.asarray(value)} for path, value in trained.items()}

    def merged(train: Any, frozen: Any) -> Any:
        def change(path: str, w: Any) -> Any:
            if path not in train:
                return w
            if "value" in train[path]:
                return train[path]["value"]
            return w + (scale * (train[path]["a"] @ train[path]["b"])).astype(w.dtype)

        return with_leaves(frozen, change)

    return Method(train, params, merged, plain)


def make(case: Case, base: Path, adapter: Path) -> Program:
    return Program(case, base, adapter, method)
