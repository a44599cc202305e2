"""Work that processes share, and its errors: every process has all results, or the same error."""

import pickle

import jax
import numpy as np
import pytest

from train import hosts
from train.errors import UserError
from train.hosts import shared_out


@pytest.fixture
def processes(monkeypatch):
    """Runs a function as each of n processes: (what each returned or raised, their own parts)."""

    def run(n, function):
        monkeypatch.setattr(jax, "process_count", lambda: n)
        parts = []

        def as_process(i, exchanged):
            monkeypatch.setattr(jax, "process_index", lambda: i)
            monkeypatch.setattr(hosts, "_exchanged", exchanged)
            try:
                return function()
            except UserError as error:
                return str(error)

        def give(own):
            parts.append(pickle.loads(pickle.dumps(own)))
            return [parts[-1]] * n  # not yet those of the others

        for i in range(n):
            try:
                as_process(i, give)
            except IndexError:
                pass
        return [as_process(i, lambda own: parts) for i in range(n)], parts

    return run


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_each_process_does_its_part_and_has_all(n, processes):
    items = list(range(5))
    got, parts = processes(n, lambda: shared_out(lambda i: i * i, items))
    assert got == [[0, 1, 4, 9, 16]] * n
    if n > 1:
        assert max(map(len, parts)) == -(-5 // n)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_all_processes_raise_the_error_of_the_first_item(n, processes):
    def work(item):
        if item in (2, 3):
            raise UserError(f"row {item} is bad")
        return item

    got, _ = processes(n, lambda: shared_out(work, range(6)))
    assert got == ["row 2 is bad"] * n


@pytest.mark.parametrize("at_once", [7, 100, 2**20])
def test_what_is_exchanged_comes_back(at_once, monkeypatch):
    """With the other's part longer than one's own, in one round or in many."""
    monkeypatch.setattr(hosts, "_ROUND", at_once)
    mine, other = {"ids": np.arange(5)}, list(range(400))
    of_other = np.frombuffer(pickle.dumps(other), np.uint8)
    sent = []

    def allgather(array):
        if array.dtype == np.int32:
            return np.stack([array, np.int32(divmod(of_other.size, at_once))])
        sent.append(array)
        start = (len(sent) - 1) * at_once
        return np.stack([array, of_other[start : start + at_once]])

    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", allgather)
    first, second = hosts._exchanged(mine)
    np.testing.assert_array_equal(first["ids"], mine["ids"])
    assert second == other
    assert len(sent) == -(-of_other.size // at_once)
