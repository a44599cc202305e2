"""Folders appear whole, and replace older ones only once they are complete."""

from pathlib import Path

import pytest

from lora_jax.folders import partial_folder_of, replace_folder


def written(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "file").write_text(text)
    return folder


def test_a_new_folder(tmp_path):
    folder = tmp_path / "out"
    replace_folder(written(partial_folder_of(folder), "new"), folder)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (folder / "file").read_text() == "new"


def test_an_older_folder_goes(tmp_path):
    folder = written(tmp_path / "out", "old")
    written(tmp_path / ".out.old", "older")  # as a kill leaves it
    replace_folder(written(partial_folder_of(folder), "new"), folder)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (folder / "file").read_text() == "new"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interruption_brings_the_older_folder_back(tmp_path, monkeypatch, error):
    folder = written(tmp_path / "out", "old")
    partial = written(partial_folder_of(folder), "new")
    rename = Path.rename

    def interrupted(self, target):
        if self == partial:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(error):
        replace_folder(partial, folder)
    assert (folder / "file").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", "out"]
