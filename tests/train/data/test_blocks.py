"""Files in blocks, each read without those before it."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.train.tiny import write_jsonl
from train.console.errors import UserError
from train.data import blocks
from train.data.blocks import find_blocks
from train.data.files import read_rows

ROWS = [{"prompt": "ü" * (n % 7), "completion": "x" * (n * n % 41), "n": n} for n in range(60)]


def read(*names, split="train"):
    found = find_blocks([str(name) for name in names], split=split, subset=None)
    return found, [found.read(block) for block in range(len(found.sizes))]


@pytest.mark.parametrize("size", [1, 7, 50, 64, 1000, 10**6])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\n\n"])
def test_each_line_is_in_one_block_wherever_blocks_are_cut(tmp_path, monkeypatch, size, ends):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    text = b"\xef\xbb\xbf" + ends.join(lines).encode()  # without an end of the last line
    path.write_bytes(text)
    found, parts = read(path)
    rows = [row for part, numbered in parts for _, row in numbered]
    assert rows == ROWS and len(found.sizes) == -(-len(text) // size)
    assert found.sizes.sum() == len(text)
    for part, numbered in parts:
        for at, row in numbered:
            here = text[at:].split(b"\n")[0].removeprefix(b"\xef\xbb\xbf")
            line = text.count(b"\n", 0, at) + 1
            assert json.loads(here) == row
            assert [*map(str, row.place)] == [str(path), f"line {line} (byte {at:,})"]
            assert found.named(part, at) == f"the row at byte {at:,} of {path}"


def test_folders_parquet_and_saved_data_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 200)
    monkeypatch.setattr(blocks, "_BLOCK_ROWS", 25)
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", ROWS[:20])
    write_jsonl(folder / "test.jsonl", ROWS[:3])
    table = pyarrow.Table.from_pylist(ROWS[20:])
    pyarrow.parquet.write_table(table, folder / "b.parquet", row_group_size=15)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    found, parts = read(folder, tmp_path / "saved")
    rows = [row for _, numbered in parts for _, row in numbered]
    assert rows == read_rows(str(folder)) + ROWS
    assert [part.where for part in found.parts] == ["byte", "row", "row"]
    assert [len(part.sizes) for part in found.parts][1:] == [3, 3] and (found.sizes > 0).all()
    last, numbered = parts[-1]
    assert found.named(last, numbered[-1][0]) == f"the row at row 60 of {tmp_path / 'saved'}"
    assert [n for n, _ in parts[-4][1]] == list(range(31, 41))
    assert read(folder)[0].digest() == read(folder)[0].digest() != found.digest()


def test_a_changed_file_has_another_fingerprint(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    before = read(path)[0].digest()
    path.write_text(path.read_text().replace("xxxx", "xxxy"))
    assert read(path)[0].digest() != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "a,b\n1,2\n", "cannot start reading .*rows.csv in its middle"),
        ("rows.jsonl.gz", "", "rows.jsonl.gz in its middle"),
        ("rows.json", ' [{"a": 1}]', "rows.json in its middle"),
        ("empty.jsonl", "", "has no rows"),
        ("bad.jsonl", '{"a": 1}\n{"a"\n', 'bad.jsonl, line 2 .byte 9. is not JSON .*: \'{"a"'),
        ("list.jsonl", "{}\n[1]\n", r"list.jsonl, line 2 \(byte 3\) is not a JSON object: .\[1\]"),
        ("text.parquet", "no", "cannot be read as Parquet"),
    ],
)
def test_what_cannot_be_streamed_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)
