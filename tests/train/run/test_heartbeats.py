"""Whose silence is too long, and whose is this process's own."""

from train.processes.peers import Heartbeats


def late(heartbeats, turns, *, heard=(), seconds=1.0):
    """The processes whose silence became too long, and in which turn."""
    told = {}
    for turn in range(turns):
        for process in heard:
            heartbeats.heard(process)
        told |= dict.fromkeys(heartbeats.count(seconds), turn)
    return told


def test_a_process_that_is_silent_for_the_timeout_is_told_of_once():
    heartbeats = Heartbeats([1, 2, 3], 100.0)
    assert heartbeats.every == 1.0 and Heartbeats([1], 4.0).every == 0.5
    heartbeats.forget(3)
    assert late(heartbeats, 99, heard=[2]) == {}
    assert late(heartbeats, 200, heard=[2]) == {1: 0}
    heartbeats.heard(1)  # of one that has been told of, and of one that has ended, none counts
    heartbeats.heard(3)
    assert late(heartbeats, 200) == {2: 98}


def test_a_silence_ends_with_a_sign_of_life():
    heartbeats = Heartbeats([1], 100.0)
    assert late(heartbeats, 99) == {}
    heartbeats.heard(1)
    assert late(heartbeats, 99) == {} and late(heartbeats, 1) == {1: 0}


def test_time_in_which_this_process_stood_still_is_not_the_others_silence():
    heartbeats = Heartbeats([1], 100.0)
    assert heartbeats.count(3600.0) == {}
    assert late(heartbeats, 97) == {} and late(heartbeats, 1) == {1: 0}


def test_a_silence_knows_since_when(monkeypatch):
    clock = iter([1000.0, 1007.0])
    monkeypatch.setattr("train.processes.peers.time.time", lambda: next(clock))
    heartbeats = Heartbeats([1], 4.0)
    heartbeats.heard(1)
    silences = [heartbeats.count(0.5) for _ in range(8)]
    assert silences == [{}] * 7 + [{1: (4.0, 1007.0)}]
