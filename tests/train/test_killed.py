"""`train.grpo` is killed at three moments, and goes on: to the bits of a run without a break.

With THOROUGH=1, it is killed at all moments of `MOMENTS`.
"""

import re
import signal
from pathlib import Path

import pytest

import lora_jax as lj
from lora_jax import models
from tests.support import THOROUGH, assert_identical
from tests.train.forks import Forked
from tests.train.tiny import CONFIG, write_jsonl, write_model
from train.adapters.source import find_adapter
from train.reporters.files import read_lines
from train.run.log import read_metrics

PROGRAM = Path(__file__).with_name("killed.py")
STEPS, SAVE = 7, 3
ENDS = (*range(100, 124), CONFIG["eos_token_id"])  # so many that completions end in time
REWARD = """
import time

def early(completion_ids, **others):
    time.sleep(0.1)
    return [sum(id < 90 for id in ids) / len(ids) for ids in completion_ids]
"""
# Of one run, in this order: each goes on from where the one before it was killed. Every two steps
# share a batch of completions, so that the checkpoint of step 3 stands in the middle of one.
CHECKPOINTS = "lora_jax.training.run.checkpoints:Checkpoints"
MOMENTS = {
    "the first completions are drawn": ("train.live.rollouts:sample", 1, "after"),
    "completions are rewarded": ("train.processes.pool:ProgramPool.ask", 2, "in"),
    "a batch has one update of two": ("train.live.rollouts:Rollouts.batch", 2, "before"),
    "a checkpoint is written": (f"{CHECKPOINTS}.save", 1, "in"),
    "a checkpoint has no record": (f"{CHECKPOINTS}._record_files", 1, "before"),
    "a checkpoint has its record": (f"{CHECKPOINTS}._record_files", 1, "after"),
    "completions are drawn after a checkpoint": ("train.live.rollouts:sample", 1, "after"),
    "completions are written down": ("train.reporters.contract:Sample._asdict", 17, "before"),
    "a step is in the log": ("train.run.log:RunLog.add", 2, "after"),
    "older checkpoints are to go": (f"{CHECKPOINTS}._remove_all_but", 2, "before"),
    "the last checkpoint is written": (f"{CHECKPOINTS}.save", 1, "in"),
    "the adapter is to be saved": ("train.stages.steps:keep_adapter", 1, "before"),
    "the adapter is saved": ("train.stages.steps:keep_adapter", 1, "after"),
}
SAMPLED = ("a checkpoint has no record", "a checkpoint has its record", "a step is in the log")


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_bit_by_bit(tmp_path):
    model = write_model(tmp_path / "model", scale=0.5, eos_token_id=ENDS)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a" * (1 + i)} for i in range(6)])
    (tmp_path / "reward.py").write_text(REWARD)
    line = ["--model", model, "--dataset", rows, "--reward", f"{tmp_path / 'reward.py'}:early"]
    line += ["--group", 4, "--batch-size", 24, "--max-new-tokens", 8, "--seq-len", 64]
    line += ["--updates", 2, "--beta", 0.1, "--lr", 3e-2, "--schedule", "constant", "--warmup", 1]
    line += ["--steps", STEPS, "--save-every", SAVE, "--eval-questions", 0, "--report-to", "none"]
    line += ["--compilation-cache", tmp_path / "programs", "--targets", "q_proj", "v_proj"]
    environment = {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def ended(words, name, *args):
        words = [*words, *line, "--output", tmp_path / name, *args]
        process = Forked(words, tmp_path, environment)
        said = "".join(process.communicate())
        return process.returncode, said

    grpo = ["-m", "train.grpo"]
    code, said = ended(grpo, "whole")
    assert code == 0, said
    begun = []
    moments = MOMENTS if THOROUGH else SAMPLED
    for where, nth, when in (MOMENTS[moment] for moment in moments):
        killing = [PROGRAM, where, nth, when, "train.grpo"]
        code, said = ended(killing, "killed", *(["--resume"] if begun else []))
        assert code == -signal.SIGKILL, said
        found = re.search(r"training continues after step (\d+)", said)
        begun.append(int(found[1]) if found else 0)
    code, said = ended(grpo, "killed", "--resume")
    last = STEPS if THOROUGH else SAVE
    assert code == 0 and f"training continues after step {last}" in said, said
    print(dict(zip(moments, begun, strict=True)))
    assert begun == sorted(begun)
    assert {*begun} == ({0, SAVE, 2 * SAVE, STEPS} if THOROUGH else {0, SAVE})

    base, params = models.from_pretrained(model)
    assert_identical(
        *(
            lj.split(find_adapter(str(tmp_path / name)).load(base, params, "the base"))[0]
            for name in ("whole", "killed")
        )
    )
    timed = {"time", "tokens_per_s"}
    for read in (read_metrics, lambda folder: read_lines(folder / "samples.jsonl")):
        whole, killed = (
            [{k: v for k, v in one.items() if k not in timed} for one in read(tmp_path / name)]
            for name in ("whole", "killed")
        )
        assert whole == killed and whole
