"""`train.grpo --environment` on meshes and in two processes, and killed within a turn."""

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from tests.support import THOROUGH, assert_close, assert_identical
from tests.train.forks import Forked
from tests.train.live import guessing
from tests.train.test_mesh import run
from tests.train.test_readme import PAGES, commands_of
from tests.train.tiny import write_model
from train import grpo
from train.adapters.source import find_adapter
from train.run.log import read_metrics

pytestmark = pytest.mark.slow
ROWS, GROUP, STEPS = 8, 4, 3


def inputs(folder):
    """The options of a run of the guessing game."""
    model = guessing.write_model(folder / "model")
    rows = [{"prompt": "play", "secret": 1 + i % 7} for i in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    line = ["--model", model, "--dataset", folder / "rows.jsonl", "--warmup", 1]
    line += ["--environment", "guess", "--max-new-tokens", 12]
    line += ["--seq-len", 32, "--group", GROUP, "--batch-size", GROUP * ROWS, "--steps", STEPS]
    line += ["--eval-questions", 0, "--targets", "all-linear", "--report-to", "none"]
    return [*line, "--lr", 1e-2, "--schedule", "constant", "--eps", 1e-3]


def left(folder, model):
    base, params = models.from_pretrained(model)
    adapter = lj.split(find_adapter(str(folder)).load(base, params, "the base"))[0]
    lines = (folder / "samples.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    return np.array([line["loss"] for line in read_metrics(folder)]), answers, adapter


MESHES = {"parts": "data=2,fsdp=2,tensor=2"} | ({"rows": "data=8"} if THOROUGH else {})


def test_meshes_and_hosts_draw_as_one_device(tmp_path):
    shared = inputs(tmp_path)
    each = [["order=0", "--output", tmp_path / "one"]]
    for name, mesh in MESHES.items():
        each.append(["order=7,2,5,0,1,6,3,4", "--mesh", mesh, "--output", tmp_path / name])
    run(shared, each, devices=8, script="grpo")
    if THOROUGH:
        two = [["--mesh", "data=2", "--output", tmp_path / "hosts"]]
        run(shared, two, devices=1, processes=2, script="grpo")
    losses, answers, adapter = left(tmp_path / "one", shared[1])
    assert len(answers) == STEPS * ROWS * GROUP and any("low" in x for x in answers)
    for name in (*MESHES, "hosts") if THOROUGH else MESHES:
        others = left(tmp_path / name, shared[1])
        assert others[1] == answers, name
        assert np.abs(others[0] - losses).max() <= 1e-5, name
        assert_close(others[2], adapter, 1e-5)


MOMENTS = {
    "a tool is at work": ("train.tools.host:ProcessEpisode._call", 5, "in"),
    "a row waits": ("train.live.turns.episodes:Listener.hear", 40, "before"),
    "a turn goes on": ("train.live.turns.programs:TurnRows.extend", 7, "after"),
}
SAMPLED = ("a row waits",)


def test_killed_within_a_turn_it_goes_on_bit_by_bit(tmp_path):
    line = inputs(tmp_path)

    def ended(words, name, *args):
        process = Forked([*words, *line, "--output", tmp_path / name, *args], tmp_path, {})
        said = "".join(process.communicate())
        return process.returncode, said

    code, said = ended(["-m", "train.grpo"], "whole")
    assert code == 0, said
    program, begun = Path(__file__).parents[1] / "killed.py", []
    for moment in (MOMENTS[name] for name in (MOMENTS if THOROUGH else SAMPLED)):
        args = ["--save-every", 1, *(["--resume"] if begun else [])]
        code, said = ended([program, *moment, "train.grpo"], "killed", *args)
        assert code == -signal.SIGKILL, said
        begun.append(said)
    code, said = ended(["-m", "train.grpo"], "killed", "--save-every", 1, "--resume")
    assert code == 0, said
    whole, killed = (left(tmp_path / name, line[1]) for name in ("whole", "killed"))
    assert whole[1] == killed[1] and (whole[0] == killed[0]).all()
    assert_identical(whole[2], killed[2])


HERMES = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}, as <tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_tool_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (program,) = (
        x for x in re.findall(r"```python\n(.*?)```", PAGES, re.DOTALL) if "multiply" in x
    )
    (row,) = (x for x in re.findall(r"```json\n(.*?)```", PAGES, re.DOTALL) if "product" in x)
    Path("calculator.py").write_text(program)
    Path("products.jsonl").write_text(row * 4)
    (line,) = (x for x in commands_of("grpo") if "calculator.py:multiply" in x)
    line[line.index("--model") + 1] = str(write_model(tmp_path / "model", HERMES, scale=0.5))
    grpo.main([*line, "--steps", "1", "--report-to", "none", "--max-new-tokens", "24"])
    assert "completions may call multiply" in " ".join(capsys.readouterr().out.split())
    (metrics,) = read_metrics(Path("runs/grpo"))
    assert metrics["tools/call_frequency"] == 0 and metrics["tools/turns"] == 1
