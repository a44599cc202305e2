"""The code of the pages of lora_jax/torch runs, and prints what the pages say."""

import re
from pathlib import Path

import jax
import pytest

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("torch")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

FOLDER = Path(__file__).parents[2] / "lora_jax/torch"


def programs_of(page):
    return re.findall(
        r"^```python\n(.*?)^```", (FOLDER / page).read_text(), re.DOTALL | re.MULTILINE
    )


@pytest.mark.parametrize("number", range(2))
def test_its_code_prints_what_it_says(number, capsys):
    code = programs_of("README.md")[number]
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(code, "the page's program", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    expected = re.findall(r"print\(.*\)\n# (.*)", code)
    assert expected and [line for line in printed if line in expected] == expected


def test_a_step_of_an_image_model(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    (code,) = programs_of("images.md")
    names = {}
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(code, "the page's program", "exec"), names)
    assert names["value"] > 0 and (tmp_path / "flux/transformer/config.json").exists()
