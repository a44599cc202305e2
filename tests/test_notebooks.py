"""The notebooks run from top to bottom in a fresh kernel, and are kept without outputs."""

import json
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
        install = "".join(cells[1]["source"])
        assert install.startswith("try:\n    import lora_jax") and "%pip install" in install


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
