"""Missing rights are named, with the option that helps."""

import pytest

from lora_jax import models
from tests.train.tiny import write_jsonl
from train import sft
from train.console.errors import reported


@pytest.mark.parametrize("wrapped", [False, True])
def test_missing_rights_are_told_in_a_paragraph(capsys, wrapped):
    error = PermissionError(13, "Permission denied", "/far/away")
    with pytest.raises(SystemExit) as caught, reported():
        if wrapped:
            raise RuntimeError("saving failed") from error
        raise error
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("\nerror: /far/away cannot be read or written (Permission denied). Give")
    assert "--output" in said and "XDG_CACHE_HOME" in said


def test_other_errors_are_no_matter_of_rights():
    with pytest.raises(RuntimeError, match="other"), reported():
        try:
            raise PermissionError(13, "Permission denied", "/far/away")
        except PermissionError:
            raise RuntimeError("other") from None


def test_an_output_folder_that_cannot_be_written_names_its_option(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    output = tmp_path / "file" / "run"
    with pytest.raises(SystemExit):
        sft.main(["--dataset", str(rows), "--output", str(output)])
    said = capsys.readouterr().err
    assert f"{output} cannot be written: Not a directory. Pass another folder with --output" in said


def test_a_cache_that_cannot_be_written_names_its_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(models.ModelNotFound, match=r"(?s)Not a directory.*XDG_CACHE_HOME"):
        models.fetch("HuggingFaceTB/SmolLM2-135M-Instruct")
