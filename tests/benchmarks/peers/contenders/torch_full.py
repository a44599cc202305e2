"""Full fine-tuning on torch, from W + s·AB on, so that it starts from the same function as LoRA."""

from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.contenders.on_torch import Program
from tests.benchmarks.peers.inputs import read_peft


def wrap(model: Any, adapter: Path) -> Any:
    """Returns the model with the adapter merged into its weights, all of which train."""
    pairs, trained, scale = read_peft(adapter)
    with torch.no_grad():
        for module, (a, b) in pairs.items():
            weight = model.get_submodule(module).weight
            delta = scale * torch.from_numpy(b) @ torch.from_numpy(a)
            weight += delta.to(weight.device, weight.dtype)
        for name, value in trained.items():
            model.get_parameter(name).copy_(torch.from_numpy(value))
    return model


def make(case: Case, base: Path, adapter: Path) -> Program:
    return Program(case, base, adapter, wrap)
