"""Values of option files that one reader takes otherwise than another: refused, or read as one."""

import json

import pytest

from tests.train.run.test_table import read
from train.console.errors import UserError
from train.options.scripts.sft import Config
from train.settings.command import read_line


def options(folder, text):
    path = folder / "options.yaml"
    path.write_text(text)
    return read_line(Config(), ["--config", str(path)], "train.sft")[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: 010", "line 1: rank is 010. Write a whole number without .*, such as 10"),
        ("rank: 8\nlr: -007.5", None),
        ("lr: 010", "line 1: lr is 010. Write a number without .*, such as 10"),
        ("steps: 1:30", "line 1: steps is 1:30. Write a whole number"),
        ("dropout: 1:30.5", "line 1: dropout is 1:30.5. Write a number"),
        ("targets: q_proj v_proj", r'line 1: .*\[q_proj, v_proj\] or \["q_proj v_proj"\]'),
        ("layers: 1 2", r"line 1: layers is 1 2. Write a list, \[1, 2\]"),
        ("rank: " + "9" * 5000, r"line 1: rank is 9{77}\.\.\.. Write a whole number.$"),
        ("rank: 8\nlayers: " + "[" * 600, "line 2: lists or groups are nested too deep"),
        ("rank: 8\nmodel: a\x07b", "line 2 is not valid YAML: .* character 0x7"),
    ],
)
def test_what_two_readers_take_otherwise_is_refused_with_what_to_write(text, message, tmp_path):
    if message is None:
        assert options(tmp_path, text).optim.lr == -7.5
        return
    with pytest.raises(UserError, match=message):
        options(tmp_path, text)


def test_numbers_of_yaml_1_2_are_read(tmp_path):
    text = "rank: 0o10\nsteps: 0\nseed: 0x10\nlr: 1e-3\nalpha: 0.5\ntargets: [a b]\nlayers: 3"
    made = options(tmp_path, text)
    assert (made.adapter.rank, made.optim.steps, made.optim.seed) == (8, 0, 16)
    assert (made.optim.lr, made.adapter.alpha) == (1e-3, 0.5)
    assert (made.adapter.targets, made.adapter.layers) == (("a b",), (3,))


@pytest.mark.parametrize(
    ("ending", "text", "message"),
    [
        (".yaml", "- {name: a, rank: 010}", "line 1: rank is 010. Write a whole number without"),
        (".yaml", "- {name: a, targets: q k}", r"line 1: targets is q k. Write a list, \[q, k\]"),
        (".csv", "name,rank\na,010\n", "line 2: rank is 010. Write a whole number without"),
        (".csv", "name,steps\na,1:30\n", "line 2: steps is 1:30. Write a whole number"),
        (".jsonl", '{"name": "a", "targets": "q k"}', r"line 1: targets is 'q k'. Write a list"),
        (".yaml", "- name: a\n  rank: " + "[" * 600, "line 2: lists or groups are nested"),
        (
            ".json",
            '[{"name": "a", "rank": 2}, {"name": "b", "rank": "x"}]',
            r"table.json, line 1, row 2 \(b\): rank is 'x'. Write a whole number",
        ),
        (".JSONL", '{"name": "a", "rank": "x"}', "line 1: rank is 'x'. Write a whole number"),
    ],
)
def test_tables_have_the_same_traps(ending, text, message, tmp_path):
    path = tmp_path / f"table{ending}"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read(path)


def test_texts_of_json_are_taken_as_they_are(tmp_path):
    path = tmp_path / "table.json"
    row = {"name": "a", "model": None, "dataset": ["my rows.jsonl", "😀\x7f"], "lr": 1e-05}
    path.write_text(json.dumps([row]))
    (run,) = read(path)
    assert run.options.data.dataset == ("my rows.jsonl", "😀\x7f")
    assert run.options.optim.lr == 1e-05
