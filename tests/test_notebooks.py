"""The notebooks run from top to bottom in a fresh kernel, and are kept without outputs."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def test_notebooks_are_kept_without_outputs():
    assert NAMES == ["bring_your_own_model", "quickstart"]
    for name in NAMES:
        cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def first_cell(name):
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    return "".join(cells[1]["source"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("None", r"{folder}\[\w+\]"),
        ("'{folder}'", r"{folder}\[\w+\]"),
        ("'{folder}/lora_jax-0.1.0-py3-none-any.whl'", r"{folder}/lora_jax-0.1.0.*\.whl\[\w+\]"),
        ("'git+https://example.org/owner/copy'", r"lora_jax\[\w+\] @ git\+https://example\.org/.*"),
    ],
)
def test_the_first_cell_installs_from_where_it_is_told(name, source, asked, tmp_path, monkeypatch):
    """From a checkout, a wheel or an address, and never by a name from an index."""
    for folder in ("lora_jax", "train"):
        (tmp_path / folder).mkdir()
    (tmp_path / "train" / "sft.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    code = first_cell(name)
    assert code.count("SOURCE = None") == 1
    code = code.replace("SOURCE = None", "SOURCE = " + source.format(folder=tmp_path))
    exec(compile(code, name, "exec"), {})
    (command,) = commands
    assert command[:5] == [sys.executable, "-m", "pip", "install", "-q"]
    assert re.fullmatch(asked.format(folder=re.escape(str(tmp_path.resolve()))), command[5])


@pytest.mark.parametrize("name", NAMES)
def test_the_first_cell_says_what_to_do_where_there_is_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="neither installed nor around this notebook: set SOURCE"):
        exec(compile(first_cell(name), name, "exec"), {})


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what the machinery of kernels says is not the point
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.foreign if n[0] == "b" else ()) for n in NAMES]
)
def test_a_notebook_runs_in_a_fresh_kernel(name, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "trainable params: " in text and "loss " in text
