"""Rows that cannot be used are named by file and line, in one paragraph with a remedy."""

import gzip
import json
import sys

import pytest

from tests.train.tiny import write_rows
from train.console.errors import UserError
from train.data.blocks import find_blocks
from train.data.files import find_data_files, read_file, read_rows

GOOD = '{"prompt": "a", "completion": "b"}\n'
HALF = r"has \\ud83d in .*, which is one half of a surrogate pair.*Write the whole character"
LEVELS = "more than 200 levels deep: .*remove the row"
BAD = {
    "half": ('{"prompt": "x \\ud83d y"}', HALF),
    "deep": ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", LEVELS),
    "not as deep as a parser's limit": ('{"a": ' + "[" * 300 + "]" * 300 + "}", LEVELS),
    "digits": ('{"a": ' + "7" * 5000 + "}", "an integer of more than 4,300 digits: .*quotes"),
    "text": ("nonsense", "is not JSON .*one object per line"),
}


def refused(match):
    return pytest.raises(UserError, match=match)


@pytest.fixture(params=BAD)
def bad(request):
    return BAD[request.param]


def test_a_bad_row_is_named_by_its_line(tmp_path, bad):
    text, message = bad
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + "\n" + text + "\n" + GOOD)
    with refused(f"rows.jsonl, line 3.*{message}") as caught:
        read_file(path)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    blocks = find_blocks([str(path)], split="train", subset=None)
    with refused(rf"rows.jsonl, line 3 \(byte {len(GOOD) + 1}\).*{message}"):
        blocks.read(0)


@pytest.mark.parametrize("kind", ["half", "deep", "digits"])
def test_a_bad_row_of_an_array_is_named_by_its_line_and_number(tmp_path, kind):
    text, message = BAD[kind]
    path = tmp_path / "rows.json"
    path.write_text(f"[{GOOD.strip()}, {text}]")
    with refused(f"rows.json, line 1, row 2 .*{message}"):
        read_file(path)
    path.write_text(f"[{GOOD.strip()},\n {text}]")
    with refused(f"rows.json, line 2 .*{message}"):
        read_file(path)


def test_rows_of_one_line_know_their_number(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a": 2},\n{"a": 3}]')
    assert [row.place[1] for row in read_file(path)] == ["line 1, row 1", "line 1, row 2", "line 2"]


def test_whole_characters_in_two_halves_and_long_lists_are_fine(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "😀", "completion": "b", "more": [[[i]] for i in range(300)]}
    digits = "7" * sys.get_int_max_str_digits()
    path.write_text(json.dumps(row) + "\n" + f'{{"a": {digits}}}\n')
    first, second = read_file(path)
    assert first == row and second == {"a": int(digits)}


@pytest.mark.parametrize("opened", [open, gzip.open])
def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path, opened):
    path = tmp_path / ("rows.jsonl" if opened is open else "rows.jsonl.gz")
    with opened(path, "wb") as file:
        file.write(GOOD.encode() * 20_000 + b'{"a": "\xff"}\n')
    with refused("line 20001 is not UTF-8 text .*iconv"):
        read_file(path)


def test_endings_in_capitals_are_read(tmp_path):
    write_rows(tmp_path / "ROWS.JSONL", 3)
    (tmp_path / "more.Csv").write_text("prompt,completion\na,b\n")
    assert find_data_files(str(tmp_path / "ROWS.JSONL")) == [tmp_path / "ROWS.JSONL"]
    assert len(read_rows(str(tmp_path / "ROWS.JSONL"))) == 3 and len(read_rows(str(tmp_path))) == 4
    assert (
        len(find_blocks([str(tmp_path / "ROWS.JSONL")], split="train", subset=None).read(0)[1]) == 3
    )
