"""The code of lora_jax/torch/README.md runs, and prints what the page says."""

import re
from pathlib import Path

import jax
import pytest

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("torch")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

PAGE = (Path(__file__).parents[2] / "lora_jax/torch/README.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(2))
def test_its_code_prints_what_it_says(number, capsys):
    code = PROGRAMS[number]
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(code, "the page's program", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    expected = re.findall(r"print\(.*\)\n# (.*)", code)
    assert expected and [line for line in printed if line in expected] == expected
