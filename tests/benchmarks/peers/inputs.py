"""The inputs that all contenders share; without JAX or torch, which some of them do not import."""

import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from tests.benchmarks.peers.cases import Case

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def rng_of(name: str) -> np.random.Generator:
    """Returns a generator that depends on the name alone."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def base_folder(case: Case, root: Path) -> Path:
    """Returns the folder of a case's model."""
    return root / f"{case.model} {case.dtype}".replace(" ", "-")


def adapter_folder(case: Case, root: Path) -> Path:
    """Returns the folder of a case's adapter, beside that of its model."""
    name = f"{base_folder(case, root).name}-{case.targets}-r{case.rank}-{case.alpha}"
    return root / name


def data_of(case: Case, vocab_size: int) -> dict[str, np.ndarray]:
    """Draws tokens, [batch, seq] int32; of texts, masks (padded on the right) and labels too."""
    rng = rng_of("data")
    shape = (case.batch, case.seq)
    data = {"ids": rng.integers(0, vocab_size, shape).astype(np.int32)}
    if case.kind == "classify":
        lengths = rng.integers(case.seq // 2, case.seq + 1, (case.batch, 1))
        data["mask"] = (np.arange(case.seq) < lengths).astype(np.int32)
        data["labels"] = rng.integers(0, 2, case.batch).astype(np.int32)
    return data


class Pair(NamedTuple):
    """PEFT's A, [r, in], and B, [out, r], of one module."""

    a: np.ndarray
    b: np.ndarray


def read_peft(folder: Path) -> tuple[dict[str, Pair], dict[str, np.ndarray], float]:
    """Returns (module -> A and B, parameter -> trained array, alpha / r)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
    pairs = {
        name.removesuffix(_A): Pair(value, tensors[name.removesuffix(_A) + _B])
        for name, value in tensors.items()
        if name.endswith(_A)
    }
    trained = {name: value for name, value in tensors.items() if ".lora_" not in name}
    return pairs, trained, config["lora_alpha"] / config["r"]
