"""Rows of files and of the hub."""

import csv
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.train.tiny import write_jsonl
from train.data.files import read_rows
from train.run.errors import UserError

ROWS = [{"prompt": "a, b", "completion": "c"}, {"prompt": "ü\n", "completion": '"d"'}]


def test_files_of_each_kind_give_the_same_rows(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    for kind in ("jsonl", "parquet", "csv"):
        assert read_rows(str(tmp_path / f"rows.{kind}")) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "there is no such file"),
        ("rows.txt", b"a", "a file of one of the kinds .jsonl"),
        ("empty.jsonl", b"\n", "has no rows"),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt"\n', 'line 2 is not JSON .*\'{"prompt"'),
        ("list.jsonl", b"[1]\n", "line 1 is not a JSON object: '\\[1\\]"),
        ("binary.csv", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("text.parquet", b"no parquet", "cannot be read as Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(str(path))
    assert name in str(caught.value)


def test_json_rows_survive_unicode(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "\u2028x", "completion": "y"}, ensure_ascii=False))
    assert read_rows(str(path)) == [{"prompt": "\u2028x", "completion": "y"}]


def test_classes_of_a_hub_dataset_have_their_names(monkeypatch):
    kinds = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, kinds)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: made)
    rows = read_rows("owner/data")
    assert [row["label"] for row in rows] == ["yes", "no", -1]
    assert [row["text"] for row in rows] == ["a", "b", "c"]
