"""qwix: ``apply_lora_to_model`` on the same Flax model; A and B lie among its parameters."""

from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import qwix

from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.contenders.on_jax import Method, Program, read_adapter


def method(case: Case, model: Any, params: Any, adapter: Path) -> Method:
    """Returns qwix's model.

    Raises:
      ValueError: qwix adapts other kernels than the case does.
    """
    factors, trained, _ = read_adapter(adapter)
    pattern = f".*({'|'.join(case.target_modules)})"
    provider = qwix.LoraProvider(module_path=pattern, rank=case.rank, alpha=case.alpha)

    def adapted(model: Any) -> Any:
        return qwix.apply_lora_to_model(model, provider)

    ids = jnp.zeros((case.batch, case.seq), jnp.int32)
    shapes = jax.eval_shape(adapted(model).init, jax.random.key(0), ids)["params"]
    flat = flax.traverse_util.flatten_dict(shapes, sep="/")
    train = {}
    for path, (a, b) in factors.items():
        train[f"{path}_lora_a"], train[f"{path}_lora_b"] = jnp.asarray(a), jnp.asarray(b)
    asked = {path: tuple(leaf.shape) for path, leaf in flat.items() if "_lora_" in path}
    if asked != (ours := {path: value.shape for path, value in train.items()}):
        odd = sorted(asked.items() ^ ours.items())
        raise ValueError(f"qwix adapts other kernels than the case does: {odd[:4]}")
    train |= {path: jnp.asarray(value) for path, value in trained.items()}
    base = flax.traverse_util.flatten_dict(params, sep="/")
    frozen = {path: value for path, value in base.items() if path not in train}

    def together(train: Any, frozen: Any) -> Any:
        return flax.traverse_util.unflatten_dict(train | frozen, sep="/")

    return Method(train, frozen, together, lambda model: adapted(model).apply)


def make(case: Case, base: Path, adapter: Path) -> Program:
    return Program(case, base, adapter, method)
