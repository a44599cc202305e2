"""The table in the documentation is that of the registry, and its figures are good."""

from pathlib import Path

import pytest

from tests.foreign.case import Case, Made
from tests.foreign.environments import results_of
from tests.foreign.registry import Environment, all_cases, cases_of
from tests.foreign.table import HEAD, markdown, parsed, row

DOCUMENT = Path(__file__).parent.parent.parent / "lora_jax" / "adapt" / "what_was_run.md"
PRINT_IT = "print the table again: python -m tests.foreign.table"


def test_the_document_lists_the_cases():
    rows = [tuple(row[:5]) for row in parsed(DOCUMENT.read_text())]
    cases = all_cases()
    expected = [(c.library, c.model, c.run, str(c.weights), str(c.merges)) for c in cases]
    assert rows == expected, PRINT_IT


def test_the_figures_are_within_tolerance():
    for (*_, compiled, eager), case in zip(parsed(DOCUMENT.read_text()), all_cases(), strict=True):
        figures = [float(x) for cell in (compiled, eager) for x in cell.split(", ")]
        assert len(figures) == 4 and max(figures) <= case.tolerance, (case.name, PRINT_IT)


def test_cases_have_names_of_their_own():
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)


def test_a_failure_is_a_row_with_its_reason():
    case = Case("lib", "a model", "apply", 3, lambda: Made(None, None, ()))
    text = markdown(HEAD, [row(case, {"case": case.name, "error": "pip says\nno | never"})])
    assert parsed(text)[0][5] == "failed: pip says no \\| never"


def test_an_environment_that_cannot_be_made_is_rows_with_the_reason(tmp_path):
    environment = Environment("none", ("penzai",), ("penzai",), ("penzai",), python=("9.9",))
    _, *results = results_of(environment, [], tmp_path)
    (case,) = cases_of(environment)
    assert row(case, results[0])[5] == "failed: no Python of the releases 9.9 was found"


def test_a_merge_needs_a_reason():
    with pytest.raises(ValueError, match="say why it merges"):
        Case("lib", "a model", "apply", 3, lambda: Made(None, None, ()), merges=1)
