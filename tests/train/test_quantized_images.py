"""Models with images over a base in codes, through the whole scripts."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.core.paths import flatten_with_paths
from lora_jax.quantized import dequantize, is_coded
from tests.support import thorough
from tests.train import tiny_qwen_vl, tiny_smolvlm
from train.export.__main__ import main as export
from train.generate.__main__ import main as generate
from train.run.log import read_metrics
from train.sft import main

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
OPTIONS = ["--batch-size", 4, "--rank", 4, "--lr", 1e-2, "--seq-len", 512, "--log-every", 1]
OPTIONS += ["--schedule", "constant", "--warmup", 1, "--targets", "all-linear", "--steps", 2]
WRITERS = {"qwen": tiny_qwen_vl.write_qwen_vl, "smolvlm": tiny_smolvlm.write_smolvlm}


@pytest.mark.parametrize(
    ("family", "quantize"), [("qwen", "nf4"), pytest.param("smolvlm", "int8", marks=thorough)]
)
def test_codes_train_answer_and_merge_as_their_values(
    family: str, quantize: str, tmp_path: Path
) -> None:
    """A run over codes is that over the values for which they stand, and so are its answers."""
    folder, images = tmp_path / "model", {"images": True} if family == "qwen" else {}
    WRITERS[family](folder)
    tiny_smolvlm.write_rows(tmp_path / "rows", 8)
    model, floats = models.from_pretrained(folder, **images)
    _, coded = models.from_pretrained(folder, quantize=quantize, **images)
    values, exact = dequantize(coded), dict(flatten_with_paths(floats)[0])
    models.save_pretrained(tmp_path / "values", model, values, tokenizer=folder)
    leaves = dict(flatten_with_paths(coded, is_leaf=is_coded)[0])
    paths = [path for path, leaf in leaves.items() if is_coded(leaf)]
    assert {"visual" in p or "vision_model" in p for p in paths} == {True, False}
    assert all(np.any(dict(flatten_with_paths(values)[0])[p] != exact[p]) for p in paths)

    def run(name: str, base: Path, *args: Any) -> list[float]:
        given = ["--model", base, "--dataset", tmp_path / "rows" / "rows.jsonl", *OPTIONS, *args]
        main([*map(str, given), "--output", str(tmp_path / name)])
        return [line["loss"] for line in read_metrics(tmp_path / name)]

    losses = run("codes", folder, "--quantize", quantize)
    np.testing.assert_allclose(losses, run("floats", tmp_path / "values"), rtol=1e-5)
    tree = lj.load_adapter(tmp_path / "codes" / "adapter", coded)
    export(["--adapter", str(tmp_path / "codes"), "--merged", "--output", str(tmp_path / "merged")])
    _, merged = models.from_pretrained(tmp_path / "merged", **images)
    jax.tree.map(np.testing.assert_array_equal, merged, dequantize(lj.merge(tree)))
    image = next((tmp_path / "rows").glob("*.png"))

    def answer(*args: Any) -> str:
        given = [*args, "--prompt", "colour?", "--image", image, "--max-new-tokens", 8]
        generate([*map(str, (*given, "--output", tmp_path / "said.jsonl", "--overwrite"))])
        said: str = json.loads((tmp_path / "said.jsonl").read_text())["answer"]
        return said

    said = answer("--adapter", tmp_path / "codes")
    assert said and said == answer("--model", tmp_path / "merged")
