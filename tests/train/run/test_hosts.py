"""Work that processes share, and its errors: every process has all results, or the same error."""

import json
import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from lora_jax.training import processes as in_training
from lora_jax.training.data import chats, drafts
from lora_jax.training.processes import Agreement
from tests.train.tiny import FORGETFUL, tokenizer, write_jsonl
from train.console.errors import UserError
from train.data.chats import tokenize
from train.data.dataset import Dataset, dataset_from_rows
from train.options.scripts.sft import Config, SftOptimConfig, SftRunConfig
from train.processes import hosts, peers
from train.processes.hosts import check_alike, map_over_processes, raise_in_every_process
from train.run.pretrained import ModelInfo
from train.settings.files import options_of_processes
from train.sft import parse
from train.tasks import stream

TURNS = [
    {"role": "user", "content": "1?"},
    {"role": "assistant", "content": "so|2"},
    {"role": "user", "content": "3?"},
    {"role": "assistant", "content": "then|4"},
]


@pytest.fixture
def processes(monkeypatch):
    """Runs a function as each of n processes, here threads: what each returned or raised."""
    here = threading.local()
    monkeypatch.setattr(jax, "process_index", lambda: here.index)

    def run(n, function):
        monkeypatch.setattr(jax, "process_count", lambda: n)
        parts, turn = [b""] * n, threading.Barrier(n, timeout=10)

        def exchanged(own):
            parts[here.index] = hosts._encode_json(own)
            turn.wait()
            received = [json.loads(part) for part in parts]
            turn.wait()
            return received

        def as_process(i):
            here.index = i
            try:
                return function()
            except UserError as error:
                return str(error)

        monkeypatch.setattr(hosts, "_send_to_all", exchanged)
        with ThreadPoolExecutor(n) as pool:
            return list(pool.map(as_process, range(n)))

    return run


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_each_process_does_its_part_and_has_all(n, processes):
    done = []

    def work(item):
        done.append(item)
        return item * item

    got = processes(n, lambda: map_over_processes(work, range(5)))
    assert got == [[0, 1, 4, 9, 16]] * n
    assert sorted(done) == [0, 1, 2, 3, 4], "each item is worked on once"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_all_processes_raise_the_error_of_the_first_item(n, processes):
    def work(item):
        if item in (2, 3):
            raise UserError(f"row {item} is bad")
        return item

    assert processes(n, lambda: map_over_processes(work, range(6))) == ["row 2 is bad"] * n


def prepared(*, fails=None, before=True, n_rows=4):
    """A run's preparation, in which one process may fail, before or after the rows are shared."""

    def check():
        if jax.process_index() == fails:
            raise UserError("there is no such file")

    def prepare():
        with raise_in_every_process():
            if before:
                check()
            rows = map_over_processes(str, range(n_rows))
            if not before:
                check()
        return rows

    return prepare


@pytest.mark.parametrize("before", [True, False])
def test_what_one_process_cannot_do_all_leave(before, processes):
    assert processes(3, prepared(before=before)) == [["0", "1", "2", "3"]] * 3
    said = processes(3, prepared(fails=2, before=before))
    assert said == ["process 2 of 3: there is no such file"] * 3
    assert processes(1, prepared(fails=0)) == ["there is no such file"]


def test_an_error_of_all_is_told_once(processes):
    def prepare():
        with raise_in_every_process():
            raise UserError("--steps 0")

    assert processes(2, prepare) == ["--steps 0"] * 2


def test_processes_that_were_not_started_alike(processes):
    rows = [{"prompt": "a"}, {"prompt": "b"}]

    def started(**odd):
        """The third process has something odd."""

        def prepare():
            own = odd if jax.process_index() == 2 else {}
            run = SftRunConfig(process_id=jax.process_index(), output=own.get("output", "runs/sql"))
            config = Config(optim=SftOptimConfig(seed=own.get("seed", 0)), run=run)
            with raise_in_every_process():
                check_alike(options_of_processes(config), rows=own.get("rows", rows), model="llama")

        return prepare

    assert processes(3, started()) == [None] * 3
    for odd, expected in (
        ({"seed": 1}, "differ: process 2 has --seed 1, not 0. Start all"),
        ({"output": "here"}, "differ: process 2 has --output here, not runs/sql. Start all"),
        ({"rows": rows[::-1]}, "differ: process 2 has rows "),
        ({"seed": 1, "rows": rows[:1]}, "process 2 has --seed 1, not 0, process 2 has rows "),
    ):
        said = processes(3, started(**odd))
        assert said == [said[0]] * 3 and expected in said[0]


@pytest.mark.parametrize("at_once", [7, 100, 2**20])
def test_what_is_exchanged_comes_back(at_once, monkeypatch):
    """With the other's part longer than one's own, in one round or in many."""
    monkeypatch.setattr(hosts, "_ROUND_BYTES", at_once)
    mine, other = {"ids": list(range(5)), "said": "ü\ud800"}, list(range(400))
    of_other = np.frombuffer(json.dumps(other).encode(), np.uint8)
    sent = []

    def allgather(array):
        if array.dtype == np.int32:
            return np.stack([array, np.int32(divmod(of_other.size, at_once))])
        sent.append(array)
        start = (len(sent) - 1) * at_once
        return np.stack([array, of_other[start : start + at_once]])

    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", allgather)
    first, second = hosts._send_to_all(mine)
    assert first == mine and second == other
    assert len(sent) == -(-of_other.size // at_once)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (np.arange(3), "ndarray is not JSON serializable"),
        (np.int32(3), "int32 is not JSON serializable"),
        ({"ids": {1, 2}}, "set is not JSON serializable"),
        (UserError("no"), "UserError is not JSON serializable"),
        ((1, 2), r"JSON changes .*\(1, 2\)"),
        ({1: "one"}, "JSON changes .*{1: 'one'}"),
        (float("nan"), "JSON changes .*nan"),
    ],
)
def test_what_json_does_not_hold_is_refused(result, message, processes):
    with pytest.raises(TypeError, match=f"processes exchange only dicts .*{message}"):
        processes(2, lambda: map_over_processes(lambda _: result, range(2)))


def test_rows_are_the_same_tokens_however_many_processes_read_them(processes, monkeypatch):
    monkeypatch.setattr(chats, "BLOCK", 2)  # rows that one process tokenises at once
    rows = [{"prompt": f"{i} ä?", "completion": "yes" * (i + 1)} for i in range(5)]
    rows.append({"messages": TURNS})
    spoken = tokenizer(FORGETFUL)
    for made in processes(3, lambda: tokenize(dataset_from_rows("rows", rows), spoken)):
        alone = processes(1, lambda: tokenize(dataset_from_rows("rows", rows), spoken))[0]
        assert [t.row for t in made] == [t.row for t in alone] == [1, 2, 3, 4, 5, 6, 6]
        for one, other in zip(made, alone, strict=True):
            assert (one.ids.dtype, one.counts.dtype) == (np.int32, bool)
            np.testing.assert_array_equal(one.ids, other.ids)
            np.testing.assert_array_equal(one.counts, other.counts)
            assert one.counts.any() and not one.counts.all()


def test_a_stream_is_the_same_however_many_processes_read_it(processes, monkeypatch, tmp_path):
    monkeypatch.setattr("train.data.blocks.BLOCK_BYTES", 200)
    rows = [{"prompt": f"{i} ä?", "completion": "yes" * (i % 9 + 1)} for i in range(40)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = parse(["--dataset", str(data), "--stream", "--steps", "9", "--truncate"])
    outline = ModelInfo("a model", tokenizer(), None, {})
    (blocks,) = processes(1, lambda: stream.read_rows(config))[0].train

    def batches():
        feed = stream.examples(config, stream.read_rows(config), outline).feed(9)
        feed._reader = None  # a process is a thread here, and reads in that thread
        feed.first()
        return [feed.batch(step) for step in range(9)]

    (alone,) = processes(1, batches)
    assert len(blocks.sizes) > 5
    for made in processes(3, batches):
        for one, other in zip(made, alone, strict=True):
            for name, array in one.items():
                np.testing.assert_array_equal(array, other[name])


def test_processes_take_the_tokens_of_an_earlier_run_together(processes, monkeypatch, tmp_path):
    """Each has a folder of its own; where one lacks its file, all tokenise, and none waits."""
    rows = [{"prompt": f"{i}?", "completion": "yes"} for i in range(5)]
    rendered, original = [], drafts.conversation
    monkeypatch.setattr(drafts, "conversation", lambda *a: rendered.append(a) or original(*a))

    def read():
        folder = tmp_path / str(jax.process_index())
        data = Dataset("rows", lambda: rows, kept_in=str(folder))
        return [t.ids.tolist() for t in tokenize(data, tokenizer())]

    first = processes(2, read)
    assert len(rendered) == 5 and first[0] == first[1]
    assert processes(2, read) == first and len(rendered) == 5
    (file,) = (tmp_path / "1").iterdir()
    file.unlink()
    assert processes(2, read) == first and len(rendered) == 10
    assert file.is_file()


def connected(processes, n, timeout=60.0):
    """Three processes' lines, and what each was told: what is in an `Ending`."""
    told = [[] for _ in range(n)]

    def connect():
        here = jax.process_index()
        return peers.connect(f"localhost:{here}", told[here].append, timeout)

    return processes(n, connect), told


def eventually(holds):
    until = time.monotonic() + 10
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    assert holds()


@pytest.mark.parametrize("who", [0, 2])
def test_the_others_are_told_why_a_process_ends(who, processes):
    lines, told = connected(processes, 3)
    lines[who].tell("got SIGTERM", 143)
    others = [told[i] for i in range(3) if i != who]
    eventually(lambda: others == [[(who, "got SIGTERM", 143, False, False)]] * 2)
    assert told[who] == []
    for line in lines:
        line.close()
    eventually(lambda: not any(t.is_alive() for line in lines for t in line._threads.values()))


def test_a_process_that_ends_after_its_step_may_still_be_lost(processes):
    lines, told = connected(processes, 2)
    lines[1].tell("got SIGTERM", 143, deferred=True)
    eventually(lambda: told[0] == [(1, "got SIGTERM", 143, False, True)])
    lines[1]._connections[0].shutdown(socket.SHUT_RDWR)
    eventually(lambda: told[0][1:] == [(1, peers.LOST, 1, True, False)])
    for line in lines:
        line.close()


@pytest.mark.parametrize("who", [0, 2])
def test_the_others_are_told_of_a_process_that_was_killed(who, processes):
    lines, told = connected(processes, 3)
    lines[1 if who else 2].close()  # it has done all, and ends: the others stay
    for connection in lines[who]._connections.values():
        connection.shutdown(socket.SHUT_RDWR)
    left = 0 if who else 1
    eventually(lambda: told[left] == [(who, peers.LOST, 1, True, False)])
    for line in lines:
        line.close()
    eventually(lambda: not any(t.is_alive() for line in lines for t in line._threads.values()))


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 2])
def test_the_others_and_itself_are_told_of_a_process_that_is_frozen(who, processes, monkeypatch):
    """It sends nothing, and ends nothing; of the others, whose hearts beat, none is told of."""
    lines, told = connected(processes, 3, timeout=1.5)
    send = lines[who]._send
    monkeypatch.setattr(lines[who], "_send", lambda *line: None)
    eventually(lambda: all(told))
    place = f"process {os.getpid()} of {socket.gethostname()}"
    for ending, *_ in told:
        assert (ending.process, ending.code, ending.unannounced) == (who, 1, True)
        assert re.match(r"has not answered since \d\d:\d\d:\d\d \(\d s\)\. It is", ending.why)
        assert ending.why.endswith(f"If {place} still exists, end it first")
    monkeypatch.setattr(lines[who], "_send", send)
    for line in lines:
        line.close()


@pytest.mark.parametrize("first", [0, 1])
def test_who_has_done_all_first_hears_that_the_others_have_too(first, processes):
    """And does not take them for lost, while it waits for them."""
    lines, told = connected(processes, 2)
    lines[first].close()
    eventually(lambda: lines[1 - first]._ended == {first})
    lines[1 - first].close()
    eventually(lambda: not any(t.is_alive() for line in lines for t in line._threads.values()))
    assert told == [[], []] and not any(line._connections for line in lines)


@pytest.mark.parametrize("ends", [False, True])
def test_process_0_waits_for_the_others_also_while_it_is_told_that_one_was_killed(ends, processes):
    """And no longer than until they have ended, which is not told at the same time."""
    waited = []

    def connect():
        first = jax.process_index() == 0
        return peers.connect("localhost:0", wait if first else lambda ending: None, 60.0)

    def wait(ending):
        if not waited:
            began = time.monotonic()
            if ends:
                lines[1]._connections[0].shutdown(socket.SHUT_RDWR)
            lines[0].wait_for_the_others(60.0 if ends else 0.3)
            waited.append((ending.process, time.monotonic() - began))

    lines = processes(3, connect)
    lines[2]._connections[0].shutdown(socket.SHUT_RDWR)
    eventually(lambda: waited)
    assert waited[0][0] == 2 and (ends or 0.2 < waited[0][1] < 5), "process 1 still runs"
    for line in lines:
        line.close()


def test_strangers_do_not_keep_the_processes_apart(processes, monkeypatch):
    """Five that connect and say nothing, and some that say what is no greeting."""
    reached, strangers = peers._connect_to_first_process, []

    def beside_strangers(offer):
        for text in (*[b""] * 5, b"[" * 5000 + b"\n", b"7\n", b"{}\n", b"x" * 10**5):
            strangers.append(socket.create_connection((offer["host"], offer["port"])))
            strangers[-1].sendall(text)
        return reached(offer)

    monkeypatch.setattr(peers, "_connect_to_first_process", beside_strangers)
    lines, _ = connected(processes, 2)
    assert all(isinstance(line, peers.Peers) for line in lines)
    for line in lines:
        line.close()
    for stranger in strangers:
        stranger.close()


def test_a_connection_that_sends_no_messages_ends_and_no_other(processes):
    lines, told = connected(processes, 3)
    lines[2]._connections[0].sendall(b"[" * 100_000 + b"\n")
    eventually(lambda: told[0] == [(2, peers.LOST, 1, True, False)])
    lines[1].tell("got SIGTERM", 143)
    eventually(lambda: told[0][1:] == [(1, "got SIGTERM", 143, False, False)])
    for line in lines:
        line.close()


def test_only_the_coordinators_interface_is_listened_on():
    server, host = peers._open_server("localhost:5")
    with server:
        assert (host, server.getsockname()[0]) == ("localhost", "127.0.0.1")
    server, _ = peers._open_server(None)
    with server:
        assert server.getsockname()[0] not in ("0.0.0.0", "::")


def test_processes_that_do_not_reach_each_other_say_where_they_tried(processes, monkeypatch):
    monkeypatch.setattr(peers, "_connect_to_first_process", lambda offer: None)
    lines, _ = connected(processes, 2)
    assert lines[0] == lines[1] and lines[0].startswith("process 1 does not reach process 0 at loc")


@pytest.mark.parametrize(("seconds", "asked"), [(2.0, 20), (0.25, 5), (0.01, 2)])
def test_the_others_are_asked_once_a_second(seconds, asked, monkeypatch):
    """Counts rounds in twenty turns: all long ones, some of a quarter, every tenth short one."""
    clock, rounds = [0.0], []

    def allgather(own):
        rounds.append(own)
        return np.stack([own, np.float32([0, 0])])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(in_training.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(in_training.multihost_utils, "process_allgather", allgather)
    agreement, signals = Agreement(), iter([None] * (asked - 1) + [15])
    told = []
    for _ in range(20):
        clock[0] += seconds
        told.append(agreement.largest(lambda: next(signals)))
    assert len(rounds) == asked
    assert [number for number in told if number] == [15]
