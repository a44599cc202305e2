"""The findings: each has its options, and they are what train.compare takes."""

import re
from pathlib import Path

import pytest
import yaml

from train import findings
from train.compare import __main__ as compare
from train.findings.__main__ import main
from train.findings.catalog import FINDINGS, options_of
from train.findings.reporting.pivot import axis_of

PAGES = Path(findings.__file__).parent


def test_each_file_of_options_has_a_finding():
    files = {path.stem for path in Path(findings.__file__).parent.glob("*.yaml")}
    assert files == set(FINDINGS)


@pytest.mark.parametrize("name", FINDINGS)
def test_its_options_and_its_layout_are_known(name):
    finding = FINDINGS[name]
    line = [finding.script, "--config", str(options_of(name))]
    # The maker's files: some options have an effect only beside a data set of one's own.
    if finding.make is not None:
        line += ["--dataset", "rows.jsonl"]
    _, config = compare.parse(line)
    assert len(config.compare.seeds) >= 3, "a spread needs seeds"
    assert not config.compare.early_stopping, "a table needs all cells"
    for axis in (finding.layout.rows, finding.layout.columns, *finding.layout.blocks):
        assert axis_of(axis).name


def _page(name: str) -> str:
    """Returns the page of a finding, which shows its command."""
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert f"lora-jax findings {name} --output runs/{name}\n" in text
    assert f"]({name}.md)" in (PAGES / "README.md").read_text(encoding="utf-8")
    return text


@pytest.mark.parametrize("name", FINDINGS)
def test_its_page_has_its_settings(name):
    page = _page(name)
    asked = yaml.safe_load(options_of(name).read_text(encoding="utf-8"))
    for axis in ("lrs", "full_lrs", "ranks", "alphas", "batch_sizes", "dimensions", "steps"):
        wanted = asked.get(axis, [])
        for value in wanted if isinstance(wanted, list) else [wanted]:
            written = f"{value:,}" if isinstance(value, int) else str(value)
            assert re.search(rf"(?<![\w.,-]){written}(?![\w-]|[.,]\d)", page), (axis, written)


@pytest.mark.parametrize("name", FINDINGS)
def test_options_that_its_page_adds_are_taken(name):
    line = [FINDINGS[name].script, "--config", str(options_of(name))]
    if FINDINGS[name].make is not None:
        line += ["--dataset", "rows.jsonl"]
    for options in re.findall("`(--[^`]+)`", _page(name)):
        if " " in (words := " ".join(options.split())):
            compare.parse([*line, *words.split()])


def test_they_are_listed(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*FINDINGS]
    assert all(len(line) <= 100 for line in lines)
