"""--stream: the script on data that it reads while it trains."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from lora_jax import load_adapter
from lora_jax.training.errors import TrainingError
from tests.train import tiny_qwen_vl
from tests.train.test_sft import fails
from tests.train.tiny import decoder, tokenizer, write_jsonl, write_model
from train.data import blocks
from train.run.pretrained import ModelInfo
from train.sft import main, parse
from train.tasks import stream


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def small(monkeypatch):
    """Blocks of some rows, and chunks of some blocks."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 400)
    monkeypatch.setattr(stream, "ROOM", 2000)
    monkeypatch.setattr(stream, "_MIN_SAMPLE_BYTES", 400)


def rows(n, answer="so it is"):
    return [{"prompt": f"{i} plus {i}?", "completion": answer * (1 + i % 3)} for i in range(n)]


def trained(folder):
    return jax.tree.leaves(load_adapter(folder / "adapter", decoder()[1]))


@pytest.mark.slow
def test_a_streamed_run_goes_on_bitwise_in_the_middle_of_the_data(model, small, tmp_path, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", rows(120))
    args = ["--model", model, "--dataset", data, "--seq-len", "96", "--truncate", "--stream"]
    args += ["--batch-size", "4", "--schedule", "constant", "--save-every", "3", "--packing"]
    args = [str(arg) for arg in args]

    def run(folder, *more):
        main([*args, "--output", str(folder), *more])
        return capsys.readouterr().out

    said = run(tmp_path / "whole", "--steps", "16")
    assert "chunks per epoch, within which rows are shuffled" in said
    run(tmp_path / "parts", "--steps", "7")
    assert "training continues after step 7" in run(tmp_path / "parts", "--steps", "16", "--resume")
    for one, other in zip(trained(tmp_path / "whole"), trained(tmp_path / "parts"), strict=True):
        np.testing.assert_array_equal(one, other)
    write_jsonl(data, rows(120, "so it was"))
    said = fails(capsys, *args, "--output", tmp_path / "parts", "--steps", 20, "--resume")
    assert "the training data differ from those that the run began with" in said


def test_a_row_that_cannot_be_used_is_named_when_it_comes(small, tmp_path):
    found = rows(120)
    found[100] = {"prompt": "?"}
    data = write_jsonl(tmp_path / "rows.jsonl", found)
    at = len("".join(f"{json.dumps(row)}\n" for row in found[:100]))
    config = parse(["--dataset", str(data), "--truncate", "--stream", "--steps", "90"])
    outline = ModelInfo("a model", tokenizer(), None, {})
    feed = stream.examples(config, stream.read_rows(config), outline).feed(90)
    with pytest.raises(TrainingError, match=rf"line 101 \(byte {at:,}\) has `prompt`; a row"):
        for step in range(90):
            feed.batch(step)
    assert step > 1  # of the chunks before


def test_a_model_with_images_is_its_text(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", rows(3))
    folder = tiny_qwen_vl.write_qwen_vl(tmp_path / "model")
    args = ["--dataset", data, "--model", folder, "--truncate", "--stream", "--steps", 9]
    config = parse([*map(str, args)])
    outline = stream.TASK.outline(config, stream.TASK.rows(config))
    assert outline.can_have_images and outline.config.model_type == "qwen3_5_text"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "--stream does not count the rows"),
        ("--steps 9", "Pass --truncate, which cuts off rows longer than --seq-len 128"),
        ("--epochs 2", "--stream reads rows while training, .*Remove --epochs"),
        ("--steps 9 --truncate --rows 3", "Remove --rows"),
        ("--steps 9 --truncate --token-cache x", "Remove --token-cache"),
        ("--steps 9 --truncate --eval-every 3", "cannot hold rows out for --eval-every"),
        ("--steps 9 --truncate --dataset sql", "--stream reads your own rows, but sql is a task"),
        ("--steps 9 --truncate --dataset a:1 b:2", "Remove the weights of --dataset a:1 b:2"),
        ("--steps 9 --truncate --dataset a b --fields text=t", "--fields only for a single"),
        ("--steps 9 --truncate --dataset a.csv", "a.csv does not exist"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(args, message, capsys, tmp_path):
    args = args.split()
    if "--dataset" not in args:
        args += ["--dataset", "a.jsonl"]
    said = fails(capsys, "--stream", *args, "--output", tmp_path / "run")
    assert re.search(message, said), said


# Prints the peak memory after each chunk of a stream, or with all rows in memory.
MEASURED = """
import re, sys
from pathlib import Path
from lora_jax.training.data.stream import Stream
from tests.train.tiny import tokenizer
from train.data import blocks
from train.run.pretrained import ModelInfo
from train.sft import parse, task_of
from train.tasks import stream

def peak():  # ru_maxrss would begin with the memory of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**10

def counted(self):
    take(self)
    peaks.append(peak())

peaks, take, Stream._take_next = [], Stream._take_next, counted
blocks.BLOCK, stream.ROOM = 2**15, 2**19
config = parse(sys.argv[1:])
task, outline = task_of(config), ModelInfo("a model", tokenizer(), None, {})
data = task.examples(config, task.rows(config), outline)
feed = data.feed and data.feed(config.optim.steps)
for step in range(config.optim.steps if feed else 0):
    feed.batch(step)
print()
print("peaks", *(peaks or [peak()]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_what_was_read(tmp_path):
    """Over a file of 6 MB in chunks of half a MB; all of it in memory takes more."""
    n = 2_000
    data = write_jsonl(tmp_path / "rows.jsonl", rows(n, "so it is " * 170))
    args = ["--dataset", data, "--seq-len", 64, "--truncate", "--steps", n // 50]

    def peaks(*more):
        run = [*args, *more, "--batch-size", "50"]
        command = [sys.executable, "-c", MEASURED, *map(str, run)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [float(peak) for peak in done.stdout.split("\npeaks ")[1].split()]

    of_stream, (whole,) = peaks("--stream"), peaks("--token-cache", "off")
    print(*of_stream, whole)
    assert len(of_stream) > 9 and of_stream[-1] < of_stream[4] + 20, of_stream
    assert whole > of_stream[-1] + 40, (whole, of_stream[-1])
