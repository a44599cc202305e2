"""The page about repositories shows the lines that ran; the command goes through a small one."""

import re
import sys
from pathlib import Path

import pytest

from tests.foreign import repos, run_repository
from tests.foreign.absent import leave_out
from tests.foreign.case import Made
from tests.foreign.environments import EnvironmentFailed
from tests.foreign.repositories import REPOSITORIES
from tests.foreign.repository import Model, Repository, drawn, typed
from tests.foreign.table import parsed_table

PAGE = Path(__file__).parent.parent.parent / "lora_jax" / "adapt" / "repos.md"
PRINT_IT = "print the page again: python -m tests.foreign.repos DIR"


def test_the_page_lists_the_models():
    rows = parsed_table(PAGE.read_text(), repos.HEAD)
    named = [(re.findall(r"#([\w-]+)\)", row[0])[0], row[1]) for row in rows]
    assert named == [(r.name, m.name) for r in REPOSITORIES for m in r.models], PRINT_IT
    text = PAGE.read_text()
    for repository in REPOSITORIES:
        assert f"\n## {repository.name}\n" in text, PRINT_IT
        assert repository.models or repository.not_run in text, PRINT_IT
        for model in repository.models:
            assert typed(model.lines) in text, PRINT_IT


def test_the_figures_are_within_tolerance():
    rows = parsed_table(PAGE.read_text(), repos.HEAD)
    models = [model for r in REPOSITORIES for model in r.models]
    for row, model in zip(rows, models, strict=True):
        assert max(float(row[3]), float(row[4])) <= model.tolerance, (model.name, PRINT_IT)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "nowhere is not a folder. Pass the folder of the checkouts."),
        (["."], r"\. lacks a folder of this name: openpi, "),
        ([".", "--only", "octo"], r"\. lacks a folder of this name: octo"),
        ([".", "--only", "nothing"], "--only nothing is not known. Choose from openpi, "),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        repos.main(arguments)
    assert re.search(f"error: {message}", capsys.readouterr().err.splitlines()[-1])


def test_absent_packages_are_empty(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    leave_out(["nopackage"])
    import nopackage.inner  # type: ignore[import-not-found]
    from nopackage import Thing

    assert isinstance(Thing(1, size=2), Thing) and nopackage.inner.Other.Error
    for name in ("nopackage", "nopackage.inner"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError):
        import another_package  # type: ignore[import-not-found]  # noqa: F401


CODE = """
import jax.numpy as jnp
import missing_package.inner

def make():
    return {"up": {"kernel": jnp.ones((5, 7))}, "down": {"kernel": jnp.ones((7, 5))}}

def run(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]
"""


def small_lines(small, params, x):
    def forward(params, x):
        return small.run(params, x)

    return Made(forward, params, (x,))


def small_arguments():
    import small

    from tests.support import draw

    return small, drawn(small.make()), draw(9, (3, 5))


SMALL = Repository(
    name="small",
    title="Small",
    address="https://example.org",
    pins="nothing",
    models=(Model("an MLP", small_lines, small_arguments),),
    source="src",
    absent=("missing_package",),
    notes=("A note.",),
)


def test_lines_that_a_user_types():
    assert typed(small_lines).splitlines() == [
        "def forward(params, x):",
        "    return small.run(params, x)",
        "",
        "",
        'rules = [lj.LoraRule(targets="all-linear", rank=16)]',
        "tree = lj.lorafy(params, rules, trace=(forward, params, x))",
        "outputs = lj.adapt(forward)(tree, x)",
    ]


def test_a_small_repository(tmp_path, monkeypatch, capsys):
    (tmp_path / "small" / "src").mkdir(parents=True)
    (tmp_path / "small" / "src" / "small.py").write_text(CODE)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in (repos, run_repository):
        monkeypatch.setattr(module, "REPOSITORIES", (SMALL,))

    def run_here(command):
        run_repository.main(*map(str, command[-3:]))

    monkeypatch.setattr(repos, "run_command", run_here)
    assert repos.main([str(tmp_path), "--cache", str(tmp_path / "cache")]) == 0
    text = capsys.readouterr().out
    ((link, model, kernels, outputs, gradients, merges, left_out),) = parsed_table(text, repos.HEAD)
    assert (link, model, kernels) == ("[Small](#small)", "an MLP", "2")
    assert max(float(outputs), float(gradients)) < 1e-5 and (merges, left_out) == ("0", "0")
    assert typed(small_lines) in text and "`missing_package`" in text and "A note." in text


def test_a_repository_that_fails_is_a_row_with_the_reason(tmp_path, monkeypatch, capsys):
    (tmp_path / "small").mkdir()
    monkeypatch.setattr(repos, "REPOSITORIES", (SMALL,))

    def fail(command):
        raise EnvironmentFailed("no small | module")

    monkeypatch.setattr(repos, "run_command", fail)
    assert repos.main([str(tmp_path), "--cache", str(tmp_path / "cache")]) == 1
    assert "failed: no small \\| module" in capsys.readouterr().out
