import pytest

from tests.train.serve.engine.engines import made_base


@pytest.fixture(scope="module")
def base():
    """A tiny model, and what makes adapters over it."""
    return made_base()
