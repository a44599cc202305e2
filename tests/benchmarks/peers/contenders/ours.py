"""lora_jax: the adapter by ``lora_jax.peft.load``, the function by ``adapt``."""

from pathlib import Path
from typing import Any

import lora_jax as lj
import lora_jax.peft
from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.contenders.on_jax import Method, Program


def method(case: Case, model: Any, params: Any, adapter: Path) -> Method:
    """Returns xW + s·(xA)B."""
    train, frozen = lj.split(lj.peft.load(adapter, model, params))
    return Method(train, frozen, lj.join, lambda model: lj.adapt(model.apply, strict=True))


def make(case: Case, base: Path, adapter: Path) -> Program:
    return Program(case, base, adapter, method)
