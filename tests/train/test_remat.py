"""--remat auto in the script: what is chosen, what is said of it, and what a resumed run keeps."""

import re

import jax
import pytest

from lora_jax.training.setup import Setup
from tests.support import thorough
from tests.train.scripts import fails
from tests.train.tiny import write_model, write_rows
from train import remat
from train.plan import remat as choosing
from train.run.log import read_metrics
from train.sft import main

GIB = 2**30


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model, rows = write_model(folder / "model"), write_rows(folder / "rows.jsonl")
    of_run = ["--batch-size", "4", "--rank", "2", "--steps", "2", "--report-to", "none"]
    return ["--model", str(model), "--dataset", str(rows), *of_run]


@pytest.fixture
def compiled(monkeypatch):
    """The policies of the steps that are compiled, in order."""
    policies, compile_ = [], Setup.compile
    forward_of = Setup.forward

    def forward(self, model):
        made = forward_of(self, model)
        forward.remat = model.remat
        return made

    def counted(self, *args):
        policies.append(forward.remat)
        return compile_(self, *args)

    monkeypatch.setattr(Setup, "forward", forward)
    monkeypatch.setattr(Setup, "compile", counted)
    return policies


def devices_have(monkeypatch, size):
    monkeypatch.setattr(choosing, "capacity_of", lambda device: size)


def saved_policy(folder):
    return re.search(r"^remat: (\S+)$", (folder / "config.yaml").read_text(), re.MULTILINE)[1]


def losses(folder):
    return [line["loss"] for line in read_metrics(folder)]


@pytest.mark.slow
def test_a_cpu_recomputes_nothing_by_default(inputs, tmp_path, compiled, capsys):
    main([*inputs, "--output", str(tmp_path)])
    assert compiled == [False] and saved_policy(tmp_path) == "none"
    assert "remat:" not in capsys.readouterr().out


@pytest.mark.slow
def test_what_fits_is_kept_and_a_resumed_run_keeps_it(
    inputs, tmp_path, compiled, monkeypatch, capsys
):
    devices_have(monkeypatch, GIB)
    main([*inputs, "--output", str(tmp_path / "much"), "--remat", "auto"])
    assert compiled == [False] and saved_policy(tmp_path / "much") == "none"
    told = capsys.readouterr().out
    assert re.search(r"remat: none \(nothing is computed again\): predicted 0\.\d\d of 1\.00", told)

    devices_have(monkeypatch, 1000)
    short = tmp_path / "little"
    options = [*inputs, "--output", str(short), "--remat", "auto"]
    main(options)
    told = " ".join(capsys.readouterr().out.split())
    assert compiled == [False, True] and saved_policy(short) == "full"
    assert "none would take" in told and "and nothing takes less" in told
    assert losses(short) == pytest.approx(losses(tmp_path / "much"), abs=1e-6)

    devices_have(monkeypatch, GIB)  # where nothing would be computed again
    main([*options, "--steps", "3", "--resume"])
    main([*options[:-2], "--steps", "4", "--resume"])
    assert compiled == [False, True, True, True] and saved_policy(short) == "full"
    message = fails(capsys, main, *options[:-1], "none", "--steps", "5", "--resume")
    assert "--remat was full and is now none" in message


def refusing(monkeypatch, text):
    """The first step is refused with a message."""
    compile_, refused = Setup.compile, []

    def compiled(self, *args):
        made = compile_(self, *args)
        if not refused:
            refused.append(made)
            raise jax.errors.JaxRuntimeError(text)
        return made

    monkeypatch.setattr(Setup, "compile", compiled)


EXHAUSTED = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm."


@pytest.mark.slow
def test_one_policy_down_where_the_compiler_refuses(
    inputs, tmp_path, compiled, monkeypatch, capsys
):
    devices_have(monkeypatch, GIB)
    refusing(monkeypatch, EXHAUSTED)
    main([*inputs, "--output", str(tmp_path), "--remat", "auto"])
    told = " ".join(capsys.readouterr().out.split())
    assert compiled == [False, True] and saved_policy(tmp_path) == "full"
    assert "none does not fit (the compiler refuses the step for want of memory)" in told
    assert len(losses(tmp_path)) == 2


@pytest.mark.slow
@thorough
def test_a_policy_that_was_predicted_not_to_fit_comes_after_the_last(
    inputs, tmp_path, compiled, monkeypatch, capsys
):
    devices_have(monkeypatch, 1000)
    refusing(monkeypatch, EXHAUSTED)
    main([*inputs, "--output", str(tmp_path), "--remat", "auto"])
    told = " ".join(capsys.readouterr().out.split())
    assert compiled == [True, False] and saved_policy(tmp_path) == "none"
    assert "full does not fit" in told and "compiling anew with none" in told


@pytest.mark.slow
def test_one_policy_down_where_a_compiled_step_takes_too_much(
    inputs, tmp_path, compiled, monkeypatch, capsys
):
    devices_have(monkeypatch, GIB)
    sizes = iter([2 * GIB, GIB // 2])
    monkeypatch.setattr(remat, "step_bytes", lambda step: next(sizes))
    main([*inputs, "--output", str(tmp_path), "--remat", "auto"])
    told = " ".join(capsys.readouterr().out.split())
    assert compiled == [False, True] and saved_policy(tmp_path) == "full"
    assert "none does not fit (the compiled step takes 2.00 of 1.00 GiB)" in told


def test_all_processes_go_one_policy_down_where_one_is_refused(monkeypatch):
    step = object()
    monkeypatch.setattr(remat, "step_bytes", lambda step: 5)
    for others, compared in [([[False, 7]], (False, 7)), ([[True, None]], (True, None))]:
        monkeypatch.setattr(remat.hosts, "gather", lambda own, more=others: [own, *more])
        assert remat._compare_processes(step) == compared
    assert remat._compare_processes(None) == (True, None)


@pytest.mark.parametrize(("text", "policy"), [("INTERNAL: a mistake", "auto"), (EXHAUSTED, "none")])
def test_other_errors_and_policies_of_the_user_are_as_ever(
    inputs, tmp_path, compiled, monkeypatch, text, policy
):
    devices_have(monkeypatch, GIB)
    refusing(monkeypatch, text)
    with pytest.raises(jax.errors.JaxRuntimeError, match=text[:8]):
        main([*inputs, "--output", str(tmp_path), "--remat", policy])
    assert compiled == [False]


@pytest.mark.slow
def test_a_table_and_a_dry_run_choose_as_well(inputs, tmp_path, monkeypatch, capsys):
    devices_have(monkeypatch, 1000)
    main([*inputs, "--output", str(tmp_path / "dry"), "--remat", "auto", "--dry-run"])
    assert "remat: full (the layers are computed again)" in capsys.readouterr().out
    table = tmp_path / "runs.csv"
    table.write_text("name,rank\none,2\ntwo,3\n")
    main([*inputs, "--output", str(tmp_path / "all"), "--remat", "auto", "--many", str(table)])
    assert {saved_policy(tmp_path / "all" / name) for name in ("one", "two")} == {"full"}
