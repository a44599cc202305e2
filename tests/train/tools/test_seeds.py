"""Random numbers and other state of a user's files: each episode begins with its row's."""

import contextlib
import json
import textwrap

import pytest

from tests.train.test_dry_run import GAME as TEMPLATE
from tests.train.tiny import write_jsonl, write_model
from train import grpo
from train.tools.contract import ToolCall
from train.tools.host import ProcessHost

GAME = '''
import itertools, random
import numpy as np
import beside

R, G = random.Random(0), np.random.default_rng(0)
S, P = np.random.RandomState(0), np.random.RandomState(np.random.PCG64(0))
SYSTEM = random.SystemRandom()
COUNT, LOG, TABLE, DONE = itertools.count(), [], {"a": 1}, 0

class Game:
    own, played = random.Random(0), 0

    def reset(self, **row):
        import later
        global DONE
        draws = [g.random() for g in (random, R, self.own, beside.R, later.R, G)]
        draws += [g.random_sample() for g in (np.random, S, P)]
        SYSTEM.random(), next(COUNT), LOG.append(1)
        DONE += 1
        Game.played += 1
        beside.STATE["n"] = 1
        return " ".join(map(str, draws))

    def guess(self, number: int) -> str:
        """Guesses.

        Args:
            number: a number
        """
        return f"{R.random()}"

    def get_reward(self):
        beside.EARNED.add(1)
        return 1.0
'''
BESIDE = "import random\nR, STATE, EARNED = random.Random(0), {}, set()\n"
LATE = '''
class Late:
    """NumPy is imported by `reset` alone, and by the tool alone."""

    def reset(self, tool=False, **row):
        if not tool:
            import numpy as np
            return str(np.random.randint(2**31))

    def draw(self) -> str:
        """Draws."""
        from numpy.random import randint
        return str(randint(2**31))
'''
DRAWN = """
import random
R = random.Random(0)

class Drawn:
    def reset(self, **row):
        import numpy as np
        self._drawn = R.random() + np.random.random_sample()

    def look(self) -> str:
        '''Looks.'''
        return "?"

    def get_reward(self):
        return self._drawn
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("games")
    for name, text in {"game": GAME, "beside": BESIDE, "later": BESIDE, "late": LATE}.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    return folder


@contextlib.contextmanager
def hosted(folder, name):
    host = ProcessHost(f"{folder / name.lower()}.py:{name}", [], 60.0)
    try:
        yield host
    finally:
        host.close()


def openings(host, rows, **options):
    return [future.result(60).opening for future in host.open(rows, **options)]


@pytest.mark.slow
def test_generators_of_a_users_files_have_the_rows_seed_and_streams_of_their_own(folder):
    rows = [{"row": n} for n in (1, 1, 2)]
    with hosted(folder, "Game") as host:
        first, again, other = openings(host, rows)
        seeded = openings(host, rows, seeds=[7, 8, 7])
        assert host.generators == [
            *("beside.py:R", "game.py:R", "game.py:G", "game.py:S", "game.py:P", "game.py:Game.own")
        ]
    assert first == again and seeded[0] == seeded[2]
    draws = [[float(x) for x in text.split()] for text in (first, other, seeded[0], seeded[1])]
    assert len({x for numbers in draws for x in numbers}) == 4 * 9, "no two draws are the same"
    with hosted(folder, "Game") as host:  # as a resumed run opens it
        assert openings(host, rows[:1]) == [first]


@pytest.mark.slow
def test_numpy_has_the_rows_seed_wherever_it_is_imported(folder):
    with hosted(folder, "Late") as host:
        first, again, other = openings(host, [{"row": n} for n in (1, 1, 2)])
        assert first == again != other
        episodes = [f.result(60) for f in host.open([{"row": n, "tool": True} for n in (1, 1, 2)])]
        turns = [episode.call([ToolCall("draw", {})]).result(60) for episode in episodes]
        first, again, other = (turn.answers[0].content for turn in turns)
        assert first == again != other and host.generators == []


def line_of(folder, output, name, *args):
    line = ["--model", write_model(output / "model", TEMPLATE, scale=0.5)]
    line += [
        "--dataset",
        write_jsonl(output / "rows.jsonl", [{"prompt": f"{n}?"} for n in range(3)]),
    ]
    line += ["--environment", f"{folder / name.lower()}.py:{name}", "--output", output / "run"]
    line += ["--group", 2, "--batch-size", 6, "--max-new-tokens", 4, "--seq-len", 512]
    line += ["--targets", "q_proj", "--eval-questions", 0, "--report-to", "none", *args]
    return [str(word) for word in line]


class Shown(BaseException):
    """A dry run has shown an episode."""


@pytest.mark.slow
def test_a_dry_run_names_what_an_episode_changes(folder, tmp_path, capsys, monkeypatch):
    def shown(_):
        raise Shown

    monkeypatch.setattr("train.stages.dry_run.lengths", shown)
    with pytest.raises(Shown):
        grpo.main(line_of(folder, tmp_path, "Game", "--dry-run"))
    said = capsys.readouterr().out
    assert (
        "each episode seeds these random generators from its row: beside.py:R, game.py:R, "
        "game.py:G, game.py:S, game.py:P, game.py:Game.own\n"
    ) in said
    (warning,) = (line for line in said.splitlines() if line.startswith("warning: "))
    names = "beside.py:STATE, beside.py:EARNED, game.py:COUNT, game.py:LOG, game.py:DONE, "
    assert warning.startswith(f"warning: an episode changes {names}game.py:Game.played. ")
    with pytest.raises(Shown):
        grpo.main(line_of(folder, tmp_path / "late", "Late", "--dry-run", "--reward", "length"))
    said = capsys.readouterr().out
    assert "warning: " not in said and "each episode seeds" not in said


@pytest.mark.slow
def test_completions_of_a_prompt_play_one_game_and_those_of_others_another(folder, tmp_path):
    (folder / "drawn.py").write_text(DRAWN)
    grpo.main(line_of(folder, tmp_path, "Drawn", "--steps", 1))
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    rewards = {}
    for sample in map(json.loads, samples):
        rewards.setdefault(sample["prompt"], set()).add(sample["reward"])
    assert len(samples) == 6 and [len(drawn) for drawn in rewards.values()] == [1, 1, 1]
    assert len(set.union(*rewards.values())) == 3
