"""Runs whose batches need a model: nothing compiles anew, and no second base is in memory."""

import dataclasses
import functools
import gc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax import models
from tests.adapted_trees import with_random_factors
from tests.support import but_rarely
from tests.train.tiny import write_jsonl, write_model
from train import dpo, grpo, sft
from train.live import preferences, rollouts
from train.stages import finish
from train.stages import steps as steps_module

# Orbax leaves coroutines behind, and rewards' processes end with the garbage.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.slow,
]
COMPILED = []  # the programs, by name
STEPS = 8
# The base is most of what there is.
SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "head_dim": 16}
# Short and long ones; see `runs`.
PAIRS = [
    {"prompt": f"{n}?", "chosen": "yes" * (1 + n % 2 * 12), "rejected": "no" * (1 + n % 3)}
    for n in range(24)
]
PROMPTS = [{"prompt": "?" * (1 + n % 5)} for n in range(9)]
# Of two completions, both are often worth the same, and drawn again.
REWARD = "def last(completion_ids, **_):\n    return [float(ids[-1] % 2) for ids in completion_ids]"


def note_compiled(event, seconds, **facts):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(facts.get("fun_name"))


jax.monitoring.register_event_duration_secs_listener(note_compiled)


class Begun(NamedTuple):
    """The state as a step begins: programs so far, bytes in memory, the shape of its rows."""

    compiled: int
    bytes: int
    shape: tuple[int, ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model", scale=0.4, **SIZES)
    _, params = models.from_pretrained(folder / "model")
    rules = [lj.LoraRule(targets=["q_proj"], rank=2, alpha=6)]
    lj.save_adapter(folder / "used", with_random_factors(lj.lorafy(params, rules)))
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    write_jsonl(folder / "prompts.jsonl", PROMPTS)
    (folder / "reward.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def base_bytes(folder):
    return sum(x.nbytes for x in jax.tree.leaves(models.from_pretrained(folder / "model")[1]))


def live_bytes():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted())


def steps_of(script, *args, steps=STEPS):
    """Returns the state as each step of a run begins."""
    before, begun, real = live_bytes(), [], steps_module.make_hooks

    def noting(*args, **options):
        hooks = real(*args, **options)

        def batch(number, state):
            n, in_memory = len(COMPILED), live_bytes() - before
            made = hooks.batch(number, state)
            begun.append(Begun(n, in_memory, made["ids"].shape))
            return made

        return dataclasses.replace(hooks, batch=batch)

    line = ["--lr", 1e-2, "--warmup", 1, "--report-to", "none", "--steps", steps]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps_module, "make_hooks", noting)
        script.main([str(arg) for arg in [*line, *args]])
    return begun


def compiled_anew(begun):
    """(programs compiled in steps of a shape that an earlier one had, but the first; the shapes)"""
    seen, found = {begun[0].shape}, []
    for one, after in zip(begun[1:], begun[2:], strict=False):
        if one.shape in seen:
            found += COMPILED[one.compiled : after.compiled]
        seen.add(one.shape)
    return found, seen


LORA = ["--targets", "q_proj", "--rank", 2]
LIVE = ["--reference-logps", "live"]


def of_pairs(folder, output, *args):
    line = ["--model", folder / "model", "--dataset", folder / "pairs.jsonl", "--output", output]
    return [*line, "--batch-size", 4, "--token-cache", "off", *args]


def of_prompts(folder, output, *args):
    line = ["--model", folder / "model", "--dataset", folder / "prompts.jsonl", "--output", output]
    line += ["--reward", f"{folder / 'reward.py'}:last", "--max-new-tokens", 6, "--seq-len", 64]
    return [*line, "--group", 2, "--batch-size", 4, "--eval-questions", 0, *args]


RUNS = {
    "pairs": (dpo, of_pairs, LORA),
    "pairs, live": (dpo, of_pairs, [*LORA, *LIVE, "--reference", "used"]),
    "completions": (
        grpo,
        of_prompts,
        [*LORA, "--updates", 2, "--redraw", 2, "--grad-accum", 2, "--beta", 0.1],
    ),
    "completions, in full": (grpo, of_prompts, ["--full"]),
}


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """(what there is as each step begins, the draws: of which attempt, for how many prompts)"""
    output = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(way):
        script, line, args = RUNS[way]
        args = [folder / "used" if arg == "used" else arg for arg in args]
        draws, real = [], rollouts.Rollouts.draw

        def noted(self, params, rows, number, attempt=0):
            draws.append((attempt, len(rows)))
            return real(self, params, rows, number, attempt)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rollouts.Rollouts, "draw", noted)
            patch.setattr("lora_jax.training.data.sequences._ROWS_A_LENGTH", 8)  # two lengths
            return steps_of(script, *line(folder, output / way, *args)), draws

    return run


@pytest.mark.parametrize("way", but_rarely(RUNS, "pairs", "completions, in full"))
def test_nothing_compiles_anew(runs, way):
    begun, draws = runs(way)
    found, shapes = compiled_anew(begun)
    assert found == [] and len(begun) == STEPS
    assert len(shapes) == (2 if "pairs" in way else 1)
    if way == "completions":
        assert len({n for attempt, n in draws if attempt}) > 1, "few groups again, or many"


def test_programs_made_for_each_step_are_noticed(folder, tmp_path, monkeypatch):
    """The control."""
    real = rollouts.sample

    def anew(model, *args, **how):
        return real(model, *args, **how | {"apply": lj.adapt(model.apply)})

    monkeypatch.setattr(rollouts, "sample", anew)
    begun = steps_of(grpo, *of_prompts(folder, tmp_path / "run", *LORA), steps=4)
    assert len(compiled_anew(begun)[0]) >= 4 - 2


@pytest.mark.parametrize("way", but_rarely(RUNS, "pairs", "completions, in full"))
def test_no_second_base_is_in_memory(runs, base_bytes, way):
    """In full, there are the weights and two moments."""
    begun, _ = runs(way)
    bases, most = (3 if "full" in way else 1), max(one.bytes for one in begun)
    assert bases * base_bytes < most < (bases + 0.25) * base_bytes, most / base_bytes


def test_a_copy_of_the_base_is_noticed(folder, base_bytes, tmp_path, monkeypatch):
    """The control."""
    real = preferences.reference_params
    monkeypatch.setattr(
        preferences, "reference_params", lambda *args: jax.tree.map(jnp.copy, real(*args))
    )
    begun = steps_of(dpo, *of_pairs(folder, tmp_path / "run", *LORA, *LIVE), steps=2)
    assert min(one.bytes for one in begun) > 1.9 * base_bytes


@pytest.mark.parametrize(("way", "n_steps", "at_report"), [("full", 3, 2), ("table", 1, 1)])
def test_no_stage_keeps_what_the_next_one_has(
    folder, base_bytes, tmp_path, monkeypatch, way, n_steps, at_report
):
    """In full, steps have weights and two moments; a report has weights before and after."""
    written, write = [], finish.write_json
    before = live_bytes()

    def note(path, content):
        written.append(live_bytes() - before)
        write(path, content)

    monkeypatch.setattr(finish, "write_json", note)
    rows = write_jsonl(folder / "rows.jsonl", [{"prompt": "?", "completion": "yes"}] * 24)
    (tmp_path / "runs.csv").write_text("name,rank\none,2\ntwo,2\n")
    more = ["--full"] if way == "full" else ["--targets", "q_proj", "--many", tmp_path / "runs.csv"]
    line = ["--model", folder / "model", "--dataset", rows, "--output", tmp_path / "run"]
    begun = steps_of(sft, *line, "--batch-size", 4, *more, steps=3)
    assert n_steps * base_bytes < max(step.bytes for step in begun) < (n_steps + 0.25) * base_bytes
    assert written and max(written) < (at_report + 0.25) * base_bytes
