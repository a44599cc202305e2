"""Tests of paths with a scheme: each option that may take one refuses it by name, before any work.

The options are those that the scripts declare, so that a new one is tested, too.
"""

import dataclasses
import typing
from pathlib import Path

import jax.numpy as jnp
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from lora_jax.folders import RemotePathError, remote_problem
from lora_jax.training.arguments import START, check_folder
from lora_jax.training.errors import TrainingError
from lora_jax.training.run.checkpoints import Checkpoints
from tests.support import over
from tests.train.scripts import fails
from train import classify, distill, dpo, grpo, sft
from train.compare import __main__ as compare
from train.compare.options import CompareConfig
from train.console.errors import UserError
from train.export import __main__ as export
from train.export.options import ExportOptions
from train.findings import __main__ as findings
from train.generate import __main__ as generate
from train.options.paths import path_options
from train.options.scripts import sft as sft_options
from train.plan import __main__ as plan
from train.predict import __main__ as predict
from train.run import output
from train.serve import __main__ as serve
from train.stages import inputs

BUCKET, OTHER_BUCKET = "gs://bucket/run", "s3://bucket/run"
# Options whose folder or file may lie in a bucket of Google's, by script; those of all trainers.
PLACES = {
    "train": {"output", "model", "dataset", "eval_dataset", "init_adapter", "chat_template"},
    "generate": {"adapter", "model", "chat_template"},
    "predict": {"adapter", "model"},
    "export": {"adapter", "model", "output"},
    "plan": {"model"},
    "serve": {"model", "chat_template"},
    "compare": set(),
}
# What takes a text that names no file, or a place that JAX itself reads.
WORDS = {
    "alora",  # the text of an invocation
    "sampler_mount",  # a path on the machine of a server
    *("compilation_cache", "coordinator", "host", "sampler", "allow_origin", "report_project"),
    *("prompt", "system", "stop", "teacher_prompt", "sample_prompts", "texts", "labels"),
}
TRAINING = {"sft": sft, "dpo": dpo, "grpo": grpo, "distill": distill, "classify": classify}
OTHERS = {
    "generate": (generate.main, generate.GenerateOptions, ()),
    "serve": (serve.main, serve.ServeOptions, ()),
    "predict": (predict.main, predict.PredictOptions, ()),
    "export": (export.main, ExportOptions, ("--adapter", "here")),
    "plan": (plan.main, plan.PlanConfig, ("--model", "here")),
    "compare": (lambda args: compare.main(["sft", *args]), CompareConfig, ()),
}


def _scripts():
    """Yields name, main, the classes of the options, and the words that a command line needs.

    Of classes that training scripts share, the first one has them, and the others one alone.
    """
    known = set()
    for name, module in TRAINING.items():
        kinds = {type(part) for part in vars(module.SCRIPT.plain).values()}
        shared = [kind for kind in kinds & known if "output" in _texts([kind])]
        yield name, module.main, [*shared, *(kinds - known)], ()
        known |= kinds
    for name, (main, kind, needed) in OTHERS.items():
        yield name, main, [kind], needed


def _takes_text(kind):
    """Returns whether an option's type has room for any text."""
    if typing.get_origin(kind) is typing.Literal:
        return False
    return kind in (str, typing.Any) or any(map(_takes_text, typing.get_args(kind)))


def _texts(parts):
    kinds = {name: kind for part in parts for name, kind in typing.get_type_hints(part).items()}
    return sorted(name for name, kind in kinds.items() if _takes_text(kind))


@over(
    ("script", "main", "parts", "needed"),
    _scripts(),
    often=["sft", "generate", "serve", "predict", "export", "plan", "compare"],
    called=lambda script: script[0],
)
def test_each_option_that_takes_a_path_refuses_a_scheme(script, main, parts, needed, capsys):
    options = [name for name in _texts(parts) if name not in {*WORDS, "remat"}]  # a policy's name
    assert {"output", "out", "model"} & {*options} or parts == [CompareConfig]
    for name in options:
        flag = f"--{name.replace('_', '-')}"
        others = [] if flag in needed else needed
        for path, tool in ((BUCKET, "gcsfuse"), (OTHER_BUCKET, "mount-s3")):
            if path == BUCKET and name in PLACES.get(script, PLACES["train"]):
                continue  # it may lie there: tests/buckets
            said = fails(capsys, main, *others, flag, path)
            assert said.startswith(f"{flag} {path} is no path of this machine"), (
                script,
                name,
                said,
            )
            assert tool in said
    assert not any(Path.cwd().iterdir())


def test_files_of_options_and_tables_are_refused_by_their_lines(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"steps: 1\noutput: {OTHER_BUCKET}\n")
    said = fails(capsys, sft.main, "--config", tmp_path / "run.yaml")
    assert f"--output {OTHER_BUCKET} (line 2 of {tmp_path}/run.yaml) is no path" in said
    (tmp_path / "runs.csv").write_text("name,init_adapter\na,s3://bucket/adapter\n")
    said = fails(capsys, sft.main, "--many", tmp_path / "runs.csv", "--output", tmp_path / "many")
    assert "runs.csv, line 2: --init-adapter s3://bucket/adapter is no path" in said
    assert "mount-s3" in said
    said = fails(capsys, sft.main, "--many", tmp_path / "runs.csv", "--output", BUCKET)
    assert f"--output {BUCKET} is no path" in said  # a table is a folder of this machine
    for flag in ("--output", "--from"):
        assert f"{flag} {BUCKET} is no path" in fails(capsys, findings.main, "rates", flag, BUCKET)
    said = fails(capsys, findings.main, "rates", "--test", BUCKET)
    assert said.startswith(f"--test {BUCKET} is no path") and not Path("runs").exists()
    with pytest.raises(UserError, match=f"--sample-prompts {BUCKET}.txt is no path"):
        inputs._read_chats([f"{BUCKET}.txt"])
    assert not (tmp_path / "many").exists()


def test_names_in_front_of_paths_and_texts_that_are_none(capsys):
    said = fails(capsys, generate.main, "--adapter", "mine=s3://bucket/a")
    assert "--adapter mine=s3://bucket/a is no path" in said
    options = generate.parse(["--prompt", "s3://bucket: what is it?", "--stop", "gs://"])
    assert "prompt" not in dict(path_options(options))
    reports = ["--report-to", "mlflow", "--report-project", "mlflow://runs"]
    config = sft.parse(["--compilation-cache", BUCKET, *reports])
    assert config.run.compilation_cache == BUCKET  # JAX reads it


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("gs://bucket/run", "gcsfuse"),
        ("s3://bucket/run", "mount-s3"),
        ("az://bucket", "blobfuse2"),
        ("hf://datasets/owner/name", "without a scheme, owner/name"),
        ("https://huggingface.co/owner/name/tree/main", "without a scheme, owner/name"),
        ("http://hf.co/owner/name", "without a scheme, owner/name"),
        ("https://hf.co/datasets/owner/name", "without a scheme, owner/name"),
        ("https://huggingface.co/spaces/owner/name", "A space of the Hub is neither a model"),
        ("hf://spaces/owner/name", "A space of the Hub is neither a model"),
        ("https://example.org/hf.co/owner/name", "Copy the files"),
        ("file:///tmp/run", "pass /tmp/run"),
        ("file:/tmp/run", "pass /tmp/run"),
        ("gs:/bucket/run", "gcsfuse"),
        ("made-up://x", "Copy the files"),
        *((text, None) for text in ("C:\\runs", "C:/runs", "C://runs", "owner/name", "a:b/c")),
        *((text, None) for text in ("runs/x", "~/x", "", "rows.jsonl:3", "file.py:function")),
    ],
)
def test_what_is_a_scheme(path, says):
    problem = remote_problem(path)
    assert problem is None if says is None else says in problem


def test_functions_of_the_library_refuse_a_scheme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    model = models.GPT2(models.read_config(fields | {"n_positions": 16}))
    params = {"dense": {"kernel": jnp.ones((4, 3))}}
    tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    for call in (
        lambda: lj.save_adapter(OTHER_BUCKET, tree),
        lambda: lj.load_adapter(OTHER_BUCKET, params),
        lambda: lj.adapter_info(OTHER_BUCKET),
        lambda: models.save_pretrained(OTHER_BUCKET, model, params),
        lambda: models.save_pretrained("out", model, params, codes_from=OTHER_BUCKET),
        lambda: lp.save(OTHER_BUCKET, model, tree),
        lambda: lp.load(OTHER_BUCKET, model, params),
        lambda: lp.rules(OTHER_BUCKET),
        lambda: lp.serving_problems(OTHER_BUCKET),
        lambda: Checkpoints(OTHER_BUCKET, 2),
    ):
        with pytest.raises(RemotePathError, match="s3:/+bucket/run is no path of this machine"):
            call()
    for call in (models.from_pretrained, models.load_tokenizer, models.fetch):
        with pytest.raises(
            models.ModelNotFound, match=f"{OTHER_BUCKET} is no path of this machine"
        ):
            call(OTHER_BUCKET)
    with pytest.raises(
        TrainingError, match=f"the folder {OTHER_BUCKET} is no path of this machine"
    ):
        check_folder(OTHER_BUCKET, resume=False, overwrite=False)
    assert not any(Path.cwd().iterdir())


@pytest.mark.parametrize("resumes", [True, False])
def test_an_earlier_run_in_a_working_copy_goes_in_each_process(tmp_path, resumes):
    config = sft_options.Config()
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=resumes))
    copy, shared = tmp_path / "a disk/lora_jax_bucket_x/gs/bucket/run", tmp_path / "run"
    for folder in (copy, shared):
        (folder / START).mkdir(parents=True)
        output.clear_copy(folder, config)
    assert (copy / START).exists() == resumes and (shared / START).exists()
