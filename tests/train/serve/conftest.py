import pytest

from tests.train.serve.waiting import bounded


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
