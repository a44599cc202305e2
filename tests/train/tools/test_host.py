"""Tools and environments in their processes: what an ugly one does, it does to its row alone."""

import base64
import json
import pickle
import socket
import textwrap
import threading
import time
from pathlib import Path

import pytest

from train.console.errors import UserError
from train.tasks.tool_use import list_tools
from train.tools.contract import ToolAnswer, ToolCall
from train.tools.host import _MAX_EPISODES as AT_ONCE
from train.tools.host import FAILED, ProcessHost

CODE = '''
import asyncio, os, random, signal, subprocess, sys, time

def add(a: int, b: int = 1) -> int:
    """Adds.

    Args:
        a: a number
        b: another
    """
    print("x" * 10)
    return a + b

def fail(text: str):
    """Raises.

    Args:
        text: what to say
    """
    raise ValueError(text)

def leave():
    """Raises SystemExit."""
    sys.exit(3)

def interrupt():
    """Is interrupted."""
    raise KeyboardInterrupt

async def wait(seconds: float) -> str:
    """Waits.

    Args:
        seconds: how long
    """
    await asyncio.sleep(seconds)
    return f"waited {seconds}"

def hang():
    """Hangs."""
    while True:
        time.sleep(1)

def kill():
    """Is killed."""
    os.kill(os.getpid(), signal.SIGKILL)

def kill_all():
    """Kills the program that forks the processes, too."""
    os.kill(os.getppid(), signal.SIGKILL)
    kill()

def fork() -> str:
    """Forks, and both return."""
    return f"{os.fork() == 0}"

def leave_child() -> int:
    """Starts a process that stays."""
    return subprocess.Popen(["sleep", "1000"]).pid

def flood() -> str:
    """Prints and returns 100 MB."""
    for _ in range(100):
        print("y" * 1_000_000)
        os.write(1, b"z" * 1_000_000)
    return "w" * 100_000_000

def half(text: str) -> str:
    """Returns half a pair, as names of files may have, behind a text.

    Args:
        text: a text
    """
    return text + chr(0xD800)

def parts() -> list:
    """Returns parts of the type text."""
    return [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

class Counter:
    """Counts from a row's start."""

    def __init__(self):
        self._n = None

    def reset(self, start, more=None, **row):
        if start == "bad":
            raise KeyError(start)
        if start == "hang":
            time.sleep(1000)
        self._n = start
        return f"from {start} of {sorted(row)}, {random.random()}"

    def count(self, by: int) -> int:
        """Counts on.

        Args:
            by: a number
        """
        self._n += by
        return self._n

    def get_reward(self) -> float:
        return {7: None, 8: float("nan")}.get(self._n, self._n / 2)

class Calculator:
    def __init__(self, factor):
        self.factor = factor

    def scale(self, a: int) -> int:
        """Multiplies, by more each time.

        Args:
            a: a number
        """
        self.factor += 1
        return (self.factor - 1) * a

    @staticmethod
    def negate(a: int) -> int:
        """Negates.

        Args:
            a: a number
        """
        return -a

calculator = Calculator(3)
'''
TOOLS = "add fail leave interrupt wait hang kill kill_all fork leave_child flood half parts".split()
METHODS = ["calculator.scale", "Calculator.negate"]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools") / "mine.py"
    path.write_text(textwrap.dedent(CODE))
    made = ProcessHost(f"{path}:Counter", [f"{path}:{name}" for name in TOOLS + METHODS], 60.0)
    yield made
    made.close()


def opened(host, *starts, **more):
    futures = host.open([{"start": start, "prompt": "?"} for start in starts], **more)
    return [future.result(60) for future in futures]


def answers(episode, *calls):
    turn = episode.call([ToolCall(name, arguments) for name, arguments in calls]).result(60)
    assert turn.lost is None
    return turn.answers


def is_alive(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def ends(process):
    """Waits until a process that was killed is gone."""
    for _ in range(600):
        if not is_alive(process):
            return True
        time.sleep(0.05)
    return False


def test_tools_are_described_as_transformers_describes_them(host):
    names = [tool["function"]["name"] for tool in host.tools]
    assert names == [*TOOLS, "scale", "negate", "count"] and host.rewards and host.name == "Counter"
    assert host.needs == ["start"]
    assert host.tools[0] == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "a number"},
                    "b": {"type": "integer", "description": "another"},
                },
                "required": ["a"],
            },
            "return": {"type": "integer"},
        },
    }


def test_calls_are_answered_as_trl_answers_them(host):
    (episode,) = opened(host, 3)
    assert answers(
        episode,
        ("wait", {"seconds": 0.01}),
        ("add", {"a": 2}),
        ("fail", {"text": "no 'such' thing"}),
        ("add", {"c": 1}),
        ("nothing", {}),
        ("wait", {"seconds": "x"}),
        ("parts", {}),
        ("leave", {}),
        ("count", {"by": 4}),
    ) == (
        ToolAnswer("wait", "waited 0.01"),
        ToolAnswer("add", "3"),
        ToolAnswer("fail", str({"error": "no 'such' thing"}), failed=True),
        ToolAnswer(
            "add", str({"error": "add() got an unexpected keyword argument 'c'"}), failed=True
        ),
        ToolAnswer("nothing", str({"error": "Tool nothing not found."}), failed=True),
        ToolAnswer(
            "wait",
            str({"error": "'<=' not supported between instances of 'str' and 'int'"}),
            failed=True,
        ),
        ToolAnswer("parts", "ab"),
        ToolAnswer("leave", str({"error": "3"}), failed=True),
        ToolAnswer("count", "7"),
    )
    assert answers(episode, ("half", {"text": "a\udc00"}))[0].content == "a??"
    name = "\ud83d"
    assert answers(episode, (name, {}))[0].name == "?"
    deep = ToolCall("add", {"a": json.loads("[" * 300 + "]" * 300)})
    assert episode.call([deep]).result(60).answers[0].failed
    malformed = episode.call([ToolCall("", None, "no JSON")]).result(60)
    assert malformed.answers == (ToolAnswer("unknown", str({"error": "no JSON"}), failed=True),)
    episode.close()


def test_methods_are_tools_and_each_episode_has_its_own_object(host):
    for episode in opened(host, 1, 2):
        called = answers(episode, ("scale", {"a": 5}), ("scale", {"a": 5}), ("negate", {"a": 5}))
        assert [answer.content for answer in called] == ["15", "20", "-5"]
        episode.close()


def test_the_option_takes_methods():
    names = ["calculator.scale", "Calculator.negate", "add"]
    specs = [f"{__file__}:{name}" for name in names]
    assert list_tools([specs[0], *names[1:]]) == specs
    for name in ("calculator.", "calculator..scale", ".scale", "calculator.2"):
        with pytest.raises(UserError, match="does not name a function of a file"):
            list_tools([f"{__file__}:{name}"])


def test_an_episode_has_its_own_state_and_randomness(host):
    first, second, other = opened(host, 1, 1, 2)
    assert first.opening == second.opening != other.opening
    assert first.opening.startswith("from 1 of ['prompt'], 0.")
    assert [answers(e, ("count", {"by": 5}))[0].content for e in (first, other)] == ["6", "7"]
    assert [e.reward().result(60) for e in (first, second, other)] == [3.0, 0.5, None]
    answers(other, ("count", {"by": 1}))
    assert other.reward().result(60) == FAILED and "nan" in other.problem
    again, differs = opened(host, 1, 1, seeds=[5, 6])
    assert again.opening != differs.opening
    for episode in (first, second, other, again, differs):
        episode.close()


def test_an_ugly_tool_ends_its_row_alone(host):
    killed, hung, forked, neighbour, program = opened(host, 0, 1, 2, 3, 4)
    turn = killed.call([ToolCall("add", {"a": 1}), ToolCall("kill", {})]).result(60)
    assert turn.answers == () and turn.lost == "the rows, row 1: kill ended its process"
    assert killed.lost == turn.lost and killed.reward().result(60) == FAILED
    assert killed.call([ToolCall("add", {"a": 1})]).result(60).lost
    assert answers(forked, ("fork", {}), ("add", {"a": 1})) == (
        ToolAnswer("fork", "False"),
        ToolAnswer("add", "2"),
    )
    (left,) = answers(forked, ("leave_child", {}))
    forked.close()
    assert program.call([ToolCall("kill_all", {})]).result(60).lost.endswith("its process")
    host.seconds = 0.5
    waiting = hung.call([ToolCall("wait", {"seconds": 0.01}), ToolCall("hang", {})])
    assert waiting.result(60).lost == (
        "the rows, row 2: hang took longer than 0.5 seconds. Increase --tool-timeout"
    )
    host.seconds = 60.0
    assert answers(neighbour, ("count", {"by": 1}))[0].content == "4"
    (new,) = opened(host, 9)  # by another program
    assert answers(new, ("count", {"by": 1}))[0].content == "10"
    assert ends(left.content)


def test_a_process_ends_with_an_asker_that_read_no_answer(host):
    channel = host.connect()
    process = json.loads(channel.recv(1000, socket.MSG_PEEK))["process"]
    assert is_alive(process)
    channel.close()
    assert ends(process)


def test_a_process_that_a_tool_interrupts_ends_with_what_its_tools_have_started(host):
    """The asker may be gone by then."""
    with host.connect() as channel, channel.makefile("rw") as lines:

        def ask(**request):
            lines.write(base64.b64encode(pickle.dumps(request)).decode() + "\n")
            lines.flush()
            return lines.readline()

        lines.readline()
        ask(reset={"start": 1}, seed=0, rehearsed=False)
        answer = json.loads(ask(calls=[("leave_child", {})]))
        assert is_alive(answer["value"])
        ask(calls=[("interrupt", {})])
        assert ends(answer["value"])


def test_a_reset_that_fails_loses_its_row(host):
    bad, good = opened(host, "bad", 1)
    assert bad.lost.startswith("the rows, row 1: reset: KeyError: 'bad' (mine.py, line ")
    assert good.lost is None and bad.call([ToolCall("add", {"a": 1})]).result(60).lost
    host.seconds = 0.5
    (hung,) = opened(host, "hang", names=["rows, row 8"])
    host.seconds = 60.0
    assert hung.lost == "rows, row 8: reset took longer than 0.5 seconds. Increase --tool-timeout"


@pytest.mark.slow
def test_a_flood_is_cut(host):
    (episode,) = opened(host, 1)
    (answer, added) = answers(episode, ("flood", {}), ("add", {"a": 1}))
    assert answer.content == "w" * 1_000_000 and added.content == "2"


def test_processes_end_with_the_host(host):
    """Calls that wait for a thread are not made any more: the end would wait for each of them."""
    (episode,) = opened(host, 1)
    (left,) = answers(episode, ("leave_child", {}))
    assert is_alive(left.content)
    ended, close = threading.Event(), episode.close

    def close_and_end():
        close()
        ended.set()

    episode.close = close_and_end
    for _ in range(AT_ONCE):
        host.run(ended.wait)
    waiting = host.run(ended.wait)
    host.close()
    assert ends(left.content)
    assert waiting.cancelled()


BAD = '''
def bare(a: int):
    pass

def untyped(a):
    """Is untyped.

    Args:
        a: x
    """

class NoReset:
    def bound(self):
        """Needs an object."""

class Needs:
    def __init__(self, size):
        pass
    def reset(self):
        pass

class Twice:
    def reset(self):
        pass
    def fine(self):
        """Is fine."""

def fine():
    """Is fine."""
'''


@pytest.mark.slow
def test_what_cannot_be_described_is_named(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(BAD)
    cases = [
        (None, ["bare"], "--tools .*bad.py:bare: bare cannot be described .* docstring"),
        (None, ["untyped"], "--tools .*bad.py:untyped: untyped cannot be described .* type hint"),
        (None, ["gone"], "--tools .*bad.py:gone: The file has no function 'gone'"),
        (None, ["NoReset"], "--tools .*bad.py:NoReset: NoReset is not a function"),
        (None, ["NoReset.bound"], "NoReset.bound is a method of the objects of NoReset"),
        ("NoReset", [], "--environment .*NoReset has no method `reset`"),
        ("Needs", [], r"--environment .*Needs\(\) must be callable without arguments"),
        ("Twice", ["fine"], "--environment .*Two tools are called fine"),
    ]
    for environment, tools, names in cases:
        with pytest.raises(UserError, match=names):
            ProcessHost(
                environment and f"{path}:{environment}", [f"{path}:{name}" for name in tools], 9.0
            )
