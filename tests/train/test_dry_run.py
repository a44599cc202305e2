"""--dry-run: its output, which the run then confirms, and that it changes nothing."""

import json
import re

import numpy as np
import pytest

from lora_jax import training
from lora_jax.training.losses import Loss
from tests.train import scripts
from tests.train.test_sft import fails
from tests.train.tiny import CHATML, tokenizer, write_jsonl, write_model
from train import classify, distill, dpo, grpo
from train.data.preview import preview_rows
from train.run.output import state_of
from train.sft import main
from train.stages.dry_run import as_text


def in_words(n_bytes):
    return f"{n_bytes / 1e3:.1f} kB" if n_bytes < 1e6 else f"{n_bytes / 1e6:,.1f} MB"


def files_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
def test_a_dry_run_shows_what_the_run_does_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    model = write_model(tmp_path / "model")
    rows = [{"prompt": f"{n}?", "completion": f"yes {n}"} for n in range(40)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    args = ["--model", model, "--dataset", data, "--epochs", "2", "--packing", "--eval-every", "3"]
    args += ["--targets", "q_proj"]
    args += ["--output", tmp_path / "run", "--token-cache", tmp_path / "tokens"]
    args = [str(arg) for arg in args]
    before = files_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("train.stages.begin.read_model", None)
        main([*args, "--dry-run"])
    said = capsys.readouterr().out
    assert files_in(tmp_path) == before
    assert re.search(r"<\|im_start\|>assistant\n\[\[yes \d+<\|im_end\|>\]\]\n---", said)
    assert "in [[ ]]:" in said and "\x1b" not in said
    assert f"{tmp_path / 'run'}: this output folder does not exist yet" in said
    main([*args, "--compilation-cache", "off"])
    ran = capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for line in ("36 rows are packed into ", "4 of the 40 rows of ", "attention: "):
        (of_run,) = (one for one in ran.splitlines() if line in one)
        assert of_run in said
    assert f"steps: {report['steps']:,}, " in said and "2." in said
    compiled = report["compiled_bytes"]
    assert f"temporaries {in_words(compiled['temporaries'])}" in said
    assert state_of(tmp_path / "run").startswith(
        "this output folder already contains a run; --resume"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "task", "args"),
    [
        (dpo, "sql", ["--eval-every", 2]),
        (grpo, "sql", ["--eval-questions", 0]),
        (grpo, "arithmetic", ["--eval-questions", 3]),
        (distill, "sql", ["--teacher-prompt", "Answer in SQL. "]),
    ],
)
def test_a_named_task_is_read_by_its_script(script, task, args, tmp_path, monkeypatch):
    """Its rows, examples and loss, of a dry run that compiles nothing."""
    seen = []
    monkeypatch.setattr("train.stages.dry_run.show", lambda *run: seen.append(run))
    line = ["--dataset", task, "--model", write_model(tmp_path / "model"), "--rows", 20, *args]
    line += ["--seq-len", 900, "--output", tmp_path / "run", "--targets", "q_proj", "--dry-run"]
    script.main([str(arg) for arg in line])
    ((config, inputs, loss, _),) = seen
    assert config.data.dataset == task and isinstance(loss, Loss)
    assert re.match("20 (pairs|prompts)", inputs.lines[0]) and inputs.steps > 1
    line = "The held-out loss is the mean over "
    assert any(said.startswith(line) for said in inputs.lines) == (script is dpo)


GAME = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


SHOWN = {
    ("--dataset", "guess", "--max-turns", "3"): (
        "completions may call guess (in the format of hermes)",
        "completions are rewarded by guess",
        "only GuessingGame rewards completions, so no reward is shown here",
        "guess <|im_start|>user Guess my number, which is one of 1 to 7",
        "the tools that a completion may call: guess(number: integer): Guesses the number. ",
        "GuessingGame opens an episode of the first prompt without a text",
    ),
    ("--dataset", "sql", "--environment", "sql", "--eval-questions", "1", "--rows", "20"): (
        "completions are rewarded by sql",
        "the questions of the evaluation are answered in one turn, without tools",
        "the tools that a completion may call: run_query(sql: string): Runs a query",
        "SqlSession opens an episode of the first prompt without a text",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("args", SHOWN)
def test_a_game_is_shown_before_it_trains(args, tmp_path, capsys):
    line = [*args, "--model", write_model(tmp_path / "model", GAME), "--seq-len", 1000]
    line += ["--targets", "q_proj", "--output", tmp_path / "run", "--dry-run"]
    grpo.main([str(arg) for arg in line])
    printed = " ".join(capsys.readouterr().out.split())
    assert [text for text in SHOWN[args] if text not in printed] == [], printed
    if "guess" in args:
        with pytest.raises(SystemExit):
            grpo.main(["--dataset", "guess", "--output", str(tmp_path / "run"), "--dry-run"])
        assert "needs a model that was trained to call tools" in " ".join(
            capsys.readouterr().err.split()
        )


def test_what_the_loss_counts_is_green_on_a_terminal(tmp_path):
    rows = [{"prompt": "a" * 500, "completion": "b"}]
    made = tokenizer()
    examples = training.chats(rows, made, seq_len=1024)
    (one,) = preview_rows(examples, made, 3)
    assert one.title == "row 1: 521 tokens, 2 of them count"
    coloured = as_text(one, coloured=True)
    assert [coloured.plain[s.start : s.end] for s in coloured.spans] == ["b<|im_end|>"]
    plain = as_text(one, coloured=False).plain
    assert plain.endswith("[[b<|im_end|>]]") and " … 201 tokens … " in plain


MISSPELLED = [
    [("user", "1?"), ("assistant", "one")],
    [("user", "2?"), ("assistant", "two"), ("user", "3?"), ("asistant", "three")],
    [("user", "2?"), ("assistant", "two"), ("user", "3?"), ("asistant", "three")],
    [("system", "Be brief."), ("user", "4?"), ("assistant", "four"), ("ipython", "5")],
]


REMARKS = [
    f"remark: The {kind} {word!r} of turns is unknown ({{data}}, line {rows}). Nothing is learned "
    f"from an unknown {kind}. If it is a typing error, use {nearest!r}."
    for kind, word, nearest, rows in (
        ("role", "asistant", "assistant", "2, {data}, line 3"),
        ("field", "wieght", "weight", 4),
        ("field", "thinkng", "thinking", 4),
        ("field", "tool_call", "tool_calls", 4),
    )
]


def turns(pairs, **more):
    return [{"role": role, "content": content, **more} for role, content in pairs]


@pytest.mark.parametrize("script", ["sft", "dpo", "grpo"])
def test_a_misspelled_role_or_field_is_named(script, tmp_path, capsys, monkeypatch):
    """By the command, before the first rows; a run without such turns says nothing of it."""
    monkeypatch.setattr("train.stages.dry_run.show", lambda *_: None)
    template = "{# 'ipython' #}" + CHATML
    model, main_of = write_model(tmp_path / "model", template), {"sft": main, "dpo": dpo.main}
    for names in ([], ["wieght", "thinkng", "tool_call", "author"]):
        rows = [{"messages": turns(row)} for row in (MISSPELLED if names else MISSPELLED[:1])]
        rows[-1]["messages"][-1] |= dict.fromkeys(names, "x")
        args = ["--targets", "q_proj", "--steps", 2]
        asked = [[*row["messages"], *turns([("user", "?")])] for row in rows]
        if script == "dpo":
            sides = {"chosen": turns([("assistant", "x")]), "rejected": turns([("assistant", "y")])}
            rows = [{"prompt": prompt, **sides} for prompt in asked]
        elif script == "grpo":
            rows = [{"messages": prompt} for prompt in asked]
            args += ["--reward", "length", "--group", 2, "--batch-size", 2, "--seq-len", 512]
            args += ["--max-new-tokens", 8]
        data = write_jsonl(tmp_path / "rows.jsonl", rows)
        line = ["--model", model, "--dataset", data, "--output", tmp_path / "run", *args]
        main_of.get(script, grpo.main)([*map(str, line), "--dry-run"])
        said = [one for one in capsys.readouterr().out.splitlines() if one.startswith("remark: ")]
        assert said == [line.format(data=data) for line in REMARKS if names]


@pytest.mark.slow
def test_classes_have_a_dry_run_too(tmp_path, capsys):
    classify.main(["--dry-run", "--rows", "100", "--output", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "the label to learn is 'positive'" in said and "[CLS] " in said
    assert "memory per device, by the compiler: " in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--resume", "--coordinator=x:1"])
def test_options_without_effect_beside_it_are_refused(option, capsys):
    said = fails(capsys, "--dry-run", option)
    assert (
        said == "error: --dry-run uses one process and trains nothing. Remove "
        f"{option.split('=')[0]}."
    )


def said_of(script, tmp_path, capsys, rows, *args):
    """Returns what a dry run of rows says, and the options of the run."""
    model = write_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    line = ["--model", model, "--dataset", data, "--output", tmp_path / "run", "--targets"]
    line = [str(arg) for arg in [*line, "q_proj", *args]]
    before = files_in(tmp_path)
    script.main([*line, "--dry-run"])
    assert files_in(tmp_path) == before
    return capsys.readouterr().out, line


@pytest.mark.slow
def test_pairs_are_shown_by_row_and_side(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": f"no {n}"} for n in range(9)]
    said, line = said_of(dpo, tmp_path, capsys, rows, "--batch-size", 4, "--steps", 2)
    titles = re.findall("--- (.*): (\\d+) tokens, (\\d+) of them count\n", said)
    assert [title for title, *_ in titles] == [
        f"row {row}, {side}" for row in (1, 2, 3) for side in ("chosen", "rejected")
    ]
    (chosen, rejected, *_) = re.findall(r"<\|im_start\|>assistant\n(\[\[.*)\n\]\]", said)
    assert (chosen, rejected) == ("[[yes<|im_end|>", "[[no 0<|im_end|>")
    assert [int(n) for _, _, n in titles[:2]] == [5, 6], "letters, the end, and a new line"
    assert "tokens per prompt with its completion" in said
    assert "steps: 2, 0.89 epochs; 4 pairs per step; the largest batch is 4 × 32 tokens" in said
    dpo.main([*line, "--compilation-cache", "off", "--report-to", "none"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    temporaries = in_words(report["compiled_bytes"]["temporaries"])
    assert f"temporaries of the step {temporaries}, of the reference " in said
    assert "before training, the reference scores all rows: 0 s" in said


def test_pairs_that_share_a_row_are_counted_as_pairs(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c" * n} for n in (1, 1, 40, 1, 1)]
    examples = training.pairs(rows, tokenizer(), seq_len=80, packing=True)
    titles = [one.title for one in preview_rows(examples, tokenizer(), 2)]
    assert [title.split(":")[0].split(", ")[1] for title in titles] == ["chosen", "rejected"] * 2
    n = int(np.diff(examples.firsts)[0]) // 2
    assert n > 1 and [title.split("; ")[1] for title in titles] == [
        f"{place} of {n} in packed sequence 1" for place in (1, 1, 2, 2)
    ]
    labelled = [{"prompt": "a", "completion": "b", "label": n == 1} for n in range(3)]
    examples = training.pairs(labelled, tokenizer(), seq_len=80, labelled=True)
    titles = [one.title for one in preview_rows(examples, tokenizer(), 3)]
    assert [title.split(":")[0] for title in titles] == ["row 1, bad", "row 2, good", "row 3, bad"]


@pytest.mark.slow
def test_prompts_are_shown_without_a_loss(tmp_path, capsys):
    rows = [{"prompt": f"{n}?"} for n in range(9)]
    args = ["--reward", "length", "--batch-size", 4, "--group", 2, "--seq-len", 64, "--steps", 2]
    args += ["--max-new-tokens", 6, "--eval-questions", 0, "--grad-accum", 3]
    said, _ = said_of(grpo, tmp_path, capsys, rows, *args)
    prompt = "<|im_start|>user\n0?<|im_end|>\n<|im_start|>assistant\n"
    assert f"--- prompt 1: 21 tokens\n{prompt}\n--- prompt 2: 21 tokens\n" in said
    assert "; the loss counts tokens drawn after them:" in said
    assert "[[" not in said and "of them count" not in said
    assert "steps: 2, 1.33 epochs; 12 completions per step (3 batches of 4)" in said
    six_prompts = 6 * 21  # two completions share one
    assert f"tokens per step: about {six_prompts} of prompts, and at most 72 drawn" in said
    size = "[0-9.]+ .B"
    assert re.search(f"of the step {size}, of the scorer {size}, of the sampler {size}", said)
    assert "takes additional time" in said


@pytest.mark.slow
def test_a_second_base_is_refused_before_the_run(tmp_path, capsys):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    line = ["--model", write_model(tmp_path / "model"), "--output", tmp_path / "run", "--dry-run"]
    line += ["--dataset", write_jsonl(tmp_path / "rows.jsonl", rows), "--batch-size", 2]
    said = scripts.fails(capsys, dpo.main, *line, "--full", "--reference-logps", "live")
    assert "but --full trains the base itself" in said
