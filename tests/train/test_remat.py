"""--remat auto in the script: what is compiled and said, and what a resumed run keeps."""

import re

import jax
import numpy as np
import pytest

from lora_jax.bank.together.stack import Stack
from lora_jax.training.remat import SLOW_SECONDS
from lora_jax.training.setup import Setup
from tests.train.scripts import fails
from tests.train.tiny import write_model, write_rows
from train.run.log import read_metrics
from train.sft import main
from train.stages import alone, remat

GIB = 2**30


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model, rows = write_model(folder / "model"), write_rows(folder / "rows.jsonl")
    of_run = ["--batch-size", "4", "--rank", "2", "--steps", "2", "--report-to", "none"]
    return ["--model", str(model), "--dataset", str(rows), *of_run]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test begins with the policy with which another one ended."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
    monkeypatch.setattr(remat, "memory_capacity_of", lambda device: size)


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
    told = " ".join(capsys.readouterr().out.split())
    why = r"remat: none \(nothing is computed again\): the compiled step takes 0\.\d\d of 1\.00 GiB"
    assert re.search(why, told)

    sizes = iter([2 * GIB, GIB])
    monkeypatch.setattr(alone, "step_bytes", lambda step: next(sizes, None))
    short = tmp_path / "little"
    options = [*inputs, "--output", str(short), "--remat", "auto", "--batch-size", "3"]
    main(options)
    told = " ".join(capsys.readouterr().out.split())
    assert compiled == [False, False, True] and saved_policy(short) == "full"
    assert "none does not fit (the compiled step takes 2.00 of 1.00 GiB): compiling anew" in told
    assert "remat: full (the layers are computed again): the compiled step takes 1.00 of" in told

    # It is compiled once; neither a default nor "auto" changes the policy.
    main([*options, "--steps", "3", "--resume"])
    at = options.index("--remat")
    main([*options[:at], *options[at + 2 :], "--steps", "4", "--resume"])
    assert compiled == [False, False, True, True, True] and saved_policy(short) == "full"
    options[at + 1] = "none"
    message = fails(capsys, main, *options, "--steps", "5", "--resume")
    assert "--remat was full and is now none" in message


@pytest.mark.slow
def test_a_resumed_run_keeps_its_number_of_layers(inputs, tmp_path, compiled, capsys):
    for policy, name in (("none", "none"), ("products:1", "some")):
        options = [*inputs, "--output", str(tmp_path / name)]
        main([*options, "--remat", policy])
        main([*options, "--steps", "3", "--resume", "--remat", "auto"])
    assert compiled == [False] * 2 + ["products:1"] * 2
    assert saved_policy(tmp_path / "some") == "products:1"
    np.testing.assert_allclose(losses(tmp_path / "some"), losses(tmp_path / "none"), rtol=1e-5)
    message = fails(capsys, main, *options, "--steps", "4", "--resume", "--remat", "products")
    assert "--remat was products:1 and is now products" in message


def refusing(monkeypatch, text, at_most=1):
    """The compiler refuses the first steps with a message."""
    compile_, refused = jax.stages.Lowered.compile, []

    def compiled(self, *args, **options):
        if len(refused) < at_most:
            refused.append(self)
            raise jax.errors.JaxRuntimeError(text)
        return compile_(self, *args, **options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)


EXHAUSTED = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm."


@pytest.mark.slow
def test_later_runs_begin_with_the_policy_that_was_found(
    inputs, tmp_path, compiled, monkeypatch, capsys
):
    devices_have(monkeypatch, GIB)
    with monkeypatch.context() as patch:
        refusing(patch, EXHAUSTED)
        main([*inputs, "--output", str(tmp_path / "one"), "--remat", "auto"])
    told = " ".join(capsys.readouterr().out.split())
    assert compiled == [False, True] and saved_policy(tmp_path / "one") == "full"
    assert "none does not fit (the compiler refuses the step for want of memory)" in told
    assert len(losses(tmp_path / "one")) == 2
    main([*inputs, "--output", str(tmp_path / "two"), "--remat", "auto"])
    assert compiled == [False, True, True] and saved_policy(tmp_path / "two") == "full"
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    # Of other shapes, nothing is known.
    main([*inputs, "--output", str(tmp_path / "wide"), "--remat", "auto", "--rank", "3"])
    assert compiled[3:] == [False] and saved_policy(tmp_path / "wide") == "none"


@pytest.mark.slow
def test_a_run_ends_where_nothing_fits(inputs, tmp_path, compiled, monkeypatch, capsys):
    devices_have(monkeypatch, GIB)
    refusing(monkeypatch, EXHAUSTED, 2)
    line = [*inputs, "--output", str(tmp_path / "out"), "--remat", "auto"]
    message = fails(capsys, main, *line)
    assert compiled == [False, True]
    refused = "the compiler refuses the step for want of memory"
    tried = f"no policy that was tried fits (none: {refused}; full: {refused})"
    assert tried in message and "smaller --batch-size" in message
    assert not losses(tmp_path / "out")


def test_all_processes_decide_alike(monkeypatch):
    """By the refusal of any, by the largest step, and by the clock of the first."""

    def agreed(*others):
        monkeypatch.setattr(remat.hosts, "gather", lambda values: [*others, values])
        attempt = remat._try_policy(lambda policy: ("step", 5), "none")
        return attempt.size, attempt.refused, attempt.seconds, attempt.step

    assert agreed([None, 7, SLOW_SECONDS]) == (7, False, SLOW_SECONDS, "step")
    assert agreed([EXHAUSTED, None, 1.0]) == (None, True, 1.0, None)


def test_another_failure_of_the_compiler_is_told_as_such(
    inputs, tmp_path, compiled, monkeypatch, capsys
):
    """Triton's refusal of a shape says nothing about the memory."""
    devices_have(monkeypatch, GIB)
    refusing(monkeypatch, "INTERNAL: Couldn't find output tile sizes")
    message = fails(capsys, main, *inputs, "--output", str(tmp_path), "--remat", "auto")
    assert "failed on the step with --remat none, but not because of memory" in message
    assert "Couldn't find output tile sizes" in message and compiled == [False]


def test_policies_of_the_user_are_as_ever(inputs, tmp_path, compiled, monkeypatch):
    devices_have(monkeypatch, GIB)
    refusing(monkeypatch, EXHAUSTED)
    with pytest.raises(jax.errors.JaxRuntimeError, match=EXHAUSTED[:8]):
        main([*inputs, "--output", str(tmp_path), "--remat", "none"])
    assert compiled == [False]


@pytest.mark.slow
def test_a_table_compiles_ahead_and_goes_one_policy_down(inputs, tmp_path, monkeypatch, capsys):
    devices_have(monkeypatch, GIB)
    compile_, compiled, taken = Stack.compile, [], []

    def refused_once(self, base, calls):
        compiled.append(len(taken))
        made = compile_(self, base, calls)
        if len(compiled) == 1:
            raise jax.errors.JaxRuntimeError(EXHAUSTED)
        return made

    step = Stack.step
    monkeypatch.setattr(Stack, "compile", refused_once)
    monkeypatch.setattr(Stack, "step", lambda *args: taken.append(1) or step(*args))
    table = tmp_path / "runs.csv"
    table.write_text("name,lr\none,1e-3\ntwo,2e-3\n")
    main([*inputs, "--output", str(tmp_path / "all"), "--remat", "auto", "--many", str(table)])
    assert compiled == [0, 0] and len(taken) == 2, "compiled before the first step"
    assert {saved_policy(tmp_path / "all" / name) for name in ("one", "two")} == {"full"}
    told = " ".join(capsys.readouterr().out.split())
    assert "remat: none does not fit" in told and "remat: full (the layers" in told


@pytest.mark.slow
def test_a_dry_run_chooses_as_well(inputs, tmp_path, monkeypatch, capsys):
    devices_have(monkeypatch, GIB)
    main([*inputs, "--output", str(tmp_path / "dry"), "--remat", "auto", "--dry-run"])
    assert "remat: none (nothing is computed again)" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists() and not (tmp_path / "cache" / "lora_jax").exists()
