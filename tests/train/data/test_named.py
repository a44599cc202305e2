"""Data sets as --dataset names them: weights, and colons that belong to names."""

import pytest

from train.console.errors import UserError
from train.data.files import parse_datasets


def test_names_and_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b:2").mkdir()
    for given, found in (
        (["a.jsonl"], [("a.jsonl", None)]),
        (["a.jsonl", "owner/data"], [("a.jsonl", None), ("owner/data", None)]),
        (["a.jsonl:3", "owner/data:0.5"], [("a.jsonl", 3.0), ("owner/data", 0.5)]),
        (["b:2"], [("b:2", None)]),  # a folder that is called so
        (["b:2:1", "c:1e1"], [("b:2", 1.0), ("c", 10.0)]),
        (["C:/data/a.jsonl"], [("C:/data/a.jsonl", None)]),
        (["C:a.csv.gz", "x:y/z"], [("C:a.csv.gz", None), ("x:y/z", None)]),
    ):
        assert parse_datasets(given) == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "names no data set"),
        ("a.jsonl:3", "weight has no effect on a single data set.*--dataset a.jsonl"),
        ("a.jsonl:3 b.jsonl", "b.jsonl has no weight, but other data sets do. Give all"),
        ("a.jsonl:1 a.jsonl:2", "names a.jsonl twice"),
        ("a.jsonl:0 b:1", "weight cannot be 0. Use a positive number, as in a.jsonl:3 b.jsonl:1"),
        ("a.jsonl:nan b:1", "cannot be nan.* positive number"),
        ("a.jsonl:inf b:1", "cannot be inf.* positive number"),
        ("a.jsonl:-1 b:1", "cannot be -1.* positive number"),
        ("a.jsonl:x b:1", "'x' is not a weight of a.jsonl"),
        ("a.jsonl: b:1", "'' is not a weight of a.jsonl"),
        (":1 b:1", ":1 has a weight but no name"),
    ],
)
def test_what_is_no_weight_is_refused(given, message):
    with pytest.raises(UserError, match=f"--dataset.*{message}"):
        parse_datasets(given.split())
