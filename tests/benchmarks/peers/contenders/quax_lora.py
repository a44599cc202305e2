"""quax: LoraArrays in the place of kernels, and ``quaxify`` around the same Flax model."""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from quax.examples.lora import LoraArray

from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.contenders.on_jax import Method, Program, read_adapter, with_leaves


def method(case: Case, model: Any, params: Any, adapter: Path) -> Method:
    """Returns the model under ``quaxify``. LoraArray has no alpha: s multiplies B before."""
    factors, trained, scale = read_adapter(adapter)
    train = {path: {"a": jnp.asarray(a), "b": jnp.asarray(b)} for path, (a, b) in factors.items()}
    train |= {path: {"value": jnp.asarray(value)} for path, value in trained.items()}

    def wrapped(train: Any, frozen: Any) -> Any:
        def change(path: str, w: Any) -> Any:
            if path not in train:
                return w
            if "value" in train[path]:
                return train[path]["value"]
            array = LoraArray(w, rank=case.rank, key=jax.random.key(0))
            values = (train[path]["a"], scale * train[path]["b"])
            return eqx.tree_at(lambda one: (one.a, one.b), array, values)

        return with_leaves(frozen, change)

    return Method(train, params, wrapped, lambda model: quax.quaxify(model.apply))


def make(case: Case, base: Path, adapter: Path) -> Program:
    return Program(case, base, adapter, method)
