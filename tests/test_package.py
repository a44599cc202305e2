"""The shape of the package itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_jax as lj
from tests.sources import statements

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "lora_jax").rglob("*.py"), *(ROOT / "train").rglob("*.py")])


HEAVY = {"transformers", "datasets", "torch", "tokenizers", "huggingface_hub", "gguf", "PIL"}
# Half as long to import as JAX, or more: those who need them pay for them.
DEAR = HEAVY | {"orbax", "flax"}
# Of the scripts, which are started often: for pictures, tables and scores.
OF_SCRIPTS = {"transformers", "datasets", "torch", "sklearn", "matplotlib", "pandas", "pyarrow"}
USE = """
import jax, jax.numpy as jnp, lora_jax as lj
params = {'up': {'kernel': jnp.ones((5, 3))}}
params = lj.lorafy(params, [lj.LoraRule(targets=['up'], rank=2)])
forward = lj.adapt(lambda params, x: x @ params['up']['kernel'])
assert {'models', 'training', 'peft', 'bank'} < {*dir(lj)}
x = jnp.ones((2, 5)); forward(params, x); jax.jit(forward)(params, x); lj.merge(params)
"""


@pytest.mark.slow
def test_heavy_libraries_are_imported_by_those_who_need_them():
    """In one process, which at last imports some: the judge sees them."""
    say = f"import sys; print(*({DEAR | OF_SCRIPTS!r} & {{*sys.modules}}), flush=True)"
    models = "import lora_jax.models, lora_jax.training.loop, lora_jax.training.data.chats"
    scripts = "import train.sft, train.dpo, train.grpo, train.distill, train.classify"
    scripts += ", train.generate.__main__, train.predict.__main__, train.export.__main__"
    judge = "import gguf, PIL"
    code = "\n".join([USE, say, models, say, scripts, say, judge, say])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    core, of_models, of_scripts, all_of_them = (
        set(line.split()) for line in run.stdout.split("\n")[:4]
    )
    assert core == set() == of_models & HEAVY == of_scripts & OF_SCRIPTS
    assert all_of_them >= {"flax", "gguf", "PIL"}


def test_the_library_knows_nothing_of_the_scripts():
    found = [
        path
        for path in (ROOT / "lora_jax").rglob("*.py")
        for node in statements(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "train")
        or (isinstance(node, ast.Import) and any(a.name.startswith("train") for a in node.names))
    ]
    assert found == []


def test_files_are_short_and_no_function_imports_the_package():
    assert [fault for path in SOURCES for fault in faults(path, path.read_text())] == []


def faults(path, source):
    """Returns what is wrong with a file, a line each."""
    found = []
    if source.count("\n") > 600:
        found.append(f"{path}: split it: a file has one subject")
    if "jax._src" in source or "flax.core.frozen" in source:
        found.append(f"{path}: private parts of another library")
    tree = ast.parse(source)
    calls_main = False
    for node in tree.body:
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            calls_main = True
        elif calls_main:
            found.append(f"{path}:{node.lineno}: main is called before this line has run")
    for function in statements(tree):
        if isinstance(function, ast.FunctionDef):
            for node in statements(function):
                own = isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                    "lora_jax"
                )
                if own:
                    found.append(f"{path}:{node.lineno}: imports lora_jax inside a function")
    return found


def test_the_judge_sees_faults():
    source = "def f():\n    from lora_jax import adapt\n    import jax._src\n" + "\n" * 600
    assert len(faults("file.py", source)) == 3
    call = "if __name__ == '__main__':\n    main()\n"
    assert len(faults("file.py", f"def main(): ...\n{call}def behind(): ...\n")) == 1
    assert faults("file.py", f"def main(): ...\n{call}") == []


def test_public_names_are_there_and_packages_come_at_their_first_use():
    assert [name for name in lj.__all__ if not hasattr(lj, name)] == []
    assert {*lj.__all__} <= {*dir(lj)} and lj.__all__ == sorted(lj.__all__)
    assert lj.models.generate and lj.peft.load and lj.training.finetune
    assert not hasattr(lj, "lorify")
