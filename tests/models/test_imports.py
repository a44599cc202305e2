"""What importing the models costs, and what they may know."""

import ast
import subprocess
import sys
from pathlib import Path

from lora_jax import models

FILES = sorted(Path(models.__file__).parent.rglob("*.py"))
OPTIONAL = {"transformers", "tokenizers", "datasets", "torch", "huggingface_hub", "gguf"}


def test_optional_packages_are_imported_when_needed() -> None:
    program = f"import sys, lora_jax.models; print(*({OPTIONAL!r} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


def test_models_know_nothing_of_lora() -> None:
    imported = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    ours = {name for name in imported if name.split(".")[0] == "lora_jax"}
    assert len(ours) > 5
    below = ("lora_jax.folders", "lora_jax.hf", "lora_jax.models")
    assert all(name.startswith(below) for name in ours)
