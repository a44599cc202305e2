"""The code that a model runs by, where torch is not installed."""

import json

import pytest

from train.console.errors import UserError
from train.run import model_code
from train.run.model_code import OURS, TORCH, code_of


def test_a_model_for_torch_names_the_packages_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(model_code, "_PACKAGES", ("no_torch", "no_torchax", "transformers"))
    file = tmp_path / "config.json"
    remedy = "no_torch and no_torchax.*pip install 'lora_jax\\[torch\\]'"
    file.write_text(json.dumps({"model_type": "starcoder2"}))
    with pytest.raises(UserError, match=f"describes a starcoder2.*{remedy}"):
        code_of(tmp_path, None)
    text = {"model_type": "gemma4_text", "enable_moe_block": True}
    for fields in (text, {"model_type": "gemma4", "text_config": text}):
        file.write_text(json.dumps(fields))
        with pytest.raises(
            UserError, match=f"describes a gemma4.* with enable_moe_block.*{remedy}"
        ):
            code_of(tmp_path, None)
        file.write_text(json.dumps(fields | {"text_config": {}, "enable_moe_block": False}))
        assert code_of(tmp_path, None) == OURS
    for kind in ("llama", "unheard-of"):
        file.write_text(json.dumps({"model_type": kind}))
        assert code_of(tmp_path, "auto") == OURS
    with pytest.raises(UserError, match=f"--model-code torch needs {remedy}"):
        code_of(tmp_path, TORCH)
