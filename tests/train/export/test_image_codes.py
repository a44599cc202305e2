"""A Qwen3.5 in FP8 with its encoder of images: its codes stay, and its processors go with it."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from lora_jax.models import key_table, read_config, save_pretrained
from lora_jax.quantized import is_coded
from tests.hf import shipped
from tests.hf.test_save_codes import contents
from tests.models import tiny, tiny_qwen_vl
from train.export.base import keep_codes
from train.run.pretrained import read_model, read_untokenized

PROCESSORS = ["preprocessor_config.json", "video_preprocessor_config.json"]


@pytest.mark.slow
def test_codes_and_processors_stay(tmp_path: Path) -> None:
    fields, rng = tiny_qwen_vl.fields(), np.random.default_rng(3)
    rows = key_table(read_config(fields, images=True))
    tensors = {name: tiny.draw(rng, name, r.hf_shape) for r in rows for name in r.hf_names}
    folder, out = tmp_path / "in", tmp_path / "out"
    shipped.ship(folder, fields, tensors, "compressed fp8 rows")
    for name in (*PROCESSORS, "tokenizer.json"):
        (folder / name).write_text(json.dumps({"name": name}))
    outline = read_untokenized(str(folder)).with_images()
    again = outline.quantized("stored")  # as an adapter says it
    assert again.head == outline.head == {"images": True, "quantize": "stored"}
    assert jax.tree.structure(again.params) == jax.tree.structure(outline.params)
    model, params = read_model(str(folder), dtype="float32", **again.head)
    mlp = params["model"]["language_model"]["layers"]["0of2"]["mlp"]
    assert is_coded(mlp["up_proj"]["kernel"])
    kept, source, _ = keep_codes(params, model, str(folder), "stored")
    assert source == str(folder)
    save_pretrained(out, model, kept, codes_from=source, tokenizer=str(folder))
    assert contents(out) == contents(folder)
    for name in PROCESSORS:
        assert json.loads((out / name).read_text()) == {"name": name}
