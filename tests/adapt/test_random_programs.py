"""The laws on random programs. See tests/adapt/random_programs.py for their steps."""

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.adapt.random_programs import WAYS, check, programs

# Some use a kernel only mirrored, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::lora_jax.RoleWarning")

COMMON = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
ways = st.sampled_from(list(WAYS))


@settings(max_examples=2, **COMMON)
@given(programs(), ways)
def test_random_programs_keep_the_laws(program, way):
    with jax.enable_x64(True):
        check(program, way)


@pytest.mark.slow
@settings(max_examples=25, **COMMON)
@given(programs(), ways)
def test_many_random_programs_keep_the_laws(program, way):
    with jax.enable_x64(True):
        check(program, way)
