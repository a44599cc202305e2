"""Rewards: a user's functions in processes of their own, what fails in them, and the sum of all."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.support import over
from train.console.errors import UserError
from train.rewards.find import find_rewards
from train.rewards.reward import RewardBatch

N, GROUP = 12, 3
PROMPTS = [f"prompt {i // GROUP}" for i in range(N)]
TEXTS = [chr(97 + i) * (1 + i) for i in range(N)]
IDS = [[7] * (1 + i % 5) for i in range(N)]
COLUMNS = {"answer": [f"answer {i // GROUP}" for i in range(N)], "level": [*range(N)]}


def write(code: str, name: str = "mine.py") -> str:
    Path(name).write_text(textwrap.dedent(code))
    return name


def find(*specs: str, weights=None, **options):
    named = {"columns": [*COLUMNS], "max_tokens": 10, "workers": 2} | options
    return find_rewards(specs, weights, **named)


def score(*specs: str, weights=None, prompts=PROMPTS, **options):
    with closing(find(*specs, weights=weights, **options)) as rewards:
        return rewards(RewardBatch(prompts, TEXTS, IDS, COLUMNS, GROUP))


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def ends(pid: int) -> bool:
    """Returns whether a process ends within seconds."""
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_functions_see_batches_of_whole_groups_and_the_columns():
    write(
        """
        def everything(prompts, completions, completion_ids, **columns):
            assert len(prompts) == 3 and len(set(prompts)) == 1 and len(set(completions)) == 3
            of_trl = {"trainer_state", "log_metric", "log_extra"}
            assert set(columns) == {"answer", "level"} | of_trl
            assert columns["answer"][0].split()[1] == prompts[0].split()[1]
            return [len(a) + 100 * len(b) + 10000 * c
                    for a, b, c in zip(completions, completion_ids, columns["level"])]

        def some(completions, level):
            return [None if l % 2 else l / 4 for l in level]

        async def later(level, missing=3, **_):
            return [missing] * len(level)
        """
    )
    scored = score("mine.py:everything", "mine.py:some", "mine.py:later", weights=[1, -2, 0.5])
    level = np.arange(N)
    everything = np.array([len(t) + 100 * len(i) for t, i in zip(TEXTS, IDS, strict=True)])
    everything = everything + 10000 * level
    assert not scored.failures and not scored.said
    np.testing.assert_array_equal(scored.by_name["everything"], everything)
    some = np.where(level % 2, np.nan, level / 4)
    np.testing.assert_array_equal(scored.by_name["some"], some)
    np.testing.assert_allclose(
        scored.total, everything - 2 * np.where(level % 2, 0, level / 4) + 1.5, rtol=1e-6
    )
    assert scored.total.dtype == scored.by_name["some"].dtype == np.float32


def test_completions_of_a_chat_are_chats():
    write(
        """
        def told(prompts, completions, **_):
            assert prompts[0] == [{"role": "user", "content": "?"}]
            assert all(len(c) == 1 and c[0]["role"] == "assistant" for c in completions)
            return [len(c[0]["content"]) for c in completions]
        """
    )
    scored = score("mine.py:told", prompts=[[{"role": "user", "content": "?"}]] * N)
    np.testing.assert_array_equal(scored.total, [len(text) for text in TEXTS])


@pytest.mark.parity
def test_as_trl_calls_and_adds_up_functions():
    torch = pytest.importorskip("torch")
    from types import SimpleNamespace

    from trl.trainer import grpo_trainer

    write(
        """
        import zlib

        def noise(prompts, completions, completion_ids, answer, level, **_):
            rows = zip(prompts, completions, completion_ids, answer, level)
            return [zlib.crc32(repr(row).encode()) / 2**32 for row in rows]

        def seldom(completion_ids, **columns):
            return [None if len(ids) > 2 else columns["level"][i]
                    for i, ids in enumerate(completion_ids)]

        def rarely(level, **_):
            return [1.5 if l % 5 == 0 else None for l in level]
        """
    )
    sys.path.insert(0, str(Path.cwd()))
    try:
        import mine

        functions = [mine.noise, mine.seldom, mine.rarely]
    finally:
        sys.path.pop(0)
        sys.modules.pop("mine", None)
    rows = [
        {"prompt": PROMPTS[i], **{name: column[i] for name, column in COLUMNS.items()}}
        for i in range(N)
    ]

    def judged(functions, weights):
        trainer = SimpleNamespace(
            accelerator=SimpleNamespace(
                device="cpu", num_processes=1, is_main_process=True, gather=lambda x: x
            ),
            state=SimpleNamespace(global_step=0),
            args=SimpleNamespace(report_to=[]),
            _log_completion_extra=None,
            _log_metric=None,
            environments=None,
            reward_funcs=functions,
            reward_processing_classes=[None] * len(functions),
            reward_func_names=[f.__name__ for f in functions],
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grpo_trainer, "gather", lambda values: values)
            patch.setattr(grpo_trainer, "logger", logging.getLogger("of TRL"))
            found = grpo_trainer.GRPOTrainer._calculate_rewards(trainer, rows, PROMPTS, TEXTS, IDS)
        none = torch.isnan(found).all(dim=1)
        total = (found * torch.tensor(weights)[None]).nansum(dim=1)
        return found.numpy(), torch.where(none, torch.nan, total).numpy()

    for names, weights in (
        (["noise", "seldom", "rarely"], [0.3, -2.0, 7.0]),
        (["seldom", "rarely"], [1.0, 1.0]),
    ):
        of_trl, total = judged([f for f in functions if f.__name__ in names], weights)
        scored = score(*[f"mine.py:{name}" for name in names], weights=weights)
        for i, name in enumerate(names):
            np.testing.assert_array_equal(scored.by_name[name], of_trl[:, i])
        np.testing.assert_allclose(scored.total, total, rtol=1e-6)
    assert np.isnan(total).any() and np.isfinite(total).any()


def test_what_fails_is_counted_by_kind_and_is_no_zero():
    write(
        """
        import sys, os, time

        def of_kind(prompts, completions, level):
            first = level[0] // 3
            if first == 0:
                return {}[completions[0]]
            if first == 1:
                return [1.0] * 4
            if first == 2:
                return [float("inf"), "1.0", 2]
            return [1e39, object(), None]

        def leaves(level, **_):
            if level[0] == 0:
                sys.exit(3)
            if level[0] == 3:
                os._exit(4)
            if level[0] == 6:
                time.sleep(60)
            print("noise", input if level else "")
            return level
        """
    )
    with closing(find("mine.py:of_kind", "mine.py:leaves", "length", seconds=1.0)) as rewards:
        start = time.monotonic()
        scored = rewards(RewardBatch(PROMPTS, TEXTS, IDS, COLUMNS, GROUP))
        assert time.monotonic() - start < 10
        again = rewards(RewardBatch(PROMPTS, TEXTS, IDS, COLUMNS, GROUP))
    nan = np.nan
    np.testing.assert_array_equal(scored.by_name["of_kind"], [*[nan] * 8, 2, *[nan] * 3])
    np.testing.assert_array_equal(scored.by_name["leaves"], [*[nan] * 9, 9, 10, 11])
    assert (
        scored.failures
        == again.failures
        == {
            "of_kind": {
                "exception": 3,
                "wrong number of results": 3,
                "not finite": 2,
                "not a number": 2,
            },
            "leaves": {"exception": 3, "process ended": 3, "timeout": 3},
        }
    )
    said = {line.partition("(")[2].partition(")")[0]: line for line in scored.said}
    assert len(scored.said) == 7 and not again.said, "each kind is named once"
    kinds = [line for line in scored.said if line.startswith("of_kind")]
    assert (
        "of_kind: It returned no reward for 3 of 12 completions (exception): KeyError: 'a' "
        in kinds[0]
    )
    assert kinds[0].endswith("(mine.py, line 7)")
    assert "4 results for 3 completions" in said["wrong number of results"]
    assert said["not finite"].endswith("inf") and "'1.0'" in said["not a number"]
    assert "longer than 1 second" in said["timeout"] and "exit code 4" in said["process ended"]
    # The others' sum would count what failed as 0: only the last has no failure, but None of one.
    last = scored.by_name["leaves"][11] + len(IDS[11]) / 10
    np.testing.assert_allclose(scored.total, [*[nan] * 11, last], rtol=1e-6)


def test_rows_on_which_all_fail_have_no_reward():
    write("def never(level):\n    return [1 if l == 5 else float('nan') for l in level]")
    scored = score("mine.py:never", weights=[2])
    np.testing.assert_array_equal(scored.total, [np.nan] * 5 + [2] + [np.nan] * 6)


def test_silence_is_told_once():
    """A line at each step would bury the others of a run that goes on without a reward."""
    batch = RewardBatch(PROMPTS, TEXTS, IDS, COLUMNS, GROUP)
    with closing(find(earned="dice")) as rewards:
        said = [rewards(batch).said for _ in range(2)]
    silence = "No reward returned a number for any of 12 completions, so nothing is learned "
    silence += "from them. Check the reward functions."
    assert said == [[silence], []]


@pytest.mark.slow
def test_a_function_that_hangs_is_ended_with_what_it_started_and_replaced():
    write(
        """
        import os, signal, subprocess, sys, time
        from pathlib import Path

        signal.signal(signal.SIGTERM, signal.SIG_IGN)

        def hangs(prompts, level):
            if level[0] == 3:
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
                Path("pids").write_text(f"{os.getpid()} {child.pid}")
                while True:
                    pass
            return [os.getpid()] * len(level)
        """
    )
    with closing(find("mine.py:hangs", seconds=1.5, workers=1)) as rewards:
        scored = rewards(RewardBatch(PROMPTS, TEXTS, IDS, COLUMNS, GROUP))
        pids = [int(pid) for pid in Path("pids").read_text().split()]
        assert all(map(ends, pids))
        assert scored.failures == {"hangs": {"timeout": 3}}
        before, after = scored.total[0], scored.total[-1]
        assert before == pids[0] != after
        assert alive(int(after))
    assert ends(int(after))


@pytest.mark.slow
def test_groups_are_judged_at_the_same_time():
    write("import time\ndef slow(level):\n    time.sleep(1)\n    return level")
    with closing(find("mine.py:slow", workers=4)) as rewards:
        rewards(RewardBatch(PROMPTS, TEXTS, IDS, COLUMNS, GROUP))  # starts the processes
        start = time.monotonic()
        rewards(RewardBatch(PROMPTS, TEXTS, IDS, COLUMNS, GROUP))
        assert time.monotonic() - start < 3  # 4 in a row


@pytest.mark.slow
def test_the_process_has_no_jax_and_the_folder_of_the_file():
    Path("sub").mkdir()
    write("VALUE = 4", "sub/neighbour.py")
    write(
        """
        import sys
        import neighbour
        from dataclasses import dataclass

        @dataclass
        class Point:
            x: float = 0.5

        def clean(level):
            assert not {"jax", "numpy", "train", "lora_jax"} & set(sys.modules), sys.modules
            return [neighbour.VALUE + Point().x] * len(level)

        class Judge:
            def __call__(self, level, completions):
                return level

        judge = Judge()
        """,
        "sub/json.py",  # as a file of the standard library
    )
    write("import train.console.errors\ndef ours(level):\n    return level", "other.py")
    scored = score("sub/json.py:clean", "sub/json.py:judge")
    assert not scored.failures, scored.said
    np.testing.assert_array_equal(scored.total, np.arange(N) + 4.5)
    np.testing.assert_array_equal(score("other.py:ours").total, np.arange(N))


@pytest.mark.parametrize(
    ("specs", "weights", "says"),
    [
        (["absent.py:f"], None, "The file absent.py does not exist"),
        (["good"], None, "neither a folder nor a known reward"),
        (["mine.py"], None, "function as file.py:function"),
        (["mine.py:"], None, "function as file.py:function"),
        (
            ["mine.py:other"],
            None,
            "has no function 'other'. Name one of its functions: good, needy, inside",
        ),
        (["mine.py:number"], None, "has no function 'number'"),
        (["mine.py:needy"], None, "needs the column 'solution', but the rows have answer, level"),
        (["mine.py:inside"], None, "Give the environment a method `get_reward`"),
        (["broken.py:f"], None, "ZeroDivisionError: division by zero (broken.py, line 3)"),
        (["syntax.py:f"], None, "SyntaxError: unmatched ')' (syntax.py, line 2)"),
        (["leaves.py:f"], None, "SystemExit: 3 (leaves.py, line 2)"),
        (["dies.py:f"], None, "its process ended (exit code 5)"),
        (
            ["mine.py:good", "length"],
            [1.0],
            "--reward-weights 1.0: 2 rewards need 2 finite weights",
        ),
        (["mine.py:good"], [float("nan")], "finite weights"),
        (["length", "length"], None, "named twice"),
    ],
)
def test_mistakes_are_told_at_once(specs, weights, says):
    write(
        "def good(level): return level\ndef needy(solution): return solution\nnumber = 3"
        "\ndef inside(environments): return environments"
    )
    write("\n\n1 / 0\ndef f(level): return level", "broken.py")
    write("def f(level): return level\n)", "syntax.py")
    write("import sys\nsys.exit(3)", "leaves.py")
    write("import os\nos._exit(5)", "dies.py")
    with pytest.raises(UserError) as raised:
        find(*specs, weights=weights)
    assert says in str(raised.value)


def test_names_that_two_functions_share_are_told_apart():
    write("def length(level): return level")
    write("def length(level): return [2 * l for l in level]", "other.py")
    scored = score("mine.py:length", "other.py:length", "length", weights=[1, 10, 100])
    assert [*scored.by_name] == ["mine.py:length", "other.py:length", "length"]
    np.testing.assert_allclose(
        scored.total, [i + 20 * i + 10 * len(ids) for i, ids in enumerate(IDS)], rtol=1e-6
    )


@over("how", ["SIGKILL", "SIGINT", "exit"], often=[])
def test_no_process_is_left_however_the_script_ends(how):
    write(
        """
        import os, time
        from pathlib import Path

        def hangs(level):
            Path(f"pid-{os.getpid()}").touch()
            while True:
                time.sleep(1)
        """
    )
    script = write(
        f"""
        import os, signal, threading, time
        from contextlib import closing
        from train.rewards.find import find_rewards
        from train.rewards.reward import RewardBatch

        # It is ignored by what a shell starts in the background, tests too.
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def end():
            while len([name for name in os.listdir() if name.startswith("pid-")]) < 2:
                time.sleep(0.01)
            if {how!r} == "exit":
                os._exit(0)
            if {how!r} == "SIGINT":
                os.kill(os.getpid(), 2)
            print("ready", flush=True)

        if __name__ == "__main__":
            n = {N}
            threading.Thread(target=end, daemon=True).start()
            options = {{"columns": ["level"], "max_tokens": 1, "workers": 2}}
            with closing(find_rewards(["mine.py:hangs"], **options)) as r:
                r(RewardBatch(["a"] * n, ["b"] * n, [[1]] * n, {{"level": [*range(n)]}}, 2))
        """,
        "script.py",
    )
    root = str(Path(__file__).parents[3])
    process = subprocess.Popen(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    if how == "SIGKILL":
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    pids = [int(path.name.partition("-")[2]) for path in Path.cwd().glob("pid-*")]
    assert len(pids) == 2 and all(map(ends, pids))
