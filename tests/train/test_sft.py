"""The whole script on a tiny model: what it leaves, resuming, stopping, and bad input."""

import json
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.training.losses import Loss, token_loss
from lora_jax.training.run.checkpoints import Checkpoints
from tests.support import THOROUGH, assert_identical, thorough
from tests.train.forks import Forked
from tests.train.scripts import begun, files_of
from tests.train.tiny import tokenizer, write_jsonl, write_model, write_rows
from train.generate import __main__ as generate
from train.run.log import read_metrics
from train.run.pretrained import read_model
from train.sft import main

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The options that name the tiny model and 24 rows."""
    folder = tmp_path_factory.mktemp("inputs")
    model, rows = write_model(folder / "model"), write_rows(folder / "rows.jsonl")
    options = ["--batch-size", "4", "--rank", "2", "--alpha", "20", "--targets", "q_proj", "v_proj"]
    return ["--model", str(model), "--dataset", str(rows), *options]


def run(inputs, folder, *args):
    main([*inputs, "--output", str(folder), *map(str, args)])
    return folder


def fails(capsys, *args):
    """What the script says before it ends with the code for bad input."""
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert "Traceback" not in captured.err and "loss" not in captured.out
    message = captured.err.strip()
    assert message.startswith("error: ")
    return message


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A run of six steps without a break."""
    folder = tmp_path_factory.mktemp("whole")
    options = ["--steps", 6, "--lr", 3e-3, "--schedule", "constant", "--warmup", 1]
    return run(inputs, folder, *options, "--dropout", 0.1)


def adapter_of(inputs, folder):
    """The adapter that a run left, on its base."""
    _, params = models.from_pretrained(inputs[1])
    return lj.split(lj.load_adapter(folder / "adapter", params))[0]


def test_a_run_leaves_all_that_it_should(inputs, whole):
    names = {path.name for path in whole.iterdir()}
    assert names == {
        *("adapter", "checkpoints", "checkpoints.json", "config.yaml", "loss.png"),
        *("facts.json", "metrics.jsonl", "report.json"),
        "tensorboard",
    }
    facts = json.loads((whole / "facts.json").read_text())
    assert facts["resolved"]["steps"] == 6 and facts["resolved"]["examples"] == 24
    assert facts["summary"].startswith("trainable params: ") and "jax" in facts["versions"]
    report = json.loads((whole / "report.json").read_text())
    assert report["compiled_bytes"]["temporaries"] > 0 and report["median_step_seconds"] > 0
    assert 0 < report["adapter_bytes"] and 0 < report["base_bytes"]
    lines = read_metrics(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert any(np.any(parts["b"]) for parts in adapter_of(inputs, whole).values())


@pytest.mark.slow
def test_a_resumed_run_ends_bitwise_where_a_whole_one_does(inputs, whole, tmp_path, capsys):
    options = ["--schedule", "constant", "--lr", 3e-3, "--warmup", 1, "--dropout", 0.1]
    run(inputs, tmp_path, "--steps", 3, *options)
    run(inputs, tmp_path, "--steps", 6, *options, "--resume")
    said = capsys.readouterr().out
    assert "training continues after step 3" in said
    assert [*re.findall(r"the whole run took \d.* s( in \d processes)?;", said)] == [
        "",
        " in 2 processes",
    ]
    assert_identical(adapter_of(inputs, whole), adapter_of(inputs, tmp_path))
    lines, expected = read_metrics(tmp_path), read_metrics(whole)
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]


def test_a_finished_run_is_left_as_it_is(inputs, whole, capsys, monkeypatch):
    """Neither is the model read, nor a file changed."""
    before = files_of(whole)
    monkeypatch.setattr("train.stages.begin.load_base", None)
    options = ["--steps", 6, "--lr", 3e-3, "--schedule", "constant", "--warmup", 1]
    run(inputs, whole, *options, "--dropout", 0.1, "--resume")
    said = " ".join(capsys.readouterr().out.split())
    assert f"{whole} is finished after step 6" in said and "increase --steps" in said
    assert files_of(whole) == before


@pytest.mark.slow
def test_a_run_killed_between_a_checkpoint_and_its_record_ends_bitwise(
    inputs, whole, tmp_path, capsys, monkeypatch
):
    """The record is written by a later process: as a kill in between would leave it."""
    options = ["--steps", 6, "--lr", 3e-3, "--schedule", "constant", "--warmup", 1]
    options += ["--dropout", 0.1, "--save-every", 2, "--keep", 1]

    class Killed(BaseException):
        pass

    def stop_at(step):
        real = Checkpoints._record_files

        def recorded(self, at, kept):
            if at == step:
                raise Killed
            real(self, at, kept)

        return recorded

    for step, resume in ((2, []), (4, ["--resume"])):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Checkpoints, "_record_files", stop_at(step))
            run(inputs, tmp_path, *options, *resume)
        assert (tmp_path / "checkpoints" / str(step)).is_dir()
    run(inputs, tmp_path, *options, "--resume")
    shown = capsys.readouterr().out
    assert shown.count("there is no checkpoint yet") == 1
    assert shown.count("training continues after step 2") == 1 and "after step 4" not in shown
    assert_identical(adapter_of(inputs, whole), adapter_of(inputs, tmp_path))
    lines, expected = read_metrics(tmp_path), read_metrics(whole)
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]


def test_a_truncated_checkpoint_stops_a_resumed_run_before_it_trains(
    inputs, whole, tmp_path, capsys
):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", whole, copy], check=True)
    arrays = (copy / "checkpoints" / "6" / "state").rglob("d/*")
    largest = sorted(arrays, key=lambda path: path.stat().st_size)[-2:]  # written, and put together
    for path in largest:
        path.write_bytes(path.read_bytes()[:100])
    options = ["--steps", 6, "--lr", 3e-3, "--schedule", "constant", "--warmup", 1]
    options += ["--dropout", 0.1]
    message = fails(capsys, *inputs, "--output", copy, *options, "--resume")
    assert f"the checkpoint {copy / 'checkpoints' / '6'} is damaged" in message
    assert "Start again with --overwrite" in message


def test_a_peft_configuration_says_what_trains(inputs, tmp_path):
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "lora_dropout": 0.5}
    config |= {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(config))
    params = begun(main, *inputs[:4], "--output", tmp_path / "run", "--peft-config", path)
    nodes = [node for node in jax.tree.leaves(params, is_leaf=lj.is_node) if lj.is_node(node)]
    assert {where.split("/")[-2] for where in lj.split(params)[0]} == {"q_proj", "v_proj"}
    assert all(node.dropout == 0.5 and node.scale[1] == np.float32(7 / 3) for node in nodes)
    trained = 3 * (24 + 24) + 3 * (24 + 8)  # of one layer
    assert lj.summary(params).startswith(f"trainable params: {trained} ")


def test_other_data_are_not_resumed_on(inputs, whole, tmp_path, capsys):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", whole, copy], check=True)
    rows = Path(inputs[3])
    before = rows.read_text()
    rows.write_text(before.replace("plus", "and"))
    options = ["--steps", 6, "--lr", 3e-3, "--schedule", "constant", "--warmup", 1]
    options += ["--dropout", 0.1]
    message = fails(capsys, *inputs, "--output", copy, *options, "--resume")
    rows.write_text(before)
    assert "the training data differ from those that the run began with" in message


@pytest.mark.slow
def test_the_adapter_answers_and_goes_on_training(inputs, whole, tmp_path, capsys):
    args = ["--adapter", str(whole / "adapter"), "--max-new-tokens", "5", "--prompt", "1 plus 7?"]
    generate.main(args)  # the model's name is read from the run beside the adapter
    answer = capsys.readouterr().out
    generate.main(["--model", inputs[1], *args[2:]])
    assert answer != capsys.readouterr().out
    first = begun(main, *inputs[:6], "--output", tmp_path, "--init-adapter", whole / "adapter")
    assert_identical(lj.split(first)[0], adapter_of(inputs, whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "--init pissa --dora --bias adapted --train norm --train-tokens 5 7 --lora-plus 4",
        pytest.param(
            "--init olora --freeze-a --lr-rule llama --scaling alpha/sqrt(rank)", marks=thorough
        ),
    ],
)
def test_methods_resume_bitwise_and_decompose_once(inputs, tmp_path, method, monkeypatch):
    options = [*method.split(), "--schedule", "constant", "--warmup", 1]
    whole = run(inputs, tmp_path / "whole", "--steps", 4, *options)
    assert (whole / "start").is_dir()
    run(inputs, tmp_path / "parts", "--steps", 2, *options)
    for name in ("svd", "qr"):
        monkeypatch.setattr(jax.numpy.linalg, name, only_shapes_of(getattr(jax.numpy.linalg, name)))
    run(inputs, tmp_path / "parts", "--steps", 4, *options, "--resume")
    resumed = adapter_of(inputs, tmp_path / "parts")
    assert_identical(adapter_of(inputs, whole), resumed)
    kinds = {name for parts in resumed.values() for name in parts}
    assert kinds == ({"b"} if "freeze" in method else {"a", "b", "magnitude", "value"})


def only_shapes_of(decompose):
    def checked(matrix, **options):
        assert isinstance(matrix, jax.core.Tracer), "decomposed again"
        return decompose(matrix, **options)

    return checked


@pytest.mark.slow
def test_full_fine_tuning_is_the_same_script(inputs, tmp_path, monkeypatch):
    read = []

    def reading(*args, **options):
        read.append(read_model(*args, **options))
        return read[-1]

    monkeypatch.setattr("train.stages.begin.read_model", reading)
    run(
        *(inputs[:6], tmp_path, "--full", "--steps", 2, "--lr", 1e-3, "--grad-accum", 2),
        *("--eval-every", 1, "--dtype", "bfloat16", "--remat", "--attention", "blockwise"),
    )
    assert [(model.remat, model.attention) for model, _ in read] == [(True, "blockwise")]
    _, params = models.from_pretrained(inputs[1])
    adapter = lj.split(lj.load_adapter(tmp_path / "adapter", params))[0]
    assert all(set(parts) == {"value"} for parts in adapter.values())
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {np.dtype("float32")}
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "eval_loss" in line] == [1, 2]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--targets", "q_porj"], ["selects no leaf", "q_proj/kernel"]),
        (["--targets", "q_proj", "foo_proj"], ["'foo_proj'", "selects no leaf", "o_proj/kernel"]),
        (["--train", "norm", "lm_head"], ["'lm_head'", "selects no leaf", "embed_tokens"]),
        (
            ["--targets", "q_proj", ".*v_proj.*"],
            ["'.*v_proj.*' is not a name", "one regular expression"],
        ),
        (["--layers", "7"], ["has none of the layers (7,)"]),
        (
            ["--experts", "blocks"],
            ["--experts blocks has no effect", "is not a mixture of experts"],
        ),
        (["--seq-len", "5000"], ["--seq-len 5000: the model", "allows at most 4096 tokens"]),
        (["--seq-len", "40"], ["of 24 sequences are longer than --seq-len 40", "--truncate"]),
        (["--model", "nowhere.gguf"], ["--model nowhere.gguf: nowhere.gguf is neither a file"]),
        (["--dataset", "nowhere.jsonl"], ["--dataset nowhere.jsonl does not exist"]),
        (["--eval-every", "1", "--eval-questions", "0"], ["needs held-out rows"]),
        (["--batch-size", "0"], ["--batch-size 0 is out of range. Pass a number of at least 1"]),
    ],
)
def test_bad_input_is_one_paragraph_before_training(inputs, tmp_path, capsys, args, words):
    message = fails(capsys, *inputs, "--output", tmp_path, *args)
    assert all(word in message for word in words), message
    assert list(tmp_path.iterdir()) == []


def test_a_row_without_the_fields_is_named(inputs, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, {"text": "c"}])
    message = fails(capsys, *inputs, "--dataset", rows, "--output", tmp_path / "run")
    assert f"{rows}, line 2 has `text`; a row needs `messages`" in message


@pytest.mark.slow
@pytest.mark.parametrize("packing", [[], ["--packing", "--seq-len", "128"]])
def test_the_script_names_the_rows_of_the_data(tmp_path, capsys, monkeypatch, packing):
    def poisoned(name, **options):
        def poisoned_sums(forward, params, batch, dropout_key=None):
            sums = token_loss(name, **options)(forward, params, batch, dropout_key)
            factor = jnp.where(jnp.any(batch["ids"] == marked), jnp.inf, 1.0)
            return sums._replace(total=sums.total * factor)

        return Loss(poisoned_sums)

    (marked,) = tokenizer()("~")["input_ids"]
    rows = write_rows(tmp_path / "rows.jsonl", 6)
    changed = [json.loads(text) for text in rows.read_text().splitlines()]
    changed[3]["prompt"] += "~"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in changed))
    monkeypatch.setattr("train.tasks.chats.token_loss", poisoned)
    args = ["--model", str(write_model(tmp_path / "model")), "--dataset", str(rows), *packing]
    args += ["--batch-size", "1", "--epochs", "1", "--rank", "2", "--targets", "q_proj", "--output"]
    main([*args, str(tmp_path / "run")])
    (skipped,) = json.loads((tmp_path / "run" / "report.json").read_text())["skipped_steps"]
    assert f"step {skipped} skipped: its loss is inf" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*args, str(tmp_path / "other"), "--max-skipped", "1"])
    message = capsys.readouterr().err
    named = message.split("its batch ")[1].split(f" of {rows}")[0].split(", ")
    assert "row 4" in named and (len(named) > 1) == bool(packing)
    assert f"step {skipped}" in message and "Traceback" not in message


def test_a_folder_with_another_run_is_left_alone(inputs, whole, capsys):
    before = (whole / "config.yaml").read_text()
    message = fails(capsys, *inputs, "--output", whole)
    assert "already contains a run" in message
    message = fails(capsys, *inputs, "--output", whole, "--resume", "--seed", 1)
    assert "--seed was 0 and is now 1" in message
    assert (whole / "config.yaml").read_text() == before


def test_truncated_weights_are_named(inputs, tmp_path, capsys):
    folder = write_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    message = fails(capsys, *inputs, "--model", folder, "--output", tmp_path / "run")
    assert f"{weights} is damaged or cut short" in message


def test_a_model_that_continues_no_text_is_refused(inputs, tmp_path, capsys):
    folder = write_model(tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "bert", "vocab_size": 259}')
    message = fails(capsys, *inputs, "--model", folder, "--output", tmp_path / "run")
    assert message.endswith("is a bert model, which does not generate text. Pass a language model.")


def test_an_adapter_is_refused_on_another_base(inputs, whole, tmp_path, capsys):
    other = write_model(tmp_path / "model", scale=1.5)
    args = [*inputs[:6], "--model", other, "--init-adapter", whole / "adapter"]
    message = fails(capsys, *args, "--output", tmp_path / "run")
    assert "trained on another base" in message and "--allow-base-mismatch" in message
    forced = begun(main, *args, "--output", tmp_path / "run", "--allow-base-mismatch")
    assert_identical(lj.split(forced)[0], adapter_of(inputs, whole))


def start(inputs, folder, *args):
    """The script as a process of its own, which takes programs from earlier ones, as users' do."""
    cache = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": f"{folder}-cache"}
    words = ["-m", "train.sft", *inputs, "--output", folder, *args]
    return Forked(words, folder.parent, cache)


def wait_for_step(process, step):
    while process.poll() is None:
        steps = re.findall(r"^step (\d+)/", process.out.read_text(), re.MULTILINE)
        if steps and int(steps[-1]) >= step:
            return
        time.sleep(0.01)
    pytest.fail(f"the process ended with {process.returncode} before step {step}")


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_bitwise_where_a_whole_one_does(inputs, tmp_path, capsys):
    kills, steps = (20, 400) if THOROUGH else (1, 30)
    often = ["--steps", steps, "--save-every", 2, "--dropout", 0.1]
    run(inputs, tmp_path / "whole", *often)
    seed = int(time.time())
    draw = random.Random(seed)
    folder = tmp_path / "killed"
    for attempt in range(kills):
        process = start(inputs, folder, *often, *(["--resume"] if attempt else []))
        first = max([line["step"] for line in read_metrics(folder)] or [0]) - 1
        wait_for_step(process, draw.randint(max(first, 1), first + 18))
        time.sleep(draw.random() / 20)  # in the middle of a step, or of saving
        process.kill()
        process.communicate()
    capsys.readouterr()
    run(inputs, folder, *often, "--resume")
    assert f" s in {kills + 1} processes; its files are in" in capsys.readouterr().out
    assert_identical(adapter_of(inputs, tmp_path / "whole"), adapter_of(inputs, folder)), seed
    assert [line["step"] for line in read_metrics(folder)] == [*range(1, steps + 1)]


@pytest.mark.slow
def test_a_signal_saves_and_ends_cleanly(inputs, tmp_path):
    """Sends SIGINT; test_endings.py sends SIGTERM."""
    process = start(inputs, tmp_path, "--steps", 400, "--save-every", 7, "--dropout", 0.1)
    wait_for_step(process, 9)
    process.send_signal(signal.SIGINT)
    output = "".join(process.communicate())
    assert process.returncode == 130
    assert "Traceback" not in output
    assert "stopped after step" in output and "--resume" in output
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert saved == read_metrics(tmp_path)[-1]["step"] >= 9


def cut_short(*_):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_the_default_task_on_a_tiny_model(inputs, tmp_path, capsys, monkeypatch):
    args = ["--model", inputs[1], "--output", str(tmp_path), "--seq-len", "700", "--rows", "20"]
    args += ["--targets", "q_proj", "--steps", "2", "--eval-questions", "2", "--eval-every", "2"]
    args += ["--score-every", "1", "--keep-best", "score"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.tasks.sql.SqlEvaluation.after", cut_short)
        main(args)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (
        report["median_step_seconds"] > 0
        and "fine-tuned" not in (tmp_path / "scores.json").read_text()
    )
    assert "zero-shot: answering" in capsys.readouterr().out
    main([*args, "--resume"])  # its evaluation was cut short
    again = json.loads((tmp_path / "report.json").read_text())
    names = ("steps", "last_step", "median_step_seconds", "peak_bytes")
    assert [again[name] for name in names] == [report[name] for name in names]
    scored = [line for line in read_metrics(tmp_path) if "score_accuracy" in line]
    assert [line["step"] for line in scored] == [1, 2]
    names = {name for name in scored[0] if name.startswith("score_")}
    assert names == {"score_accuracy", "score_unseen_schemas", "score_unseen_phrasings"}
    assert lj.adapter_info(tmp_path / "adapter")["step"] in (1, 2)
    shown = capsys.readouterr().out
    assert "Execution accuracy" in shown and "zero-shot" in shown and "Examples" in shown
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["questions_of_each_kind"] == 2
    for row in scores["accuracy"].values():
        assert set(row) == {"base, zero-shot", "base, 4 examples", "fine-tuned"}
    assert "zero-shot: answering" not in shown  # the base's answers are kept
    before = files_of(tmp_path)
    main([*args, "--resume"])
    shown = capsys.readouterr().out
    assert "is finished" in " ".join(shown.split()) and "answering" not in shown
    assert files_of(tmp_path) == before
    accuracy = np.mean([row["fine-tuned"] for row in scores["accuracy"].values()])
    kept = json.loads((tmp_path / "report.json").read_text())["scores"]
    assert kept["accuracy"] == pytest.approx(accuracy)
