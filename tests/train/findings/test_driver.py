"""The command on a tiny encoder: options, folders, and how it goes on."""

import dataclasses
import json

import pytest

from tests.train.test_classify import write_encoder
from train.compare import result
from train.console.errors import UserError
from train.findings import catalog
from train.findings.__main__ import main
from train.findings.making.inputs import FindingInputs, write_rows
from train.findings.reporting.pivot import PivotLayout

SMALL = ["--ranks", "2", "--lrs", "1e-3", "4e-3", "--full-lrs", "1e-3", "--seeds", "0", "1"]
SMALL += ["--rows", "48", "--batch-sizes", "8", "--warmup", "2", "--report-to", "none"]
SMALL += ["--seq-len", "24", "--test-share", "0.4"]


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A finding that makes its rows and names a tiny encoder; counts how often it made them."""
    write_encoder(tmp_path / "encoder")
    made = []

    def make(folder, session):
        made.append(folder)
        rows = [("abc" * (1 + i % 3), "no") if i % 2 else ("xyz", "yes") for i in range(80)]
        write_rows(folder / "rows.csv", rows)
        options = {"dataset": str(folder / "rows.csv"), "model": str(tmp_path / "encoder")}
        return FindingInputs(options, ("It has 80 rows.",))

    finding = catalog.Finding(
        title="Made up",
        said="Nobody says so.",
        layout=PivotLayout("learning rate", "rank"),
        make=make,
        makes=("dataset", "model"),
    )
    monkeypatch.setitem(catalog.FINDINGS, "rates", finding)
    return made


@pytest.mark.slow
def test_one_command_makes_rows_runs_and_a_table(made_up, tmp_path, capsys):
    output = tmp_path / "out"
    main(["rates", "--output", str(output), *SMALL])
    found = result.read(output)
    assert len(found.runs) == 3 * 2 and all(run.status == "done" for run in found.runs)
    assert found.facts.command.startswith("python -m train.findings rates --output ")
    text = (output / "finding.md").read_text()
    edges = "The best may lie beyond the grid: the rate of LoRA r=2 is best at "
    assert text.startswith(f"# Made up\n\nNobody says so.\n\nIt has 80 rows.\n\n{edges}")
    assert text.index(edges) < text.index("\n\nAccuracy, mean of ")
    assert "| learning rate | rank 2 | full |" in text and "Held-out loss per text, " in text
    assert (output / "finding.png").exists() and (output / "report.html").exists()
    assert made_up == [output / "made"]
    before = json.loads((output / result.JSON).read_text())["runs"]
    main(["rates", "--output", str(output), *SMALL, "--resume"])
    assert json.loads((output / result.JSON).read_text())["runs"] == before, "nothing ran again"
    (output / "finding.md").unlink()
    main(["rates", "--from", str(output)])
    assert (output / "finding.md").read_text() == text


@pytest.mark.parametrize("rows", [0, 3])
def test_where_nothing_could_be_made_no_folder_is_left(rows, tmp_path, monkeypatch, capsys):
    def make(folder, session):
        if rows:
            write_rows(folder / "rows.csv", [("abc", "no")] * rows)
        raise UserError("there is no more data")

    failing = dataclasses.replace(catalog.FINDINGS["rates"], make=make)
    monkeypatch.setitem(catalog.FINDINGS, "rates", failing)
    with pytest.raises(SystemExit):
        main(["rates", "--output", str(tmp_path / "out")])
    assert "there is no more data" in capsys.readouterr().err
    assert (tmp_path / "out").exists() == (rows > 0)


def test_what_a_finding_makes_is_not_given(made_up, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["rates", "--output", str(tmp_path / "out"), "--model", "mine"])
    assert error.value.code == 2 and made_up == []
    assert "--model is set by the finding rates itself" in capsys.readouterr().err
