"""The script on data as people have it: its options, what it prints, and what it refuses."""

import pytest

from lora_jax.training.data.order import Order
from tests.train.test_sft import fails
from tests.train.tiny import write_jsonl, write_model
from train.console.errors import UserError
from train.data.lines import format_mixture_lines
from train.sft import parse
from train.tasks import chats

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model")))


def test_a_table_from_a_spreadsheet(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lora_jax.training.data.sequences._ROWS_A_LENGTH", 8)
    table = tmp_path / "table.csv"
    lines = [f"{n};{n} plus one?;{'yes ' * (1 + 12 * (n % 2))}" for n in range(24)]
    table.write_text("\r\n".join(["id;Question;Answer", *lines]), encoding="utf-8-sig")
    held_out = write_jsonl(tmp_path / "test.jsonl", [{"Question": "1?", "Answer": "2"}] * 3)
    args = ["--model", model, "--dataset", str(table), "--token-cache", str(tmp_path / "tokens")]
    args += ["--fields", "prompt=Question", "completion=Answer", "--eval-dataset", str(held_out)]

    def read(*more):
        config = parse([*args, "--eval-every", "4", *more])
        chats.check(config)
        rows = chats.read_rows(config)
        made = chats.examples(config, rows, chats.outline(config, rows))
        return made, "\n".join([*made.lines, capsys.readouterr().out])

    data, said = read()
    short, long = data.train.lengths
    assert f"24 rows are batched by length: 2 lengths, {short}, {long}, 9" in said
    assert f"The tokens of {table} are cached in {tmp_path / 'tokens'}" in said
    assert data.facts["lengths"] == (short, long) and len(data.held_out) == 3
    assert f"The held-out loss is the mean over 3 rows of {held_out}" in said
    learned = data.train.by_name()["weights"].sum()
    assert learned < data.train.table.ids.size - 24 * 20  # the prompts
    data, said = read("--packing")
    assert f"The tokens of {table} come from an earlier run" in said
    assert f"24 rows are packed into {len(data.train)} sequences of 120 tokens, 99." in said
    assert len(data.train) < 20
    data, said = read("--train-on", "all")
    assert data.train.by_name()["weights"].sum() == data.train.table.ids.size - 24


def test_data_sets_in_proportions(model, tmp_path, capsys):
    chats_of = {"a": [{"q": f"{n}?", "r": "yes"} for n in range(60)]}
    chats_of["b"] = [{"prompt": f"{n}?", "completion": "no " * 9} for n in range(30)]
    a, b = (str(write_jsonl(tmp_path / f"{k}.jsonl", rows)) for k, rows in chats_of.items())
    args = ["--model", model, "--fields", "prompt=q", "completion=r"]

    def read(*more):
        config = parse([*args, *more])
        chats.check(config)
        rows = chats.read_rows(config)
        made = chats.examples(config, rows, chats.outline(config, rows))
        return made, "\n".join(made.lines), rows

    for packing in ([], ["--packing"]):
        data, said, _ = read("--dataset", f"{a}:1", f"{b}:3", "--eval-every", "2", *packing)
        assert f"6 of the 60 rows of {a} are held out, drawn by --seed 0: row " in said
        assert f"3 of the 30 rows of {b} are held out" in said
        order = Order.of(data.train, 0, 4)
        lines = format_mixture_lines(data.train, order, order.steps(1))
        assert [line.split(": ")[0] for line in lines] == [a, b]
        assert 20 < float(lines[0].split(" steps, ")[1].split("%")[0]) < 30
        assert "each of its 54 rows comes 0." in lines[0]
        assert "each of its 27 rows comes 2." in lines[1]
        assert data.name(0) == data.name(0).removesuffix(f" of {a}") + f" of {a}"
    data, _, rows = read("--dataset", a, b, "--rows", "20")
    assert len(data.train) == 40 and data.train.mixture is None
    line = format_mixture_lines(data.train, Order.of(data.train, 0, 4), 10)[1]
    assert line.startswith(
        f"{b}: 20 rows in 10 steps, 50.0% of all; each of its 20 rows comes 1.00 "
    )
    with pytest.raises(
        UserError, match="--fields prompt=x: none of .* has the field `x` in its first row"
    ):
        again = write_jsonl(tmp_path / "c.jsonl", chats_of["b"])
        read("--dataset", b, str(again), "--fields", "prompt=x")
    with pytest.raises(UserError, match="--dataset sql is a task .*Remove a.jsonl"):
        parse(["--dataset", "a.jsonl", "sql"])
    with pytest.raises(UserError, match="is also the training data"):
        read("--dataset", a, b, "--eval-dataset", b, "--eval-every", "1")
    capsys.readouterr()


@pytest.mark.parametrize(
    ("text", "args", "words"),
    [
        ("\ufeffask;say\na;b\n", [], ["line 2 has `ask`, `say`; a row needs", "`prompt` and"]),
        (
            "ask,say\na,b\n",
            ["--fields", "prompt=q"],
            ["no field `q`. It has `ask`, `say`"],
        ),
        (
            "ask,say\na,b\n",
            ["--fields", "asked=ask"],
            ["must have the form name=field. Use one of these names: c"],
        ),
        ("prompt,completion\na,\n", [], ["line 2: `completion` is ''", "a row needs"]),
        ("prompt,completion\na,b\n", ["--eval-dataset", "x.csv"], ["every --eval-every steps"]),
    ],
)
def test_a_row_that_cannot_be_used_ends_the_script_before_weights_are_read(
    model, tmp_path, capsys, monkeypatch, text, args, words
):
    monkeypatch.setattr("train.stages.begin.read_model", None)
    table = tmp_path / "table.csv"
    table.write_text(text)
    args = ["--model", model, "--dataset", table, *args, "--output", tmp_path / "run"]
    message = fails(capsys, *args)
    assert all(word in message for word in words) and "\n\n" not in message, message


def test_calls_that_the_template_drops_end_the_script(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.stages.begin.read_model", None)
    calls = [{"type": "function", "function": {"name": "rain", "arguments": {}}}]
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": calls}]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}])
    args = ["--model", model, "--dataset", rows, "--output", tmp_path / "run"]
    message = fails(capsys, *args)
    assert f"{rows}, line 1: the model's chat template shows no tool calls: 'rain'" in message
