"""A word of the command line that says what the file of --config says is no unknown option."""

import pytest

from train.compare import __main__ as compare
from train.console.errors import UserError
from train.findings.catalog import FINDINGS, options_of
from train.options.scripts.sft import Config
from train.settings.command import read_line


def read(folder, text, *args):
    path = folder / "options.yaml"
    path.write_text(text)
    return read_line(Config(), ["--config", str(path), *args], "train.sft")[0]


def test_what_is_off_or_on_already_may_be_said_again(tmp_path):
    for args in (["--no-packing"], ["--no_packing"], []):
        assert not read(tmp_path, "packing: false", *args).data.packing
    for args in (["--dora"], []):
        assert read(tmp_path, "dora: true", *args).adapter.dora
    assert not read(tmp_path, "dora: true", "--no-dora").adapter.dora
    assert read(tmp_path, "dora: false", "--dora").adapter.dora


@pytest.mark.parametrize("name", FINDINGS)
def test_costs_of_a_finding_may_be_turned_off_again(name):
    line = [FINDINGS[name].script, "--config", str(options_of(name)), "--no-costs"]
    _, config = compare.parse(line)
    assert not config.compare.costs


def test_what_no_file_says_is_still_an_unknown_option(tmp_path):
    with pytest.raises(UserError, match="no option --no-dora"):
        read(tmp_path, "rank: 2", "--no-dora")
