"""Rows of files and of the hub."""

import csv
import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.train.tiny import write_jsonl
from train.console.errors import UserError
from train.data.files import read_rows

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
        ("missing.jsonl", None, "does not exist"),
        ("rows.txt", b"a", "unknown kind of file. Use one of: .jsonl"),
        ("empty.jsonl", b"\n", "has no rows"),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt"\n', 'line 2 is not JSON .*\'{"prompt"'),
        ("list.jsonl", b"[1]\n", "line 1 is not a JSON object: '\\[1\\]"),
        ("binary.csv", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("text.parquet", b"no parquet", "cannot be read as Parquet"),
        (
            "array.json",
            b'[{"a": 1},\n{"a": 2}\n{"a": 3}]',
            "line 3: A comma or the end of the array",
        ),
        ("cut.json", b'[{"a": 1},\n{"a"', "is not a JSON array .*line 2"),
        ("mixed.json", b'[{"a": 1},\n2]', "line 2 is not a JSON object: '2'"),
        ("one.json", b'{\n"data": []}', "line 1 is not JSON .* one array of objects"),
        ("wide.csv", b"a,b\n1,2\n3,4,5\n", "line 3 has 3 fields, but the header has 2 .*in quotes"),
        ("twice.csv", b"a,a\n1,2\n", "header has the field 'a' twice"),
        ("open.csv", b'a,b\n1,"2\n3,4\n', "line 2 is not CSV .unexpected end"),
        ("broken.csv.gz", b"a,b", "cannot be unpacked"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(str(path))
    assert name in str(caught.value)


QUOTED = 'prompt{0}completion\r\n"a{0} b"{0}"c\nd"\r\n\r\nü{0}e\r\n'
RECORDS = [("a{} b", "c\nd", "line 2"), ("ü", "e", "line 5")]
AS_LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "gzip"])
def test_texts_are_read_as_people_have_them(tmp_path, mark, packed):
    def read(name, text):
        path = tmp_path / (f"{name}.gz" if packed else name)
        data = mark + text.encode()
        path.write_bytes(gzip.compress(data) if packed else data)
        return read_rows(str(path))

    for name, separator in (("a.csv", ","), ("b.csv", ";"), ("c.csv", "\t"), ("d.tsv", "\t")):
        rows = read(name, QUOTED.format(separator))
        expected = [(p.format(separator), c, line) for p, c, line in RECORDS]
        assert [(row["prompt"], row["completion"], row.place[1]) for row in rows] == expected
    for name in ("e.json", "f.jsonl"):
        assert read(name, "\n".join(AS_LINES)) == ROWS
        rows = read(name, " [\n  " + ",\n\n".join(AS_LINES) + "]\n")
        assert rows == ROWS and [row.place[1] for row in rows] == ["line 2", "line 4"]
    long = "x" * 200_000
    assert read("g.csv", f"prompt,completion\n{long},b\n") == [{"prompt": long, "completion": "b"}]
    assert csv.field_size_limit() == 131_072


def test_a_folder_has_files_of_splits(tmp_path):
    for name in ("part-1.jsonl", "part-0.jsonl.gz", "test/part-0.jsonl", ".hidden.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        data = json.dumps({"prompt": name, "completion": "x"}).encode()
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (tmp_path / "README.md").write_text("no rows")
    rows = read_rows(str(tmp_path))
    assert [row["prompt"] for row in rows] == ["part-0.jsonl.gz", "part-1.jsonl"]
    (row,) = read_rows(str(tmp_path), split="test")
    assert row.place == (str(tmp_path / "test" / "part-0.jsonl"), "line 1")
    with pytest.raises(UserError, match="--split dev: .* its splits: test, train"):
        read_rows(str(tmp_path), split="dev")
    with pytest.raises(UserError, match="holds no data"):
        (tmp_path / "empty").mkdir()
        read_rows(str(tmp_path / "empty"))


def test_rows_are_read_once_from_a_folder_named_as_a_file(tmp_path):
    """Spark writes data.parquet/part-00000.parquet."""
    folder = tmp_path / "data.parquet"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "part-00000.parquet")
    assert read_rows(str(tmp_path)) == read_rows(str(folder)) == ROWS


def test_folders_that_datasets_saved(tmp_path):
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}]
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": calls}]
    made = datasets.Dataset.from_list([{"messages": turns}, {"messages": turns[:1]}])
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "two")
    rows = read_rows(str(tmp_path / "one"))
    asked, called = rows[0]["messages"]
    assert asked == turns[0]  # Arrow gives every turn every field
    assert called == {**turns[1], "content": None} and len(rows) == 2
    assert read_rows(str(tmp_path / "two"), split="test") == rows
    with pytest.raises(UserError, match="--split dev: .* one of: train, test"):
        read_rows(str(tmp_path / "two"), split="dev")


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
