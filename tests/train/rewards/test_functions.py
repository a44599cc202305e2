"""A user's functions: called as TRL's trainer does, their files, classes and processes."""

import logging
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.support import over
from train.console.errors import UserError
from train.rewards.find import find_rewards
from train.rewards.reward import RewardBatch

N, GROUP = 6, 3
PROMPTS, TEXTS = [f"prompt {i // GROUP}" for i in range(N)], ["a" * (1 + i) for i in range(N)]
IDS, COLUMNS = [[7] * (1 + i % 5) for i in range(N)], {"level": [*range(N)]}
STATE = {"global_step": 3, "max_steps": 7, "epoch": 0.5, "num_train_epochs": 2}


def write(code: str, name: str = "mine.py") -> Path:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(code))
    return path


def score(*specs: str):
    with closing(find_rewards(specs, columns=[*COLUMNS], max_tokens=10, workers=2)) as rewards:
        return rewards(RewardBatch(PROMPTS, TEXTS, IDS, COLUMNS, GROUP, STATE))


def test_each_completion_has_its_fact():
    """Facts of another number would stand beside completions that they do not describe.

    A reward that grows with training reads the step, and a log of its own has the mean of all.
    """
    write(
        """
        def whole(completions, trainer_state, log_metric, log_extra, **_):
            log_extra("size", [len(c) for c in completions])
            log_metric("longest", max(len(c) for c in completions))
            return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

        def short(completions, log_extra, **_):
            log_extra("size", [len(c) for c in completions][1:])
            return [1.0] * len(completions)
        """
    )
    scored = score("mine.py:whole", "mine.py:short")
    assert scored.extra == {"whole/size": [len(text) for text in TEXTS]}
    np.testing.assert_allclose(scored.by_name["whole"], [3 / 7] * N, rtol=1e-6)
    assert scored.metrics == {"whole/longest": (3 + 6) / 2}, "of two groups of three"
    assert scored.failures, "whose facts are too few"
    assert f"log_extra('size') got {GROUP - 1} values for {GROUP} completions" in str(scored.said)


@pytest.mark.parity
def test_state_metrics_and_facts_are_as_trl_gives_and_takes_them():
    torch = pytest.importorskip("torch")
    from collections import defaultdict
    from types import SimpleNamespace

    from transformers import TrainerState
    from trl.trainer import grpo_trainer

    write(
        """
        def by_name(completions, level, trainer_state, log_metric, log_extra, **_):
            log_metric("mean_level", sum(level) / len(level))
            log_extra("size", [len(c) for c in completions])
            share = trainer_state.global_step / trainer_state.max_steps
            return [share * l + trainer_state.epoch for l in level]

        async def by_any_name(completions, **given):
            given["log_metric"]("steps", given["trainer_state"].global_step)
            return [len(c) * given["trainer_state"].num_train_epochs for c in completions]
        """
    )
    sys.path.insert(0, str(Path.cwd()))
    try:
        import mine
    finally:
        sys.path.pop(0)
        sys.modules.pop("mine", None)
    metrics, extra = defaultdict(list), defaultdict(list)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", num_processes=1, is_main_process=True),
        state=TrainerState(**STATE),
        args=SimpleNamespace(report_to=[]),
        _pending_metrics=metrics,
        _pending_extra_logs=extra,
        environments=None,
        reward_funcs=[mine.by_name],
        reward_processing_classes=[None],
        reward_func_names=["by_name"],
    )
    of_trl = grpo_trainer.GRPOTrainer
    trainer._log_metric = lambda *args: of_trl._log_metric(trainer, *args)
    trainer._log_completion_extra = lambda *args: of_trl._log_completion_extra(trainer, *args)
    rows = [{"prompt": PROMPTS[i], "level": i} for i in range(N)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_trainer, "gather", lambda values: values)
        patch.setattr(grpo_trainer, "logger", logging.getLogger("of TRL"))
        theirs = of_trl._calculate_rewards(trainer, rows, PROMPTS, TEXTS, IDS)
    scored = score("mine.py:by_name", "mine.py:by_any_name")
    assert not scored.failures, scored.said
    np.testing.assert_allclose(scored.by_name["by_name"], theirs[:, 0].numpy(), rtol=1e-6)
    assert isinstance(theirs, torch.Tensor)
    np.testing.assert_array_equal(scored.by_name["by_any_name"], [2 * len(t) for t in TEXTS])
    assert scored.metrics == {
        "by_name/mean_level": np.mean(metrics["mean_level"]),
        "by_any_name/steps": STATE["global_step"],
    }
    assert scored.extra == {"by_name/size": extra["size"]}


POOLS = {
    "fork": "multiprocessing.get_context('fork').Pool(2)",
    "spawn": "multiprocessing.get_context('spawn').Pool(2)",
    "forkserver": "multiprocessing.get_context('forkserver').Pool(2)",
    "executor": "ProcessPoolExecutor(2, multiprocessing.get_context('spawn'))",
}


@over("how", POOLS, often=["spawn", "forkserver"])
def test_functions_run_in_a_pool_of_processes(how):
    write("def plus(x):\n    return x + 0.5", "of user/beside.py")
    path = write(
        f"""
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        from .beside import plus

        class Judge:
            def __init__(self, by):
                self.by = by

        def one(of):
            judge, text = of
            return plus(judge.by * len(text))

        def pooled(completions, **_):
            with {POOLS[how]} as pool:
                return list(pool.map(one, [(Judge(2), text) for text in completions]))
        """,
        "of user/json.py",  # as a file of the standard library
    )
    if how != "fork":  # processes that begin anew look for `json` where the user's file is
        path = path.rename(path.with_name("pooled.py"))
    scored = score(f"{path}:pooled")
    assert not scored.failures, scored.said
    np.testing.assert_array_equal(scored.total, [2 * len(text) + 0.5 for text in TEXTS])


def test_classes_are_made_and_files_beside_are_imported_relatively():
    write("from .further import VALUE", "sub/neighbour.py")
    write("VALUE = 4", "sub/further.py")
    write(
        """
        from . import further
        from .neighbour import VALUE

        class Judge:
            def __init__(self, factor=VALUE):
                self.calls, self.factor = 0, factor + further.VALUE

            def __call__(self, level, **_):
                self.calls += 1
                return [self.factor * l for l in level]

        class Async(Judge):
            async def __call__(self, level):
                return super().__call__(level)
        """,
        "sub/mine.py",
    )
    scored = score("sub/mine.py:Judge", "sub/mine.py:Async")
    assert not scored.failures, scored.said
    np.testing.assert_array_equal(scored.by_name["Judge"], 8 * np.arange(N))
    np.testing.assert_array_equal(scored.by_name["Async"], 8 * np.arange(N))


def test_methods_of_objects_and_of_classes_are_rewards():
    write(
        """
        class Judge:
            factor = 3

            def __init__(self, factor):
                self.factor = factor

            def bound(self, level):
                return [self.factor * l for l in level]

            @staticmethod
            def static(level):
                return [5 * l for l in level]

            @classmethod
            def of_class(cls, level):
                return [cls.factor * l for l in level]

        class Judges:
            second = Judge(7)

        judge = Judge(2)
        """
    )
    factors = {
        "judge.bound": 2,
        "Judge.static": 5,
        "judge.static": 5,
        "Judge.of_class": 3,
        "Judges.second.bound": 7,
    }
    scored = score(*[f"mine.py:{name}" for name in factors])
    assert not scored.failures, scored.said
    for name, factor in factors.items():
        np.testing.assert_array_equal(scored.by_name[name], factor * np.arange(N))


NO_LISTS = {
    "{'right': 1.0, 'short': 0.5, 'why': 3}": "a dict with the keys 'right', 'short', 'why'",
    "{0: 1.0, 1: 2.0, 2: 3.0}": "a dict with the keys 0, 1, 2",
    "0.5": "It returned 0.5",
    "'abc'": "It returned 'abc'",
    "{1, 2, 3}": "It returned {1, 2, 3}",
    "None": "It returned None",
}


def test_what_is_no_list_of_numbers_is_refused_in_words():
    write("\n".join(f"def f{i}(level): return {x}" for i, x in enumerate(NO_LISTS)))
    scored = score(*[f"mine.py:f{i}" for i in range(len(NO_LISTS))])
    assert np.isnan(scored.total).all() and scored.failed.all()
    for i, says in enumerate(NO_LISTS.values()):
        assert scored.failures[f"f{i}"] == {"not a list": N}
        (said,) = [line for line in scored.said if line.startswith(f"f{i}:")]
        assert says in said and "Return a list with a number or None for each completion" in said


MISTAKES = {
    "mine.py:Needy": "Needy is a class whose objects need model, size. Create an object",
    "mine.py:Dumb": "Dumb is a class whose objects cannot be called. Give it a method __call__",
    "mine.py:Needy.score": "Needy.score is a method of the objects of Needy. Create",
    "mine.py:Needy.gone": "has no function 'Needy.gone'",
    "mine.py:Gone.score": "has no function 'Gone.score'",
    "package/mine.py:f": "Write `from common import scale`, and set PYTHONPATH=",
    "package/bare.py:f": "Write `import common`, and set PYTHONPATH=",
}


@pytest.mark.parametrize("spec", MISTAKES)
def test_what_cannot_be_made_or_imported_says_what_can(spec):
    write(
        """
        class Needy:
            def __init__(self, model, size, *rest, late=3): ...
            def __call__(self, level): return level
            def score(self, level): return level

        class Dumb: ...
        """
    )
    write("scale = 3", "common.py")
    write("from ..common import scale\ndef f(level): return level", "package/mine.py")
    write("from .. import common\ndef f(level): return level", "package/bare.py")
    with pytest.raises(UserError) as raised:
        score(spec)
    assert MISTAKES[spec] in str(raised.value)
    assert "PYTHONPATH" not in MISTAKES[spec] or f"PYTHONPATH={Path.cwd()}" in str(raised.value)
