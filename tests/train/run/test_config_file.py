"""Options in YAML files: what is read, what is refused, and that a written file repeats a run."""

import json

import pytest

from tests.train.tiny import write_model, write_rows
from train import classify, sft
from train.console.errors import UserError
from train.run.log import read_metrics
from train.run.output import PROCESS_SECONDS
from train.settings.files import effective_options, options_file
from train.sft import parse


def write(folder, text):
    path = folder / "options.yaml"
    path.write_text(text)
    return str(path)


def test_a_file_holds_options_by_their_names_and_flags_override_it(tmp_path):
    path = write(
        tmp_path,
        """
        dataset: rows.jsonl   # a comment
        token-cache: off
        targets: [q_proj, v_proj]
        layers: 3
        rank: 4
        dora: true
        lr: 1e-3
        epochs: 2
        remat: dots_saveable
        eval_dataset: null
        output: runs/from file
        """.replace("\n        ", "\n"),
    )
    args = ["--config", path]
    on_line = "--dataset rows.jsonl --token-cache off --targets q_proj v_proj --layers 3 --rank 4"
    on_line += " --dora --lr 1e-3 --epochs 2 --remat dots_saveable"
    expected = effective_options(parse([*on_line.split(), "--output", "runs/from file"]))
    assert effective_options(parse(args)) == expected
    assert expected["alpha"] == 8.0  # the task's default, twice the rank
    changed = effective_options(
        parse([f"--config={path}", "--rank", "2", "--no-dora", "--steps", "9"])
    )
    kept = {name: value for name, value in expected.items() if name != "epochs"}
    assert changed == {**kept, "rank": 2, "alpha": 4.0, "dora": False, "steps": 9}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: 4\nrnak: 8", "line 2: There is no option rnak. The nearest option is rank"),
        ("lora_r: 8", "There is no option lora_r. Use --rank"),
        ("head-only: true", "There is no option head-only"),  # that is one of train.classify
        ("adapter:\n  rank: 4", "adapter is not an option. A file of options has no groups"),
        ("config: b.yaml", "--config names this file and cannot be set in it"),
        ("rank: 4\nlr: 1\nrank: 8", "line 3: rank is already set in line 1"),
        ("rank: 4.5", "line 1: rank is 4.5. Write a whole number"),
        ("rank: '4'", "rank is '4'. Write a whole number"),
        ("rank:", "rank is nothing. Write a whole number"),
        ("rank: [4]", "rank is a list. Write a whole number"),
        ("lr: fast", "lr is fast. Write a number"),
        ("dora: 1", "dora is 1. Write true or false"),
        ("layers: [1, two]", "layers is a list. Write a whole number"),
        ("schedule: cosin", "schedule is cosin. Write one of constant, linear, cosine, "),
        ("remat: true", "remat is true. Write one of auto, none, full, products, projections, "),
        ("remat: products:0", "remat is products:0. Write one of auto, .* or products:N with a "),
        ("dataset: {a: b}", "dataset is a group of keys. Write a text"),
        ("- rank", "does not map names of options"),
        ("rank: [", "line 1 is not valid YAML: "),
        ("full: true\nrank: 4", r"Remove rank \(line 2 of .*options.yaml\)\.$"),
        ("batch_size: 0", "--batch-size 0 is out of range. Pass a number of at least 1"),
        ("lr: .nan", "--lr nan is out of range. Pass a positive learning rate"),
    ],
)
def test_what_no_option_takes_is_refused_with_its_line(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        sft.check(parse(["--config", write(tmp_path, text)]))


def test_files_that_cannot_be_read_are_named(tmp_path, capsys):
    for path, words in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(SystemExit) as caught:
            sft.main(["--config", str(path)])
        assert caught.value.code == 2
        assert f"error: --config {path} cannot be read: {words}" in capsys.readouterr().err
    (tmp_path / "latin").write_bytes(b"output: \xe4")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        parse(["--config", str(tmp_path / "latin")])


BOTH = [
    "",
    "--dataset rows.jsonl --eval-every 5 --remat",
    "--full --steps 7 --output null",
    "--targets none --train norm 1e-3 --bias all",
    "--peft-config nowhere --epochs 0.5",
    "--dataset owner/name --split yes --grad-clip 1e3 --resume",
]
OF_SFT = ["--targets .*(q|k)_proj/kernel --layers 1 2 --token-cache off --weight-decay 1e-6"]
OF_SFT += ["--dataset rows.jsonl --lr-rule qwen"]
OF_CLASSIFY = ["--head-only --dataset owner/name --subset 2024-01-01 --test test"]


@pytest.mark.parametrize(
    ("script", "args"),
    [(sft, args) for args in BOTH + OF_SFT] + [(classify, args) for args in BOTH + OF_CLASSIFY],
)
def test_what_is_written_is_read_as_the_same_options(script, args, tmp_path):
    config = script.parse(args.split())
    path = write(tmp_path, options_file(config, "train.sft"))
    again = script.parse(["--config", path])
    script.check(again)
    assert effective_options(again) == effective_options(config)
    assert options_file(again, "train.sft") == options_file(config, "train.sft")


@pytest.mark.slow
def test_a_run_is_repeated_bitwise_by_the_file_that_it_leaves(tmp_path, capsys):
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    args = ["--model", model, "--dataset", rows, "--epochs", 1, "--batch-size", 2, "--rank", 2]
    args += [
        "--packing",
        "--dropout",
        0.1,
        "--seed",
        3,
        "--eval-every",
        2,
        "--output",
        tmp_path / "first",
    ]
    sft.main([*map(str, args)])
    file = tmp_path / "first" / "config.yaml"
    sft.main(["--config", str(file), "--output", str(tmp_path / "second")])
    kept = [
        [{k: v for k, v in line.items() if k not in ("time", "tokens_per_s")} for line in lines]
        for lines in (read_metrics(tmp_path / name) for name in ("first", "second"))
    ]
    assert kept[0] == kept[1] and len(kept[0]) > 3
    facts = [
        json.loads((tmp_path / name / "facts.json").read_text()) for name in ("first", "second")
    ]
    for run in facts:
        assert run.pop(PROCESS_SECONDS)  # a process says when it began, and how long it worked
    assert facts[0] == facts[1]
    # In its own folder the same file goes on with the run, and does not begin it again.
    with pytest.raises(SystemExit):
        sft.main(["--config", str(file)])
    assert "already contains a run" in capsys.readouterr().err
    sft.main(["--config", str(file), "--resume", "--steps", "9"])
    assert "epochs" not in file.read_text() and "steps: 9" in file.read_text()
