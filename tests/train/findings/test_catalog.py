"""The findings: each has its options, and they are what train.compare takes."""

from pathlib import Path

import pytest

from train import compare, findings
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


def test_they_are_listed(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*FINDINGS]
    assert all(len(line) <= 100 for line in lines)
