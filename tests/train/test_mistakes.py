"""Tests of what users run into: full disks, damaged bases, long prompts, a hub that is silent."""

import dataclasses
import errno
import io
import os
import resource
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest

from lora_jax.training.optimizers.schedules import warmed_up
from lora_jax.training.run.lock import FolderLock, RunLock
from tests.train.scripts import fails
from tests.train.tiny import write_model, write_rows
from train import dpo, grpo
from train.compare import __main__ as compare
from train.console.errors import UserError, file_problem
from train.data import files
from train.export import __main__ as export
from train.generate import __main__ as generate
from train.options import elsewhere
from train.options.field import traits_of
from train.plan import __main__ as plan
from train.predict import __main__ as predict
from train.run.output import begin
from train.serve import __main__ as serve
from train.serve.options import ServeOptions
from train.sft import main, parse
from train.stages import begin as begin_stage
from train.tasks.chats import hold_out

# Orbax leaves coroutines behind where a file cannot be written.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_held_out_rows_are_drawn_and_stay_when_a_run_goes_on(tmp_path):
    def rows(*args):
        args = ["--dataset", "x.jsonl", "--output", str(tmp_path), *args]
        drawn = hold_out(parse(args), {"x.jsonl": 40})
        return drawn and drawn[0].tolist()

    asked = ["--eval-every", "5", "--eval-questions", "3"]
    drawn = rows(*asked)
    assert len({*drawn}) == 3 and {*drawn} < {*range(1, 41)} and drawn == sorted(drawn)
    assert rows(*asked, "--seed", "1") != drawn != [38, 39, 40]
    begin(tmp_path, parse(["--dataset", "x.jsonl", *asked]), "train.sft", {})
    assert rows("--resume") == drawn == rows(*asked[2:], "--eval-every", "1", "--resume")
    with pytest.raises(UserError, match="--eval-questions was 3 and is now 64"):
        rows("--eval-every", "1", "--resume")
    begin(tmp_path, parse(["--dataset", "x.jsonl"]), "train.sft", {})
    assert rows("--resume") is None
    with pytest.raises(
        UserError,
        match="--eval-every 5 is not possible, because the run has already trained on all rows",
    ):
        rows("--eval-every", "5", "--resume")


def test_rows_are_held_out_of_each_data_set():
    def drawn(questions, counts, weights=(None, None)):
        args = ["--dataset", "x.jsonl", "--eval-every", "1", "--eval-questions", str(questions)]
        return [len(rows) for rows in hold_out(parse(args), counts, weights)]

    assert drawn(12, {"a": 400, "b": 200}) == [8, 4]
    assert drawn(12, {"a": 400, "b": 200}, (1.0, 3.0)) == [3, 9]
    assert drawn(1, {"a": 400, "b": 10}) == [1, 1]  # each has one
    assert drawn(80, {"a": 400, "b": 20}) == [40, 2]  # a tenth
    with pytest.raises(UserError, match="at most a tenth of the 9 rows of b is held out"):
        drawn(12, {"a": 400, "b": 9})


def test_a_longer_run_is_told_that_its_learning_rate_jumps(tmp_path):
    config = parse(["--dataset", "x.jsonl", "--schedule", "linear", "--warmup", "1"])
    begin(tmp_path, config, "train.sft", {"resolved": {"steps": 11, "lr": 1.0}})

    def said(steps):
        run = SimpleNamespace(folder=tmp_path, config=config, inputs=SimpleNamespace(steps=steps))
        return begin_stage._rate_jump_warning(
            run, warmed_up(1.0, steps, kind="linear", warmup=1), 6
        )

    assert said(11) == ()
    (line,) = said(21)
    assert "from 5.00e-01 to 7.50e-01" in line and "pass --steps 11." in line


def test_a_base_that_is_not_finite_is_named_before_training(tmp_path, capsys):
    model = write_model(tmp_path / "model", scale=np.nan)
    args = ["--model", model, "--dataset", write_rows(tmp_path / "rows.jsonl"), "--output"]
    said = fails(capsys, main, *args, tmp_path / "run")
    assert "weights contain values that are not finite, for example model/" in said


def test_a_full_disk_is_told_with_the_whole_path():
    folder = f"/runs/o'neil's run/{'long' * 80}"
    texts = [
        f'Error writing "w.a/0.0" in OCDBT database at local file "{folder}/": Failed writing: '
        f'"{folder}/d/a1": Failed to write 14 bytes to file 11: No space left on device [28]'
    ]
    errors = [OSError(errno.ENOSPC, "No space left on device", f"{folder}/d/a1"), *texts]
    for error in errors:
        error = error if isinstance(error, OSError) else ValueError(error)
        problem = file_problem(error)
        place = f"a file cannot be written ({folder}/d/a1: No space left on device). Make room"
        assert problem.startswith(place)
    assert "([Errno 27] File too large)" in file_problem(OSError(errno.EFBIG, "File too large"))


@pytest.mark.slow
def test_a_limit_on_files_is_told_in_one_paragraph(tmp_path, capsys, compiles_anew):
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    run = tmp_path / "a_long_name_of_a_folder" / ("b" * 200) / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        args = ["--model", model, "--dataset", rows, "--steps", 1, "--output", run]
        args += ["--targets", "q_proj"]
        said = fails(capsys, main, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said.startswith(f"a file cannot be written ({run}") and "Go on with: " in said
    assert "the limit on the size of files" in said and len(said.splitlines()) == 1


@pytest.mark.slow
def test_a_prompt_that_is_too_long_is_left_out(tmp_path, capsys, monkeypatch):
    model = write_model(tmp_path / "model", max_position_embeddings=64)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"1?\n{'long ' * 20}\n2?\n"))
    with pytest.raises(SystemExit) as caught:
        generate.main(["--model", str(model), "--max-new-tokens", "4"])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and len(out.split("\n")) >= 3
    assert "prompt 2 was skipped: prompt and --max-new-tokens: the model" in err
    assert "1 prompts got no answer" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--system", "Be brief."], "--system needs a chat template"),
        (["--seed", "3"], "--seed has no effect, because --temperature 0"),
        (["--allow-base-mismatch"], "without an adapter. Pass --adapter"),
        (["--temperature", "1", "--seed", str(2**40)], "a number from 0 to 4294967295"),
    ],
)
def test_generate_refuses_what_has_no_effect(args, message, tmp_path, capsys):
    model = write_model(tmp_path / "model", template=None)
    assert message in fails(capsys, generate.main, "--model", model, "--prompt", "1?", *args)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """The local cache is then looked into, without the half minute of attempts."""
    offline = []

    def load(*_, **__):
        offline.append(huggingface_hub.constants.HF_HUB_OFFLINE)
        raise ConnectionError("no such data set in the cache")

    monkeypatch.setattr(files, "probe_hub", lambda name, kind: "no answer within 10 seconds")
    monkeypatch.setattr(datasets, "load_dataset", load)
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(UserError, match="owner/name .* no answer within 10 seconds"):
        files.read_rows("owner/name")
    assert offline == [True] and huggingface_hub.constants.HF_HUB_OFFLINE == before


def test_what_a_cpu_does_not_have_is_refused_before_weights_are_read(tmp_path, capsys):
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    args = ["--model", model, "--dataset", rows, "--output", tmp_path / "run"]
    said = fails(capsys, main, *args, "--remat", "offload")
    assert said.startswith("--remat offload moves the layers' inputs") and "full" in said
    said = fails(capsys, main, *args, "--collective-matmul", "whole")
    assert said.startswith("--collective-matmul whole only has") and "are cpus. Remove" in said
    said = fails(capsys, main, *args, "--attention", "flash")
    assert said.startswith("attention 'flash' runs only on a gpu, but the model is compiled for a")


def test_a_second_run_in_a_folder_is_refused_before_weights_are_read(tmp_path, capsys):
    args = ["--model", "nowhere.gguf", "--dataset", write_rows(tmp_path / "rows.jsonl")]
    (tmp_path / "run").mkdir()
    with RunLock(FolderLock(tmp_path / "run")):
        for more in ([], ["--overwrite"]):
            said = fails(capsys, main, *args, "--output", tmp_path / "run", *more)
            assert f"another run, process {os.getpid()} on {socket.gethostname()}, is" in said
    assert "nowhere.gguf" in fails(capsys, main, *args, "--output", tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_refused_run_leaves_no_folder(tmp_path, capsys):
    rows, output = write_rows(tmp_path / "rows.jsonl"), tmp_path / "runs" / "mine"
    fails(capsys, main, "--model", "nowhere.gguf", "--dataset", rows, "--output", output)
    assert not output.parent.exists()
    args = ["--model", "nowhere.gguf", "--dataset", rows, "--output", output]
    assert "nowhere.gguf" in fails(capsys, compare.main, "sft", *args)
    assert not output.parent.exists()


def test_the_help_of_a_comparison_tells_its_own_output_folder(capsys):
    with pytest.raises(SystemExit):
        compare.main(["sft", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "of the comparison: its report, its measurements" in said and "runs/sft" not in said


def test_rows_of_ones_own_have_an_output_folder_of_their_own(tmp_path):
    assert parse([]).run.output == "runs/sql"
    assert parse(["--dataset", "x.jsonl"]).run.output == "runs/sft"
    (tmp_path / "run.yaml").write_text("output: here\n")
    given = ["--dataset", "x.jsonl", "--config", str(tmp_path / "run.yaml")]
    assert parse(given).run.output == "here"


def test_a_run_of_ones_own_rows_is_found_where_older_runs_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--dataset", "x.jsonl", "--resume"]
    assert parse(args).run.output == "runs/sft"
    for folder in ("runs/sql", "runs/sft"):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.yaml").write_text("rank: 8")
        assert parse(args).run.output == folder
    assert parse(args[:-1]).run.output == "runs/sft"


SCRIPTS = {
    "sft": main,
    "dpo": dpo.main,
    "grpo": grpo.main,
    "generate": generate.main,
    "serve": serve.main,
    "export": export.main,
    "predict": predict.main,
    "plan": plan.main,
}


@pytest.mark.parametrize(
    ("script", "args", "answer"),
    [
        ("sft", ["--learning-rate", "1e-4"], "--learning-rate is --lr"),
        (
            "sft",
            ["--lora-r=8", "--lora-alpha", "16"],
            "--lora-alpha is --alpha, --lora-r is --rank",
        ),
        ("sft", ["--r", "8", "--num-train-epochs", "1"], "--num-train-epochs is --epochs, --r is"),
        ("sft", ["--load-in-4bit"], "--load-in-4bit is --quantize nf4"),
        (
            "sft",
            ["--bf16", "--max-seq-length", "9"],
            "--dtype bfloat16, --max-seq-length is --seq-len",
        ),
        ("sft", ["--per-device-train-batch-size", "2"], "--batch-size (the rows on all devices"),
        ("dpo", ["--gradient_accumulation_steps", "2"], "--grad-accum"),
        ("dpo", ["--target-modules", "q_proj"], "--target-modules is --targets"),
        ("grpo", ["--model-name-or-path", "x"], "--model-name-or-path is --model"),
        ("generate", ["--max-tokens", "3"], "--max-tokens is --max-new-tokens"),
        ("serve", ["--max-model-len", "3"], "--max-model-len is --max-length"),
        ("export", ["--model-name-or-path", "x"], "--model-name-or-path is --model"),
        ("export", ["--fp16"], "--fp16 is --dtype float16"),
        ("sft", ["--fp16"], "--fp16 is --dtype bfloat16 (there is no float16)"),
        ("sft", ["--use-peft"], "--use-peft is the default (--full trains without"),
        ("predict", ["--max-length", "3"], "--max-length is --seq-len"),
        ("plan", ["--lora-r", "3"], "--lora-r is --rank"),
    ],
)
def test_options_of_other_tools_are_answered_with_ours(script, args, answer, capsys):
    assert answer in fails(capsys, SCRIPTS[script], *args)


def test_a_name_that_means_something_else_here_gets_no_answer(capsys):
    """axolotl's rl is no --loss of supervised training; what trains nothing has no adapter."""
    for script, name in (("sft", "rl"), ("generate", "use-peft"), ("generate", "fp16")):
        assert f"--{name} is " not in fails(capsys, SCRIPTS[script], f"--{name}", "x")


def test_options_of_other_tools_stand_for_options_that_there_are():
    plain = [script([]) for script in (parse, dpo.parse, grpo.parse)]
    ours = {name for options in plain for name in traits_of(options)}
    ours |= {field.name for field in dataclasses.fields(ServeOptions)}
    for name, own in elsewhere._OPTIONS_BY_OTHER_NAME.items():
        assert own.split()[0][2:].replace("-", "_") in ours, name
        assert name not in ours or name == "max_length", name


def test_a_relative_model_is_stored_absolute(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse(["--model", "model"]).data.model == str(tmp_path / "model")
    assert parse(["--model", "owner/model"]).data.model == "owner/model"
