"""The counts that tests.readability prints, beside counts by hand."""

from pathlib import Path

from tests.readability import count, packages, table_line

CODE = '''"""A docstring that is no code."""

import math


def mean(values, whole=False):
    """Returns the mean."""
    # a comment
    total = sum(
        values
    )
    if (n := len(values)) == 0:
        return math.nan
    part, rest = divmod(total, n)
    return part
'''


def test_counts_are_those_by_hand():
    counts = count(CODE)
    # def mean ( values , whole = False ) : | total = sum ( | values | )
    # if ( n := len ( values ) ) == 0 : | return math . nan
    # part , rest = divmod ( total , n ) | return part
    assert counts.n_tokens == 10 + 4 + 1 + 1 + 12 + 4 + 10 + 2
    assert counts.n_lines == 8
    assert counts.names == {name: 1 for name in ("values", "whole", "total", "n", "part", "rest")}


def test_a_line_names_what_is_vague(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(CODE)
    title, tokens, a_line, vague, *frequent = table_line(tmp_path).split()
    assert (title, tokens, a_line, vague) == (str(tmp_path), "44", "5.5", "50.0%")
    assert " ".join(frequent) == "whole 1, part 1, rest 1"


def test_all_packages_are_in_the_table():
    names = {path.name for path in packages()}
    assert {"core", "adapt", "training", "stages", "serve"} <= names
