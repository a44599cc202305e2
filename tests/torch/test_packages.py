"""Packages that are missing, or that are installed and cannot be used."""

import importlib
import json
import sys
import types

import pytest

from lora_jax.models import ConfigError
from train.plan.__main__ import main as plan

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("torch")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

REMEDY = "pip install 'lora_jax[torch]'"


@pytest.fixture
def imported_anew(monkeypatch):
    """Forgets `lora_jax.torch`, so that it is imported again."""
    for name in list(sys.modules):
        if name.partition(".")[0::2] == ("lora_jax", "torch") or name.startswith("lora_jax.torch."):
            monkeypatch.delitem(sys.modules, name)


def test_an_installed_package_that_cannot_be_used_is_named(
    imported_anew, monkeypatch, tmp_path, capsys
):
    """A release of torchax lacks what is imported from it."""
    monkeypatch.setitem(sys.modules, "torchax.tensor", types.ModuleType("torchax.tensor"))
    with pytest.raises(ConfigError, match="torchax 0.*cannot import name") as error:
        importlib.import_module("lora_jax.torch")
    assert type(error.value).__name__ == "TorchModelError"
    assert REMEDY in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "starcoder2"}))
    with pytest.raises(SystemExit) as end:
        plan(["--model", str(tmp_path / "config.json"), "--batch-size", "2", "--seq-len", "16"])
    message = " ".join(capsys.readouterr().err.split())
    assert end.value.code == 2
    assert "torchax 0" in message and REMEDY in message


def test_a_missing_package_is_named(imported_anew, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchax", None)
    monkeypatch.delitem(sys.modules, "torchax.tensor")
    with pytest.raises(ImportError, match="torchax") as error:
        importlib.import_module("lora_jax.torch")
    assert REMEDY in str(error.value)
