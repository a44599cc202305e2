"""Runs whose completions share their prompt: the numbers of runs without, and where they do not."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.models.layers.kernels import flash
from lora_jax.training.layout import Layout
from lora_jax.training.mesh import make_mesh
from tests.adapted_trees import with_random_factors
from tests.models import tiny
from tests.support import assert_close, but_rarely
from tests.train.tiny import CONFIG, tokenizer, write_jsonl, write_model
from train import distill, dpo, grpo
from train.adapters.source import find_adapter
from train.console.errors import UserError
from train.run import shared_prompts
from train.run.log import read_metrics
from train.run.pretrained import ModelInfo
from train.run.shared_prompts import PromptRows, choose_sharing

ENDS = (*range(100, 124), CONFIG["eos_token_id"])
RNG = np.random.default_rng(8)
RULES = [lj.LoraRule(targets=["q_proj", "v_proj", "up_proj"], rank=3, alpha=6)]
REWARD = """
def early(completion_ids, **others):
    return [sum(id < 90 for id in ids) / max(1, len(ids)) for ids in completion_ids]
"""


def said(low, high):
    return "".join(RNG.choice(list("abcd efgh"), RNG.integers(low, high)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model", scale=0.5, eos_token_id=ENDS)
    _, params = models.from_pretrained(folder / "model")
    tree = lj.lorafy(params, RULES)
    for name, seed in (("used", 7), ("teacher", 3)):
        lj.save_adapter(folder / name, with_random_factors(tree, seed))
    pairs = [
        {"prompt": said(9, 20), "chosen": said(1, 9) + "x", "rejected": said(1, 6) + "y"}
        for _ in range(8)
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": said(9, 20)} for _ in range(4)])
    (folder / "rewards.py").write_text(REWARD)
    return folder


def run(script, folder, output, *args, rows="pairs", steps=3):
    """Runs a script from the adapter in use; returns its metrics and its adapter."""
    line = ["--model", folder / "model", "--dataset", folder / f"{rows}.jsonl", "--warmup", 1]
    line += ["--init-adapter", folder / "used", "--report-to", "none", "--output", output]
    line += ["--steps", steps, "--lr", 5e-3, "--eps", 1e-4]
    script.main([str(arg) for arg in [*line, *args]])
    model, params = models.from_pretrained(folder / "model")
    return read_metrics(output), lj.split(find_adapter(str(output)).load(model, params, "base"))[0]


GRPO = ["--group", 4, "--batch-size", 8, "--max-new-tokens", 12, "--seq-len", 96]
RUNS = {
    "dpo": (dpo, ["--loss", "sigmoid", "ipo", "--batch-size", 4, "--grad-accum", 2]),
    "the reference live": (dpo, ["--loss", "hinge", "sft", "--reference-logps", "live"]),
    "orpo": (dpo, ["--loss", "orpo", "--batch-size", 4]),
    "held out": (dpo, ["--eval-every", 1, "--eval-dataset", "pairs.jsonl"]),
    "grpo": (grpo, [*GRPO, "--grad-accum", 2, "--updates", 2, "--beta", 0.1]),
    "rloo": (grpo, [*GRPO, "--loss", "rloo", "--beta", 0.1, "--mask-truncated"]),
    "distill": (distill, [*GRPO, "--teacher", "teacher"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", but_rarely(RUNS, "rloo", "held out"))
def test_a_run_is_that_without_sharing(folder, tmp_path, capsys, name):
    script, args = RUNS[name]
    args = [folder / arg if arg in ("pairs.jsonl", "teacher") else arg for arg in args]
    rows = "pairs" if script is dpo else "prompts"
    if script is grpo:
        args += ["--reward", f"{folder / 'rewards.py'}:early", "--eval-questions", 0]
    shared = run(script, folder, tmp_path / "shared", *args, rows=rows)
    told = " ".join(capsys.readouterr().out.split())
    alone = run(script, folder, tmp_path / "alone", *args, "--no-share-prompt", rows=rows)
    assert "completions share their prompt" in told
    assert "share their prompt" not in capsys.readouterr().out
    for lines in (shared[0], alone[0]):
        for line in lines:
            for other in ("time", "tokens_per_s"):
                line.pop(other, None)
    assert [line.keys() for line in shared[0]] == [line.keys() for line in alone[0]]
    assert_close(shared[0], alone[0], 1e-5)  # means over batches of log-probabilities of dozens
    assert_close(shared[1], alone[1], 1e-5)
    assert len({line.get("loss") for line in alone[0]}) > 2
    assert all(("kl" in line) == ("--beta" in args) for line in alone[0])
    if "--updates" in args:
        assert alone[0][0]["entropy"] != alone[0][1]["entropy"]


def config(**changes):
    parts = {
        "optim": {"neftune": 0.0, "batch_size": 8, "dtype": "float32", "attention": "auto"},
        "run": {"mesh": None, "slice_axis": None, "resume": False},
        "data": {"share_prompt": True},
        "adapter": {"dropout": 0.0},
    }
    return SimpleNamespace(
        **{
            name: SimpleNamespace(**{k: changes.get(k, v) for k, v in part.items()})
            for name, part in parts.items()
        }
    )


def outline(case="llama3", **fields):
    config = dataclasses.replace(tiny.config(case), **fields)
    params = jax.eval_shape(models.Decoder(config).init, jax.random.key(0), np.zeros((1, 1), "i4"))
    return ModelInfo("a model", None, config, params["params"])


# 8 rows of 200 + 2 x 40 tokens in the place of 8 of 2 x (200 + 40)
ROWS = PromptRows(completions=2, share=0.3, rows=8, shared=(8, 280), alone=(8, 480))
OBSTACLES = {
    "linear layers": ({}, "qwen3.5", {}, "a model has linear layers"),
    "noise": ({"neftune": 5.0}, "llama3", {}, "--neftune scales its noise"),
    "short prompts": ({}, "llama3", {"share": 0.24}, "prompts are only 24% of the tokens"),
    "rows": ({"batch_parts": 2}, "llama3", {"rows": 3}, "3 prompts do not divide over 2 parts"),
    "a sequence": ({"sequence_parts": 2}, "llama3", {}, "splits rows over sequence=2"),
    "windows": (
        {"platform": "gpu"},
        "mistral with a window",
        {"shared": (8, 600), "alone": (8, 1040)},
        "flash: the kernel's windows",
    ),
    "attention": (
        {},
        "llama3",
        {"shared": (1, 496), "alone": (8, 64)},
        "attention over 496 tokens would cost more",
    ),
    "one completion": ({}, "llama3", {"completions": 1}, "a prompt has one completion"),
}


def surround(monkeypatch, **facts):
    """Gives a layout's facts: these devices are none of a mesh, and no GPU with its kernel."""
    monkeypatch.setattr(flash, "missing_compiler", lambda: None)
    mesh = make_mesh(jax.devices()[:1])
    monkeypatch.setattr(shared_prompts, "make_mesh", lambda *_, **__: mesh)
    monkeypatch.setattr(Layout, "of", classmethod(lambda cls, mesh, _: cls(mesh, ())))
    for name, value in facts.items():
        monkeypatch.setattr(Layout, name, value)


@pytest.mark.parametrize("name", OBSTACLES)
def test_a_run_tells_why_it_does_not_share(monkeypatch, name):
    options, case, rows, why = OBSTACLES[name]
    facts = {k: x for k, x in options.items() if hasattr(Layout, k)}
    options = {k: x for k, x in options.items() if k not in facts}
    surround(monkeypatch, **facts)
    rows = ROWS._replace(**rows)
    told = choose_sharing(config(**options), [outline(), outline(case)], rows)
    assert not told.shared and (rows.completions == 1 or why in told.lines[0])
    with pytest.raises(UserError, match=f"--no-share-prompt has no effect, because .*{why}"):
        choose_sharing(config(share_prompt=False, **options), [outline(case)], rows)
    again = config(share_prompt=False, resume=True, **options)
    assert choose_sharing(again, [outline(case)], rows) == (False, ())


def test_a_run_tells_that_it_shares(monkeypatch):
    surround(monkeypatch)
    assert choose_sharing(config(), [outline()], ROWS).shared
    assert not choose_sharing(config(share_prompt=False), [outline()], ROWS).shared
    (line,) = choose_sharing(config(dropout=0.1), [outline()], ROWS).lines
    assert "85% of the tokens" in line and "dropout is drawn once per prompt" in line


@pytest.mark.slow
def test_a_dry_run_counts_a_shared_prompt_once(folder, tmp_path, capsys):
    line = ["--model", folder / "model", "--dataset", folder / "prompts.jsonl", *GRPO]
    line += ["--reward", f"{folder / 'rewards.py'}:early", "--eval-questions", 0]
    line += ["--targets", "q_proj", "--output", tmp_path / "run", "--dry-run"]
    rows = map(json.loads, (folder / "prompts.jsonl").read_text().splitlines())
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    texts = tokenizer().apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    sizes = [len(ids) for ids in tokenizer()(texts, add_special_tokens=False)["input_ids"]]
    drawn, asked = 8 * 12, 2 * np.mean(sizes)  # two prompts with four completions each
    grpo.main([str(arg) for arg in line])
    said = " ".join(capsys.readouterr().out.split())
    assert f"tokens per step: about {asked:,.0f} of prompts, and at most {drawn} drawn" in said
    share = (asked + drawn) / (4 * asked + drawn)
    assert f"completions share their prompt, which leaves {share:.0%} of the tokens" in said
    assert len(re.findall("[Cc]ompiling", said)) == 2  # "compiling …" and "compiling: 3 s"
    grpo.main([str(arg) for arg in [*line, "--no-share-prompt"]])
    said = " ".join(capsys.readouterr().out.split())
    assert f"tokens per step: about {4 * asked:,.0f} of prompts, and at most {drawn} drawn" in said


@pytest.mark.slow
def test_a_run_of_before_goes_on_without_sharing(folder, tmp_path, capsys):
    output = tmp_path / "run"
    args = ["--batch-size", 4, "--save-every", 1]
    run(dpo, folder, output, *args, "--no-share-prompt")
    file = output / "config.yaml"
    kept = [line for line in file.read_text().splitlines() if "share_prompt" not in line]
    file.write_text("\n".join(kept) + "\n")
    capsys.readouterr()
    lines, _ = run(dpo, folder, output, *args, "--resume", steps=5)
    assert "share their prompt" not in capsys.readouterr().out and lines[-1]["step"] == 5
    assert "share_prompt: false" in file.read_text()
