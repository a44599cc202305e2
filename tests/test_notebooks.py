"""The notebooks are kept with their outputs, install what they need, and run in a fresh kernel."""

import ast
import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

from lora_jax import models

ROOT = Path(models.__file__).parents[2]  # of the packages: a checkout, or an installed wheel

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in FOLDER.glob("*.ipynb")}
NAMES = sorted(NOTEBOOKS)
FIRST = NOTEBOOKS[NAMES[0]].cells[1].source

ANSWER = re.compile(r"<details>.*?```python\n(.*?)```.*?</details>", re.DOTALL)
# The modules of `train` that notebooks may import, beside the library's packages.
PUBLIC = {
    *("train.sft", "train.dpo", "train.grpo", "train.export.__main__", "train.generate.__main__"),
    *("train.serve.local", "train.serve.protocol.requests"),
    *("train.environments.arithmetic", "train.environments.sql.examples"),
    "train.tasks.sums",
    *(f"train.compare.{name}" for name in ("result", "reporting.tables", "reporting.words")),
    *("train.compare.reporting.dimension", "train.compare.reporting.recommend"),
}
PATH = re.compile(r"(?<![\w.])/(tmp|home|root|work|Users|content|usr|opt|var)/")


def texts_of(output):
    """Returns what an output has to read, without pictures."""
    found = [output.get("text", "")]
    found += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return found


def check_outputs(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    for output in outputs:
        assert output.output_type != "error", output
        assert output.get("name") != "stderr", output.text
        for text in texts_of(output):
            assert "Warning" not in text and "Traceback" not in text, text
            assert not PATH.search(text), text
        printed = output.get("text", "") or output.get("data", {}).get("text/plain", "")
        assert printed.count("\n") <= 40, printed
    return outputs


def test_there_is_a_word_on_each_notebook():
    assert len(NAMES) == 10
    readme = (FOLDER / "README.md").read_text()
    assert [name for name in NAMES if f"({name}.ipynb)" not in readme] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_kept_as_it_ran(name):
    cells = [cell for cell in NOTEBOOKS[name].cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [o for o in check_outputs(NOTEBOOKS[name]) if "image/png" in o.get("data", {})]
    assert pictures
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 300_000
    markdown = "".join(c.source for c in NOTEBOOKS[name].cells if c.cell_type == "markdown")
    assert len(ANSWER.findall(markdown)) == markdown.count("<details>") >= 2


def names_of(path):
    """Returns the names that a module's file binds at its top."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (one.id for one in targets if isinstance(one, ast.Name))


def problem_of(module, name):
    """Returns the fault of an import of a name of the project's; None if it is public."""
    path = ROOT.joinpath(*module.split("."))
    is_package = (path / "__init__.py").exists()
    inside = [path / f"{name}.py", path / name / "__init__.py"] if is_package else []
    whole = f"{module}.{name}" if any(file.exists() for file in inside) else module
    if name.startswith("_") and whole not in PUBLIC:
        return f"{name} of {module} is private"
    if not (whole in PUBLIC or (module.split(".")[0] == "lora_jax" and is_package)):
        return f"{whole} is no public module"
    file = path / "__init__.py" if is_package else path.with_suffix(".py")
    if whole == module and name not in names_of(file):
        return f"{module} has no {name}"
    return None


@pytest.mark.parametrize(
    ("module", "name", "problem"),
    [
        ("lora_jax", "LoraRule", None),
        ("lora_jax", "models", None),
        ("train.serve.local", "make_engine", None),
        ("train.serve.engine.engine", "Engine", "no public module"),
        ("lora_jax.bank.mixing", "mixed", "no public module"),
        ("lora_jax.bank", "_mixed", "private"),
        ("lora_jax.bank", "Mixed", "has no Mixed"),
        ("train.tasks", "prompts", "no public module"),
    ],
)
def test_only_public_names_are_public(module, name, problem):
    found = problem_of(module, name)
    assert found is None if problem is None else problem in found


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_imports_public_names(name):
    cells = NOTEBOOKS[name].cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    code += ANSWER.findall("".join(cell.source for cell in cells if cell.cell_type == "markdown"))
    for node in ast.walk(ast.parse("\n".join(code))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("lora_jax", "train"):
            assert [problem_of(node.module, one.name) for one in node.names] == [None] * len(
                node.names
            )
        elif isinstance(node, ast.Import):
            assert not [
                one.name for one in node.names if one.name.startswith(("lora_jax.", "train"))
            ]


def test_the_first_cells_are_alike():
    assert {NOTEBOOKS[name].cells[1].source for name in NAMES} == {FIRST}


@pytest.fixture
def first_cell(tmp_path, monkeypatch):
    """Returns a function that runs a first cell in an empty folder, and returns its commands."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(source=None, installed=None, uv="uv"):
        commands = []
        found = {"pip": importlib.machinery.ModuleSpec("pip", None)} | (installed or {})

        def executed(command, check):
            commands.append(command)

        with monkeypatch.context() as patched:
            patched.setattr(importlib.util, "find_spec", found.get)
            patched.setattr(shutil, "which", {"uv": uv}.get)
            patched.setattr(subprocess, "run", executed)
            assert FIRST.count("SOURCE = None") == 1
            code = FIRST.replace("SOURCE = None", f"SOURCE = {source!r}")
            exec(compile(code, "first cell", "exec"), {})
        return commands

    return run


def make_checkout(folder):
    (folder / "lora_jax").mkdir(parents=True)
    (folder / "lora_jax" / "__init__.py").touch()


PIP = [sys.executable, "-m", "pip", "install", "-q"]


@pytest.mark.parametrize("at", [".", "..", "lora_jax"])
def test_the_first_cell_finds_a_checkout(at, first_cell):
    """In this folder, around it, or cloned into it under the package's own name."""
    make_checkout(Path(at))
    assert first_cell() == [[*PIP, f"{Path(at).resolve()}[notebooks]"]]
    mere_folder = {"lora_jax": importlib.machinery.ModuleSpec("lora_jax", None)}
    assert first_cell(installed=mere_folder) == first_cell()
    file = {"lora_jax": importlib.machinery.ModuleSpec("lora_jax", None, origin="__init__.py")}
    assert first_cell(installed=file) == []


def test_the_first_cell_installs_from_where_it_is_told(first_cell, tmp_path):
    make_checkout(tmp_path / "copy")
    wheel = f"{tmp_path}/lora_jax-0.1.0-py3-none-any.whl"
    Path(wheel).touch()
    assert first_cell(f"{tmp_path}/copy") == [[*PIP, f"{tmp_path}/copy[notebooks]"]]
    address = "git+https://example.org/owner/copy"
    assert first_cell(address) == [[*PIP, f"lora_jax[notebooks] @ {address}"]]
    assert first_cell(wheel) == [[*PIP, f"{wheel}[notebooks]"]]
    Path("lora_jax-0.1.0-py3-none-any.whl").touch()  # uploaded beside the notebook
    assert first_cell() == [[*PIP, f"{Path.cwd()}/{Path(wheel).name}[notebooks]"]]


def test_the_first_cell_says_that_it_installs_and_does_without_pip(first_cell, capsys):
    make_checkout(Path())
    (command,) = first_cell(installed={"pip": None})
    assert command[:5] == ["uv", "pip", "install", "--python", sys.executable]
    assert "installing lora_jax" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="neither pip nor uv"):
        first_cell(installed={"pip": None}, uv=None)


def test_the_first_cell_brings_an_accelerators_plugin_along(first_cell):
    make_checkout(Path())
    plugins = {"jax_cuda12_plugin": importlib.machinery.ModuleSpec("jax_cuda12_plugin", None)}
    (command,) = first_cell(installed=plugins)
    assert command[-1] == "jax[cuda12]"


def test_the_first_cell_says_what_to_do_where_there_is_nothing(first_cell):
    with pytest.raises(SystemExit, match="neither installed nor around this notebook: set SOURCE"):
        first_cell()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what the machinery of kernels says is not the point
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.foreign if n[0] == "4" else ()) for n in NAMES]
)
def test_a_notebook_runs_in_a_fresh_kernel(name, monkeypatch, tmp_path):
    """With few steps, and with the answers to its exercises."""
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    monkeypatch.setenv("LORA_JAX_QUICK", "1")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # readers have none
    if name[0] in "259":
        models.fetch("HuggingFaceTB/SmolLM2-135M-Instruct")  # which says so, where it has to
    cells = []
    for cell in nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells:
        cells.append(cell)
        if cell.cell_type == "markdown":
            cells += map(nbformat.v4.new_code_cell, ANSWER.findall(cell.source))
    notebook = nbformat.v4.new_notebook(cells=cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    check_outputs(notebook)
