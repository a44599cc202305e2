"""Marks of the tests whose judges are PEFT and transformers, which deprecate each other's names."""

import pytest

DEPRECATIONS = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
PARITY = [pytest.mark.parity, DEPRECATIONS, pytest.mark.filterwarnings("ignore::UserWarning")]
# PEFT heeds a pattern, although it says that it did not.
PATTERNS = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match"
)
