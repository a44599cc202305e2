"""Many prompts and several adapters: one base in memory, answers in order, nothing lost."""

import functools
import io
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from tests.support import with_random_factors
from tests.train.tiny import CHATML, SPECIAL, write_jsonl, write_model
from train.generate import __main__ as generate
from train.generate import answers, batch
from train.generate.options import parse
from train.generate.shared_base import LoadedAdapters, choose_base, find_adapters
from train.run import pretrained
from train.run.pretrained import read_model_info

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
PROMPTS = ["3 plus 4?", "x" * 70, "7?", "ü, é", "nine plus eleven is how much?"]
RULES = {
    "runs/sql": lj.LoraRule(targets=["q_proj", "down_proj"], rank=3, alpha=7),
    "peft": lj.LoraRule(targets=["v_proj"], rank=2, alpha=5),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a base, of a run's adapter, and of one of PEFT's with other targets."""
    folder = tmp_path_factory.mktemp("made")
    base = write_model(folder / "base-model", scale=1.5)
    model, params = models.from_pretrained(base)
    trees = {
        name: with_random_factors(lj.lorafy(params, [rule]), seed)
        for seed, (name, rule) in enumerate(RULES.items())
    }
    about = {"model": str(base)}
    lj.save_adapter(folder / "runs/sql/adapter", trees["runs/sql"], about=about)
    lp.save(folder / "peft", model, trees["peft"], base_model=str(base), task_type="CAUSAL_LM")
    return folder, model, {"base": params, "sql": trees["runs/sql"], "peft": trees["peft"]}


@pytest.fixture(scope="module")
def expected(made):
    """Answers an adapter's prompt: alone, by the library, merged into the base."""
    folder, model, trees = made
    tokenizer = models.load_tokenizer(folder / "base-model")

    @functools.cache
    def answer(name, prompt):
        plain = trees[name] if name == "base" else lj.merge(trees[name])
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        ids = np.pad([ids], ((0, 0), (96 - len(ids), 0)))  # one length is compiled
        mask = jnp.asarray(np.arange(96) >= 96 - (ids[0] != 0).sum())[None]
        new = models.generate(model, plain, ids, mask, max_new_tokens=6)
        return tokenizer.decode(np.asarray(new)[0], skip_special_tokens=True).strip()

    return answer


def ask(*args):
    generate.main(["--max-new-tokens", "6", *map(str, args)])


@pytest.mark.slow
def test_a_special_token_ends_an_answer(made, tmp_path):
    """Answers are the beginnings of those without --stop."""
    args = ["--model", made[0] / "base-model", "--prompt", "3?", "--num-samples", 24]
    args += ["--temperature", 3, "--max-new-tokens", 40, "--batch-size", 24]
    ask(*args, "--output", tmp_path / "free.jsonl")
    ask(*args, "--stop", SPECIAL[1], "--output", tmp_path / "stopped.jsonl")
    free, stopped = (lines_of(tmp_path / f"{name}.jsonl") for name in ("free", "stopped"))
    ended = [pair for pair in zip(free, stopped, strict=True) if pair[1]["ended"] == "stop"]
    assert ended and all(one["tokens"] < other["tokens"] for other, one in ended)
    assert all(other["answer"].startswith(one["answer"]) for other, one in ended)
    others = [pair for pair in zip(free, stopped, strict=True) if pair not in ended]
    assert others and all(other == one for other, one in others)


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fails(capsys, *args):
    """Returns the one paragraph before the end with the code for bad input."""
    with pytest.raises(SystemExit) as caught:
        ask(*args)
    said = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and "Traceback" not in said
    return said


@pytest.mark.slow
def test_adapters_of_other_structures_answer_a_file_in_its_order(made, expected, tmp_path, capsys):
    folder, *_ = made
    rows = [{"prompt": text} for text in PROMPTS[:3]]
    rows += [{"messages": [{"role": "user", "content": text}]} for text in PROMPTS[3:]]
    path, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "to/out.jsonl"
    args = ["--adapter", "base", folder / "runs/sql", folder / "peft", "--prompts", path]
    ask(*args, "--output", out, "--batch-size", 2)
    captured = capsys.readouterr()
    assert "sql and peft: beside the base" in captured.err and not captured.out
    found = lines_of(out)
    assert [line["adapter"] for line in found] == ["base", "sql", "peft"] * 5
    for line, row in zip(found, [row for row in rows for _ in range(3)], strict=True):
        assert line.items() >= row.items()
        prompt = row.get("prompt") or row["messages"][0]["content"]
        assert line["answer"] == expected(line["adapter"], prompt)
        assert (line["tokens"], line["ended"]) == (6, "length") or line["ended"] == "eos"
    assert len({line["answer"] for line in found}) > 9
    assert "exists already. Pass another file, or replace it" in fails(
        capsys, *args, "--output", out
    )
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


@pytest.mark.slow
def test_lines_of_standard_input_are_answered_side_by_side(made, expected, monkeypatch, capsys):
    folder, *_ = made
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(PROMPTS[:3])))
    ask("--adapter", f"one={folder / 'peft'}", "base", "--model", folder / "base-model")
    blocks = capsys.readouterr().out.split("## ")
    for n, text in enumerate(PROMPTS[:3], start=1):
        one, base = expected("peft", text), expected("base", text)
        assert blocks[n] == f"prompt {n}: {text}\n-- one\n{one}\n-- base\n{base}\n\n"


@pytest.mark.slow
def test_who_types_a_line_waits_for_its_answer(made, expected, monkeypatch, capsys):
    folder, *_ = made
    said = []

    def lines():
        for text in (PROMPTS[0], "x" * 5000, PROMPTS[2]):
            said.append(capsys.readouterr())
            yield f"{text}\n"

    class Typed:
        isatty, __iter__ = staticmethod(lambda: True), staticmethod(lines)

    monkeypatch.setattr(sys, "stdin", Typed())
    with pytest.raises(SystemExit):
        ask("--model", folder / "base-model")
    said.append(capsys.readouterr())
    assert said[1].out.strip() == expected("base", PROMPTS[0])
    assert "prompt 2 was skipped: prompt and --max-new-tokens" in said[2].err
    assert said[3].out.strip() == expected("base", PROMPTS[2])
    assert "1 prompts got no answer" in said[3].err


@pytest.mark.slow
def test_one_base_is_in_memory_and_adapters_of_one_structure_share_what_is_compiled(made):
    folder, model, trees = made
    options = parse(["--adapter", f"a={folder / 'runs/sql'}", str(folder / "runs/sql/adapter")])
    options = parse([*["--adapter", *options.adapter, str(folder / "peft"), "base"]])
    adapters = find_adapters(options.adapter)
    sources = [adapter.source for adapter in adapters if adapter.source is not None]
    outline = read_model_info(choose_base(sources, options.model))
    loaded = LoadedAdapters(model, trees["base"], adapters, outline, options)
    used = {name: loaded.use(name) for name in loaded.names}
    assert list(used) == ["a", "sql", "peft", "base"]
    for name in ("a", "sql", "peft"):
        plain = jax.tree.leaves(lj.strip(used[name][0]))
        assert all(x is y for x, y in zip(plain, jax.tree.leaves(trees["base"]), strict=True))
    assert used["a"][1] is used["sql"][1] is used["peft"][1] and used["base"][1] is None
    structures = [jax.tree.structure(used[name][0]) for name in ("a", "sql", "peft")]
    assert structures[0] == structures[1] != structures[2]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "merged into"),
        pytest.param(["--no-merge"], "beside", marks=pytest.mark.slow),
        pytest.param(["--merge"], "merged into", marks=pytest.mark.slow),
    ],
)
def test_one_adapter_is_merged_unless_asked(made, expected, capsys, args, says):
    folder, *_ = made
    ask("--adapter", folder / "runs/sql", "--prompt", PROMPTS[0], *args)
    captured = capsys.readouterr()
    assert captured.out.strip() == expected("sql", PROMPTS[0])
    assert f"sql: {says} the base" in captured.err


@pytest.mark.slow
def test_samples_depend_on_the_prompts_number_alone(made, tmp_path):
    folder, *_ = made
    args = ["--model", folder / "base-model", "--prompt", *PROMPTS[:3], "--temperature", 4]
    args += ["--top-k", 30, "--top-p", 0.9, "--num-samples", 2, "--seed", 5]
    for size in (1, 4):
        ask(*args, "--batch-size", size, "--output", tmp_path / f"{size}.jsonl")
    one, four = (lines_of(tmp_path / f"{size}.jsonl") for size in (1, 4))
    assert one == four and [line["sample"] for line in one] == [0, 1] * 3
    assert len({line["answer"] for line in one}) > 3
    ask(*args[:-2], "--output", tmp_path / "other.jsonl")
    assert lines_of(tmp_path / "other.jsonl") != one


def test_what_is_ready_when_the_rest_is_interrupted_is_kept(made, tmp_path, capsys, monkeypatch):
    folder, *_ = made
    args = ["--model", folder / "base-model", "--prompt", *PROMPTS, "--batch-size", 2]
    out, calls = tmp_path / "out.jsonl", []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == allowed + 1:
            raise KeyboardInterrupt
        return itertools.repeat(np.array([65, 65]), 6)

    monkeypatch.setattr(answers, "stream", interrupted)
    for allowed in (2, 0):
        calls.clear()
        with pytest.raises(SystemExit) as caught:
            ask(*args, "--output", out)
        said = capsys.readouterr().err
        assert caught.value.code == 130
        if allowed:
            assert f"4 of 5 answers. The finished answers are in {out}" in said
            texts = [line["prompt"] for line in lines_of(out)]
            assert texts == [one for one in PROMPTS if one != "7?"]  # the shortest comes last
            out.unlink()
    assert not list(tmp_path.iterdir())


def test_an_answer_that_ends_before_its_batch_is_kept(made, tmp_path, monkeypatch):
    folder, *_ = made

    def ends(*args, **options):
        """Ends the first row at once; the second goes on until Ctrl-C."""
        for i in range(20):
            yield np.array([258 if i == 1 else 65, 65])
        raise KeyboardInterrupt

    monkeypatch.setattr(answers, "stream", ends)
    out = tmp_path / "out.jsonl"
    args = ["--model", folder / "base-model", "--prompt", *PROMPTS[1:3], "--output", out]
    with pytest.raises(SystemExit):
        ask(*args, "--max-new-tokens", 40)
    (line,) = lines_of(out)
    assert (line["prompt"], line["tokens"], line["ended"]) == (PROMPTS[1], 2, "eos")


def test_answers_beside_each_other_on_a_terminal(made, monkeypatch, capsys):
    folder, *_ = made
    answer = "eleven"  # --max-new-tokens letters
    tokens = models.load_tokenizer(folder / "base-model")(answer)["input_ids"]

    def says(model, params, ids, *_, **__):
        return (np.full(len(ids), token) for token in tokens)

    monkeypatch.setattr(answers, "stream", says)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    args = ["--adapter", folder / "peft", "base", "--prompt"]
    ask(*args, *PROMPTS[:2])
    table = capsys.readouterr().out
    names = [line for line in table.splitlines() if "peft" in line and "base" in line]
    assert len(names) == 2 and names[0].index("peft") < names[0].index("base") > 60
    assert "## prompt 1: 3 plus 4?" in table

    pieces = []
    monkeypatch.setattr(batch, "print", lambda *s, **_: pieces.append(s), raising=False)
    ask(*args, PROMPTS[0])  # one prompt: as it is generated
    texts = "".join(str(s[0]) if s else "\n" for s in pieces)
    assert f"base\x1b[0m{answer}\n" in texts and len(pieces) > 8


def test_few_lengths_are_compiled():
    lengths = [answers.padded_length(n) for n in range(1, 8193)]
    assert lengths == sorted(lengths) and len({*lengths}) == 24
    assert all(n <= length for n, length in enumerate(lengths, start=1))
    assert all(length <= 1.25 * n for n, length in enumerate(lengths, start=1) if n >= 256)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--prompt a b --top-k 3", "--top-k has no effect, because --temperature 0"),
        ("--prompt a --num-samples 2", "--num-samples has no effect"),
        (
            "--prompt a --temperature 1 --top-k 0",
            "--top-k 0 is out of range. Pass a number of at least 1",
        ),
        ("--prompt a --batch-size 3", "--batch-size has no effect"),
        ("--prompt a --prompts FILE", "--prompts and --prompt both name prompts"),
        ("--prompt --top-k 3", "--prompt has no value. Pass a value"),
        ("--prompts LONG --output LONG --overwrite", "is also the file of --prompts. Pass another"),
        ("--prompt a --overwrite", "--overwrite replaces the file of --output"),
        ("--prompt a --no-merge", "--no-merge has no effect without an adapter"),
        ("--prompt a --merge --no-merge --adapter SQL", "--merge contradicts --no-merge"),
        ("--interactive --output FILE", "--output has no effect in a chat"),
        ("--prompt a --adapter nowhere", "--adapter nowhere: There is no such folder"),
        ("--prompt a --adapter SQL SQL", "different names with --adapter name=folder"),
        ("--prompt a --adapter base=SQL", "The name base stands for the base model"),
        ("--prompt a --adapter SQL x=OTHER", "BASE, and --adapter OTHER on OTHERBASE. One command"),
        ("--prompts BROKEN", "BROKEN, line 2 is not JSON"),
        ("--prompts nowhere.txt", "--prompts nowhere.txt does not exist"),
        ("--prompts WRONG", "WRONG, line 2 has `question`, but a row needs `prompt`"),
        ("--prompts ANSWERED", "ANSWERED, line 1 ends with an assistant's turn"),
        ("--prompts SYSTEM --system b", "SYSTEM, line 1 already contains a system prompt"),
        ("--prompts LONG", "LONG, line 2: prompt and --max-new-tokens (and of 1 more prompts): "),
    ],
)
def test_refusals_before_weights_are_read(made, tmp_path, capsys, monkeypatch, args, words):
    folder, *_ = made
    monkeypatch.setattr(pretrained, "from_pretrained", None)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    system = [{"role": "system", "content": "a"}, chat[0]]
    names = {
        "OTHERBASE": tmp_path / "other",
        "OTHER": tmp_path / "adapter",
        "BASE": folder / "base-model",
        "SQL": folder / "runs/sql",
        "BROKEN": tmp_path / "broken.jsonl",
        "WRONG": write_jsonl(tmp_path / "wrong.jsonl", [{"prompt": "a"}, {"question": "b"}]),
        "ANSWERED": write_jsonl(tmp_path / "answered.jsonl", [{"messages": chat}]),
        "SYSTEM": write_jsonl(tmp_path / "system.jsonl", [{"messages": system}]),
        "LONG": tmp_path / "long.txt",
        "FILE": tmp_path / "file.txt",
    }
    names["BROKEN"].write_text('{"prompt": "a"}\n{"prompt": \n')
    names["LONG"].write_text(f"a\n{'b' * 5000}\n{'c' * 5000}\n")
    if "OTHER" in args:
        tree = lj.lorafy(made[2]["base"], [RULES["peft"]])
        lj.save_adapter(names["OTHER"], tree, about={"model": str(names["OTHERBASE"])})
        write_model(names["OTHERBASE"], CHATML)

    def filled(text):
        for name, path in names.items():
            text = text.replace(name, str(path))
        return text

    given = [filled(arg) for arg in args.split()]
    if "--adapter" not in given:
        given += ["--model", str(folder / "base-model")]
    assert filled(words) in fails(capsys, *given)
