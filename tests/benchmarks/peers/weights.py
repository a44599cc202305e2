"""Writes the inputs of all contenders of a case: a model's folder, and an adapter's.

    python -m tests.benchmarks.peers.weights FOLDER < cases.json

The base lies as transformers writes it, the adapter as PEFT does. A and B are both random, so that
the first loss shows the adapter, and the adapter that full fine-tuning starts with is merged.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from lora_jax import models
from tests.benchmarks.peers.cases import SHAPES, Case
from tests.benchmarks.peers.inputs import adapter_folder, base_folder, rng_of

PRETRAINED = {
    "SmolLM2-135M": ("HuggingFaceTB/SmolLM2-135M-Instruct", {}),
    "MiniLM": (
        "sentence-transformers/all-MiniLM-L6-v2",
        {"head": "classification", "num_labels": 2},
    ),
}
_BLOCK = 1 << 22  # random numbers that are drawn; larger tensors repeat them


def write_base(case: Case, folder: Path) -> None:
    """Writes a pretrained model, or one of random weights."""
    dtype = np.dtype(getattr(ml_dtypes, case.dtype, case.dtype))
    if case.model in PRETRAINED:
        name, options = PRETRAINED[case.model]
        models.fetch(name)
        model, params = models.from_pretrained(name, **options)
    else:
        config = models.read_config(SHAPES[case.model])
        model = (models.Encoder if case.kind == "classify" else models.Decoder)(config)
        ids = jax.ShapeDtypeStruct((1, 4), np.int32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        block = rng_of("weights").standard_normal(_BLOCK, np.float32)
        block /= SHAPES[case.model]["hidden_size"] ** 0.5

        def fill(path: Any, leaf: Any) -> np.ndarray:
            if "norm" in jax.tree_util.keystr(path).lower():
                value = np.ones(leaf.shape) if path[-1].key == "scale" else np.zeros(leaf.shape)
                return value.astype(dtype)
            start = rng_of(jax.tree_util.keystr(path)).integers(_BLOCK)
            return np.resize(np.roll(block, start).astype(dtype), leaf.shape)

        params = jax.tree_util.tree_map_with_path(fill, shapes)
    models.save_pretrained(folder, model, params, dtype=dtype)


def write_adapter(case: Case, base: Path, folder: Path) -> None:
    """Writes an adapter of the modules that the case targets, as PEFT writes one."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            for key in opened.keys():
                module = key.removesuffix(".weight")
                if module == "classifier" or module == "classifier.bias":
                    tensors[f"base_model.model.{key}"] = opened.get_tensor(key)
                if module.split(".")[-1] not in case.target_modules or module == key:
                    continue
                n_out, n_in = opened.get_slice(key).get_shape()
                rng = rng_of(module)
                a = rng.uniform(-1, 1, (case.rank, n_in)) / n_in**0.5
                b = rng.standard_normal((n_out, case.rank)) * 0.02
                for name, value in (("A", a), ("B", b)):
                    key = f"base_model.model.{module}.lora_{name}.weight"
                    tensors[key] = value.astype(np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if case.kind == "classify" else "CAUSAL_LM",
        "r": case.rank,
        "lora_alpha": case.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": case.target_modules,
        "base_model_name_or_path": str(base),
    }
    if case.kind == "classify":
        config["modules_to_save"] = ["classifier"]
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "adapter_model.safetensors")


def main() -> None:
    root = Path(sys.argv[1])
    for fields in json.load(sys.stdin):
        case = Case(**fields)
        base, adapter = base_folder(case, root), adapter_folder(case, root)
        if not base.exists():
            write_base(case, base)
        if not adapter.exists():
            write_adapter(case, base, adapter)


if __name__ == "__main__":
    main()
