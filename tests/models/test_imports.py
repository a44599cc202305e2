"""Each folder of models knows only those below it."""

import ast
from pathlib import Path

import pytest

from lora_jax import hf, models

# What the files of a folder may import, of this package: what lies below it, and itself.
_MODELS = ("layers", "causal", "fields", "key_rows", "specs")
SHARED = ("core.types", "hf", *(f"models.{name}" for name in _MODELS))
BELOW = {
    "hf": ("buckets", "core.paths", "core.types", "folders", "hf", "quantized"),
    "models/layers": ("core.extend", "core.names", "core.types", "models.layers"),
    "models/decoder": (
        *SHARED,
        *("core.extend", "core.names", "core.routed", "core.turns", "models.decoder"),
    ),
    "models/encoder": (*SHARED, "models.encoder"),
    "models/vision": (*SHARED, "models.vision"),
    "models/smolvlm": (*SHARED, "models.decoder", "models.smolvlm"),
    "models/qwen_vl": (*SHARED, "models.decoder", "models.qwen_vl"),
    "models/gpt2": (*SHARED, "models.gpt2"),
    "models": ("buckets", "core.types", "folders", "hf", "models", "quantized"),
}


@pytest.mark.parametrize("folder", BELOW)
def test_imports_go_downward_and_models_know_nothing_of_lora(folder: str) -> None:
    imported = set()
    files = sorted((Path(models.__file__).parents[1] / folder).glob("*.py"))
    assert len(files) >= 4 and Path(hf.__file__).parents[1] == Path(models.__file__).parents[1]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    ours = {name for name in imported if name.split(".")[0] == "lora_jax"}
    allowed = tuple(f"lora_jax.{name}" for name in BELOW[folder])
    beyond = {
        n for n in ours if n not in allowed and not n.startswith(tuple(f"{a}." for a in allowed))
    }
    assert ours and not beyond
