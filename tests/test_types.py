"""Types: the code of the documentation is clean for mypy and pyright, as its readers run them.

pyright is `basedpyright` in the mode "standard": the same checker, whose package brings its own
Node (extra 'types').
"""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BLOCKS = re.compile(r"^```python([ \w]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
WRONG = "import lora_jax as lj\n\nlj.lorify({})\nlj.models.generate(max_new_tokens='8')\n"


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder with a file for each program of a page, and one with faults."""
    folder = tmp_path_factory.mktemp("programs")
    pages = {ROOT / "README.md", *(ROOT / "lora_jax").rglob("*.md")}
    # transformers' configurations are not typed for the arguments that it documents.
    for page in sorted(pages - set((ROOT / "lora_jax/torch").glob("*.md"))):
        found: list[str] = []
        for says, code in BLOCKS.findall(page.read_text()):
            if "openpi" in says:  # code that is not installed
                continue
            if "continued" in says:
                found[-1] += code
            else:
                found.append(code)
        name = "_".join(page.relative_to(ROOT).with_suffix("").parts)
        for number, code in enumerate(found):
            (folder / f"{name}_{number}.py").write_text(code)
    assert len(list(folder.iterdir())) > 12
    (folder / "wrong.py").write_text(WRONG)
    return folder


def check(command, folder):
    """Runs a type checker in a folder; returns the lines with an error."""
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    errors = [line for line in lines if re.search(r"\.py:\d+(:\d+)?:? (- )?error: ", line)]
    assert run.returncode == 1 and errors, run.stdout + run.stderr
    return errors


def test_code_of_the_pages_is_clean_for_mypy(programs):
    command = [sys.executable, "-m", "mypy", "--config-file", f"{ROOT}/pyproject.toml"]
    command += ["--cache-dir", f"{ROOT}/.mypy_cache", *(p.name for p in programs.glob("*.py"))]
    errors = check(["env", f"MYPYPATH={ROOT}", *command], programs)
    assert [line for line in errors if not line.startswith("wrong.py")] == []
    assert len(errors) >= 2, "the judge sees both faults"


@pytest.mark.skipif(not find_spec("basedpyright"), reason="the extra 'types' is not installed")
def test_code_of_the_pages_is_clean_for_pyright(programs):
    settings = {
        "typeCheckingMode": "standard",
        "include": ["."],
        "extraPaths": [str(ROOT)],
        "reportMissingImports": "none",  # of the extra 'foreign'
    }
    (programs / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--level", "error"]
    errors = check([*command, "--pythonpath", sys.executable, "-p", str(programs)], programs)
    assert [line for line in errors if "/wrong.py" not in line] == []
    assert len(errors) >= 2, "the judge sees both faults"
