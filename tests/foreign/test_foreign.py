"""The cases whose libraries are in the extra 'foreign', each held to what it says.

An import that fails is a failure. The others run by ``python -m tests.foreign.table``.
"""

import pytest

from tests.foreign.judge import judged
from tests.foreign.registry import EXTRA, cases_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.foreign,
    # Libraries' own habits; jaxnn reads NNX variables by `.value`.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize(
    "case", [c for c in cases_of(EXTRA) if not c.by_hand], ids=lambda case: case.name
)
def test_adapt_is_what_the_case_says(case):
    judged(case)
