import pytest

from tests.train.serve.engine.engines import RECURRENT, World, made_base, made_engine, running


@pytest.fixture(scope="session")
def base(request):
    """A tiny model, and what makes adapters over it; see `over_families`."""
    case = getattr(request, "param", None)
    return made_base() if case is None else made_base(fields=RECURRENT[case])


@pytest.fixture(scope="session")
def world(base, tmp_path_factory):
    """An engine that runs, with snapshots of adapters that have learned something.

    For all files that a worker is given: its programs take seconds to compile.
    """
    with running(made_engine(base)) as engine:
        yield World(engine, base, tmp_path_factory.mktemp("snapshots"))


@pytest.fixture
def engine(world):
    """The engine of a `world`, which has nothing to do once a test ends."""
    yield world.engine
    status = world.engine.status()
    assert (status.waiting, status.drawing) == (0, 0)
    assert not +world.engine._pool._users, "all slots were given back"
    assert not world.engine._sampler._turns._users
