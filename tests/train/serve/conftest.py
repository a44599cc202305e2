import pytest

from tests.train.serve.waiting import bounded


@pytest.fixture
def client(tmp_path):
    """A client of Tinker's endpoints over a fake engine."""
    pytest.importorskip("httpx2")
    from tests.train.serve.client import Client
    from tests.train.serve.fakes import FakeEngine

    found = Client(FakeEngine(), tmp_path)
    yield found
    found.engine.stop()


def limit(item):
    """The seconds that a test may take, on a slow and loaded machine."""
    return 1200 if any(map(item.get_closest_marker, ("slow", "serving"))) else 300


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    with bounded(limit(item)):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with bounded(limit(item)):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    with bounded(limit(item)):
        return (yield)
