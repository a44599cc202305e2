"""The script on data as people have it: its options, what it prints, and what it refuses."""

import pytest

from tests.train.test_sft import fails
from tests.train.tiny import write_jsonl, write_model
from train.sft import parse
from train.tasks import chats

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model")))


def test_a_table_from_a_spreadsheet(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lora_jax.training.data.packing._ROWS_A_LENGTH", 8)
    table = tmp_path / "table.csv"
    lines = [f"{n};{n} plus one?;{'yes ' * (1 + 12 * (n % 2))}" for n in range(24)]
    table.write_text("\r\n".join(["id;Question;Answer", *lines]), encoding="utf-8-sig")
    held_out = write_jsonl(tmp_path / "test.jsonl", [{"Question": "1?", "Answer": "2"}] * 3)
    args = ["--model", model, "--dataset", str(table), "--token-cache", str(tmp_path / "tokens")]
    args += ["--fields", "prompt=Question", "completion=Answer", "--eval-dataset", str(held_out)]

    def read(*more):
        config = parse([*args, "--eval-every", "4", *more])
        chats.check(config)
        rows = chats.read(config)
        made = chats.examples(config, rows, chats.outline(config, rows))
        return made, "\n".join([*made.lines, capsys.readouterr().out])

    data, said = read()
    short, long = data.train.lengths
    assert f"24 rows are batched by length: 2 lengths, {short}, {long}, 9" in said
    assert f"the tokens of {table} are kept in {tmp_path / 'tokens'}" in said
    assert data.facts["lengths"] == (short, long) and len(data.held_out) == 3
    assert data.train.weights.sum() < data.train.tokens_of_all.size - 24 * 20  # the prompts
    data, said = read("--packing")
    assert f"the tokens of {table} are those of an earlier run" in said
    assert f"24 rows are packed into {len(data.train)} sequences of 120 tokens, 99." in said
    assert len(data.train) < 20
    data, said = read("--train-on", "all")
    assert data.train.weights.sum() == data.train.tokens_of_all.size - 24


@pytest.mark.parametrize(
    ("text", "args", "words"),
    [
        ("\ufeffask;say\na;b\n", [], ["line 2 has `ask`, `say`; a row needs", "`prompt` and"]),
        ("ask,say\na,b\n", ["--fields", "prompt=q"], ["line 2 has `ask`, `say`, and no `q`"]),
        ("ask,say\na,b\n", ["--fields", "asked=ask"], ["give name=field, the name being one of c"]),
        ("prompt,completion\na,\n", [], ["line 2: `completion` is ''", "a row needs"]),
        ("prompt,completion\na,b\n", ["--eval-dataset", "x.csv"], ["every --eval-every steps"]),
    ],
)
def test_a_row_that_cannot_be_used_ends_the_script_before_weights_are_read(
    model, tmp_path, capsys, monkeypatch, text, args, words
):
    monkeypatch.setattr("train.finetune.read_model", None)
    table = tmp_path / "table.csv"
    table.write_text(text)
    args = ["--model", model, "--dataset", table, *args, "--output", tmp_path / "run"]
    message = fails(capsys, *args)
    assert all(word in message for word in words) and "\n\n" not in message, message


def test_calls_that_the_template_drops_end_the_script(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.finetune.read_model", None)
    calls = [{"type": "function", "function": {"name": "rain", "arguments": {}}}]
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": calls}]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}])
    args = ["--model", model, "--dataset", rows, "--output", tmp_path / "run"]
    message = fails(capsys, *args)
    assert f"{rows}, line 1: the model's chat template shows no tool calls: 'rain'" in message
