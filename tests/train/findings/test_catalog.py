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

README = Path(findings.__file__).parent / "README.md"


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
    script, config, given = compare.parse(line)
    assert len(config.compare.seeds) >= 3, "a spread needs seeds"
    assert not config.compare.early_stopping, "a table needs all cells"
    for axis in (finding.layout.rows, finding.layout.columns, *finding.layout.blocks):
        assert axis_of(axis).name


def _section(name: str) -> str:
    """Returns what the README says about a finding."""
    sections = re.split("^## ", README.read_text(encoding="utf-8"), flags=re.M)
    command = f"lora-jax findings {name} --output runs/{name}\n"
    (found,) = (section for section in sections[1:] if command in section)
    return found


@pytest.mark.parametrize("name", FINDINGS)
def test_the_readme_has_its_settings(name):
    section = _section(name)
    asked = yaml.safe_load(options_of(name).read_text(encoding="utf-8"))
    for axis in ("lrs", "full_lrs", "ranks", "alphas", "batch_sizes", "dimensions", "steps"):
        wanted = asked.get(axis, [])
        for value in wanted if isinstance(wanted, list) else [wanted]:
            written = f"{value:,}" if isinstance(value, int) else str(value)
            assert re.search(rf"(?<![\w.,-]){written}(?![\w-]|[.,]\d)", section), (axis, written)


@pytest.mark.parametrize("name", FINDINGS)
def test_options_that_the_readme_adds_are_taken(name):
    line = [FINDINGS[name].script, "--config", str(options_of(name))]
    if FINDINGS[name].make is not None:
        line += ["--dataset", "rows.jsonl"]
    for options in re.findall("`(--[^`]+)`", _section(name)):
        if " " in (words := " ".join(options.split())):
            compare.parse([*line, *words.split()])


def test_they_are_listed(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*FINDINGS]
    assert all(len(line) <= 100 for line in lines)
