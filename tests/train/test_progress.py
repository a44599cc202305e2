"""Scores, samples, the best adapter and early stopping during a run, also a resumed one."""

import json
import re
import shutil

import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.training.run.lock import LOCK
from tests.support import assert_identical, thorough
from tests.train.scripts import files_of
from tests.train.test_classify import words, write_encoder
from tests.train.test_mesh import inputs as mesh_inputs
from tests.train.test_mesh import run as run_processes
from tests.train.test_sft import adapter_of, fails
from tests.train.tiny import tokenizer, write_jsonl, write_model, write_rows
from train import classify, sft
from train.adapters.source import find_adapter
from train.console.errors import UserError
from train.export import __main__ as export
from train.run import output
from train.run.log import RunLog, read_metrics
from train.run.pretrained import read_model_info
from train.stages.inputs import SamplePrompts

# Orbax leaves coroutines behind where a run is broken off.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """The options of a run that keeps the best of seven measurements, and samples."""
    folder = tmp_path_factory.mktemp("inputs")
    letters = [{"prompt": f"{i} plus {i * 7}?", "completion": f"{i}x"} for i in range(6)]
    rows = write_rows(folder / "rows.jsonl", 30)
    options = ["--model", write_model(folder / "model"), "--dataset", rows, "--packing"]
    options += ["--targets", "q_proj", "--batch-size", 2, "--rank", 2, "--steps", 14, "--lr", 0.03]
    options += ["--dropout", 0.1]
    options += ["--eval-dataset", write_jsonl(folder / "letters.jsonl", letters)]
    options += ["--schedule", "constant", "--warmup", 1, "--eval-every", 2, "--save-every", 5]
    options += ["--keep-best", "loss", "--keep", 1, "--sample-every", 4, "--sample-tokens", 5]
    return [str(option) for option in [*options, "--sample-prompts", "1 plus 7?", "And then?"]]


@pytest.fixture(scope="module")
def whole(chats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    sft.main([*chats, "--output", str(folder)])
    return folder


def without_times(lines):
    return [{k: v for k, v in x.items() if k not in ("time", "tokens_per_s")} for x in lines]


def samples_of(folder):
    return without_times(map(json.loads, (folder / "samples.jsonl").read_text().splitlines()))


@pytest.mark.slow
def test_the_adapter_of_a_run_is_the_best_by_its_metrics(chats, whole, tmp_path):
    losses = {
        line["step"]: line["eval_loss"] for line in read_metrics(whole) if "eval_loss" in line
    }
    step = min(losses, key=losses.get)
    assert 2 < step < 14, "the last step must not be the best"
    best = {"step": step, "eval_loss": losses[step]}
    info = lj.adapter_info(whole / "adapter")
    assert info.items() >= best.items() and info["model"] == chats[1]
    report = json.loads((whole / "report.json").read_text())
    assert report["best"] == best and report["ended_early"] is False
    steps = {"steps": 14, "last_step": 14, "kept_step": step}
    assert report.items() >= steps.items()
    facts = json.loads((whole / "facts.json").read_text())
    assert facts["resolved"]["examples"] == 30, "rows, not the sequences that they are packed into"
    _, params = models.from_pretrained(chats[1])
    kept = lj.load_adapter(whole / "best" / str(step), params)
    export.main(["--adapter", str(whole), "--output", str(tmp_path / "peft")])
    card = (tmp_path / "peft" / "README.md").read_text()
    assert f"| kept step | {step} |" in card and "| steps taken | 14 |" in card
    assert f"| held-out rows, step {step} | {losses[step]:.4f} |" in card
    assert "step 14 |" not in card, "a later step has another adapter"
    assert_identical(lj.split(kept)[0], adapter_of(chats, whole))
    shutil.copytree(whole / "best", tmp_path / "best")  # as on its way, before it has an adapter
    for name in (whole / "best", tmp_path):
        assert find_adapter(str(name)).folder.parts[-2:] == ("best", str(step))
    assert find_adapter(str(whole)).folder == whole / "adapter"


@pytest.mark.slow
def test_answers_are_sampled_at_fixed_steps(whole):
    samples = samples_of(whole)
    assert [(row["step"], row["prompt"]) for row in samples] == [
        (step, prompt) for step in (4, 8, 12, 14) for prompt in ("1 plus 7?", "And then?")
    ]
    assert len({row["answer"] for row in samples}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("at", [13, pytest.param(9, marks=thorough)])
def test_a_run_that_breaks_off_ends_as_a_whole_one_does(chats, whole, tmp_path, monkeypatch, at):
    add = RunLog.add

    def until(self, line):
        add(self, line)
        if line["step"] == at:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunLog, "add", until)
        sft.main([*chats, "--output", str(tmp_path)])
    sft.main([*chats, "--output", str(tmp_path), "--resume"])
    assert_identical(adapter_of(chats, tmp_path), adapter_of(chats, whole))
    assert lj.adapter_info(tmp_path / "adapter") == lj.adapter_info(whole / "adapter")
    assert without_times(read_metrics(tmp_path)) == without_times(read_metrics(whole))
    assert samples_of(tmp_path) == samples_of(whole)
    kept = [{path.name for path in (folder / "best").iterdir()} for folder in (tmp_path, whole)]
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_patience_ends_the_run_and_more_of_it_goes_on(chats, whole, tmp_path, capsys):
    losses = [line["eval_loss"] for line in read_metrics(whole) if "eval_loss" in line]
    worse = next(i for i in range(1, len(losses)) if losses[i] >= min(losses[:i]))
    end = 2 * (worse + 1)  # measured every two steps
    sft.main([*chats, "--output", str(tmp_path), "--patience", "1"])
    assert (
        "ended early, because eval_loss did not improve for 1 measurements"
        in capsys.readouterr().out
    )
    assert read_metrics(tmp_path)[-1]["step"] == end
    assert json.loads((tmp_path / "report.json").read_text())["ended_early"] is True
    before = files_of(tmp_path)
    sft.main([*chats, "--output", str(tmp_path), "--patience", "1", "--resume"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"is finished after step {end}" in said and "or --patience" in said
    assert files_of(tmp_path) == before
    sft.main([*chats, "--output", str(tmp_path), "--patience", "9", "--resume"])
    assert_identical(adapter_of(chats, tmp_path), adapter_of(chats, whole))
    capsys.readouterr()
    message = fails(
        capsys,
        *[word for word in chats if word not in ("--keep-best", "loss")],
        "--output",
        tmp_path,
        "--resume",
    )
    assert "--keep-best was loss and is now None" in message


BAD = [
    ("--keep-best loss", "--keep-best loss compares the measurements of --eval-every"),
    ("--keep-best score", "--keep-best score compares the measurements of --score-every"),
    ("--patience 2", "--patience 2 ends a run that no longer improves.*Add --keep-best"),
    (
        "--eval-every 2 --keep-best loss --patience 0",
        "--patience 0 is out of range. Pass a number of at least 1",
    ),
    ("--score-every 3", "--dataset rows.jsonl has no score except its loss"),
    ("--dataset sql --score-every 3 --eval-questions 0", "--score-every needs questions"),
    ("--sample-prompts hello", "Pass both options"),
    ("--sample-every 2", "Pass both options"),
    ("--sample-tokens 2", "nothing is sampled. Remove --sample-tok"),
    ("--report-to none wandb", "--report-to none wandb must be .*names of reporters"),
    ("--report-to", "names of reporters, or none alone"),
    ("--report-project x", "TensorBoard's files have no project. Remove --report-project"),
    ("--report-to none --report-project x", "Nothing is reported. Remove --report-project"),
]


@pytest.mark.parametrize(("args", "message"), BAD)
def test_options_that_make_no_sense(args, message):
    with pytest.raises(UserError, match=message):
        sft.check(sft.parse(["--dataset", "rows.jsonl", *args.split()]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt cannot be read"),
        ("empty.txt", "\n", "empty.txt is empty"),
        (
            "rows.jsonl",
            '{"prompt": "a"}\n{"text": "b"}',
            "rows.jsonl, line 2 has neither a `prompt`",
        ),
        ("rows.jsonl", '{"prompt"', "rows.jsonl, line 1 is not JSON"),
        (
            "rows.jsonl",
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            "end with a user's",
        ),
        (
            "long.txt",
            "z" * 4100,
            "--sample-prompts and --sample-tokens: the model .* allows at most 4096",
        ),
    ],
)
def test_prompts_that_cannot_be_asked(chats, tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    args = [*chats[: chats.index("--sample-prompts")], "--sample-prompts", path]
    assert re.search(message, fails(capsys, *args, "--output", tmp_path / "run"))


def test_a_file_of_prompts_may_hold_chats(chats, tmp_path):
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]
    rows = [{"prompt": "1 plus 7?"}, {"messages": [*turns, {"role": "user", "content": "And?"}]}]
    path = write_jsonl(tmp_path / "prompts.jsonl", rows)
    config = sft.parse([*chats[: chats.index("--sample-prompts")], "--sample-prompts", str(path)])
    prompts = SamplePrompts(config.run, read_model_info(config.data.model))
    assert prompts.texts == ["1 plus 7?", "And?"]
    decode = tokenizer().decode
    assert decode(prompts.tokens[0]).endswith("1 plus 7?<|im_end|>\n<|im_start|>assistant\n")
    assert "<|im_start|>assistant\n2<|im_end|>" in decode(prompts.tokens[1])


@pytest.mark.slow
def test_a_classifier_keeps_the_most_accurate(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", words(60))
    args = ["--model", write_encoder(tmp_path / "model"), "--dataset", data, "--text", "word"]
    args += ["--label", "grade", "--seq-len", 16, "--batch-size", 8, "--rank", 2, "--lr", 3e-2]
    args += ["--steps", 12, "--eval-every", 3, "--score-every", 3, "--keep-best", "score"]
    folder = tmp_path / "run"
    classify.main([*map(str, args), "--output", str(folder)])
    lines = read_metrics(folder)
    scores = {x["step"]: x["score_accuracy"] for x in lines if "score_accuracy" in x}
    assert scores == {
        x["step"]: pytest.approx(x["eval_accuracy"]) for x in lines if "eval_loss" in x
    }
    step = max(scores, key=scores.get)
    report = json.loads((folder / "report.json").read_text())
    assert report["best"] == {"step": step, "score_accuracy": scores[step]}
    final = json.loads((folder / "scores.json").read_text())["fine-tuned"]
    assert final["accuracy"] == pytest.approx(scores[step])  # the final scores are the best's
    f1 = {x["step"]: x["score_macro_f1"] for x in lines if "score_macro_f1" in x}
    assert final["macro_f1"] == pytest.approx(f1[step])


@pytest.mark.slow
def test_two_processes_decide_alike_and_as_one(tmp_path):
    shared = mesh_inputs(tmp_path, "dense")
    options = "--lr 0.3 --schedule constant --steps 20 --save-every 3 --eval-every 2"
    options += " --keep-best loss --patience 1 --sample-every 2 --sample-tokens 4"
    shared += [*options.split(), "--sample-prompts", "0 ab?"]
    sft.main([*shared, "--output", str(tmp_path / "one")])
    run_processes(shared, [["--output", tmp_path / "two"]], devices=1, processes=2)
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["ended_early"] and reports[1]["ended_early"]
    assert reports[0]["best"]["step"] == reports[1]["best"]["step"]
    assert reports[0]["best"]["eval_loss"] == pytest.approx(reports[1]["best"]["eval_loss"], 1e-3)
    steps = [[line["step"] for line in read_metrics(tmp_path / name)] for name in ("one", "two")]
    assert steps[0] == steps[1]
    asked = [
        [(row["step"], row["prompt"]) for row in samples_of(tmp_path / name)]
        for name in ("one", "two")
    ]
    assert asked[0] == asked[1]


@pytest.mark.slow
def test_overwrite_leaves_nothing_of_an_earlier_run(chats, whole, tmp_path):
    """A new file of a run must be named in train/run/output.py. The control is a file of nobody."""
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    written = {path.name for path in folder.iterdir()}
    (folder / "notes.txt").write_text("a user's own")
    config = sft.parse([*chats, "--output", str(folder), "--overwrite"])
    output.begin(folder, config, "train.sft", {})
    left = {path.name for path in folder.iterdir()} - {LOCK}
    assert left == {"config.yaml", "facts.json", "notes.txt"}
    assert {"metrics.jsonl", "report.json", "adapter", "best", "checkpoints"} <= written
