"""Times the steps of a run whose folder is in a bucket of 2 s an object, and of one on a disk.

    python -m tests.benchmarks.buckets

Needs the extra buckets-test. Both runs take turns, and every other round the bucket comes first. A
step computes little and then sleeps (--idle), as a host does beside an accelerator, so that a
machine that is not idle tells the two apart as well. The steps between the first and the last line
of metrics are counted, checkpoints and all, but for the last one, which every run waits for. What
the steps stood still for is timed beside that: the saves within these steps, each of which waits
until the one before is written.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.training.run.bucket_files import BucketFiles
from lora_jax.training.run.checkpoints import Checkpoints
from lora_jax.training.run.stop import Stop
from tests.buckets.store_proxy import StoreProxy, bucket_store
from tests.train.tiny import write_model, write_rows
from train import sft

_SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6}
_LOG = 10  # steps between lines of metrics


class Times(NamedTuple):
    """Seconds of a run."""

    step: float  # the mean
    saves: list[float]  # in which the steps stood still
    written: list[float]  # until a checkpoint was in the bucket

    def __str__(self) -> str:
        saves = ", ".join(f"{seconds:.2f}" for seconds in self.saves)
        written = ", ".join(f"{seconds:.1f}" for seconds in self.written)
        return f"{self.step:.4f} s a step, saves {saves} s" + (
            f", written in {written} s" if written else ""
        )


def seconds_a_step(text: str) -> float:
    """Returns the mean of a run, from its metrics."""
    lines = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
    return float((lines[-1]["time"] - lines[0]["time"]) / (lines[-1]["step"] - lines[0]["step"]))


def train_timed(idle: float, file: Path, words: list[str]) -> None:
    """Runs train.sft with a sleep in each step; writes what its saves took to a file."""

    def timed(act: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
        def timed_act(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return act(*args, **named)
            finally:
                spent.append(time.perf_counter() - began)

        return timed_act

    def agreed(*args: Any, act: Callable[..., Any] = Stop.agreed) -> Any:
        time.sleep(idle)
        return act(*args)

    saves: list[float] = []
    written: list[float] = []
    Stop.agreed = agreed  # type: ignore[method-assign]
    Checkpoints.save = timed(Checkpoints.save, saves)  # type: ignore[method-assign]
    BucketFiles._write = timed(BucketFiles._write, written)  # type: ignore[method-assign]
    sft.main(words)
    file.write_text(json.dumps([saves, written]))


class Bench(NamedTuple):
    """Runs train.sft with one set of options, in a bucket or on a disk."""

    folder: Path
    words: list[object]
    proxy: StoreProxy
    variables: dict[str, str]
    asked: argparse.Namespace

    def run(self, output: str) -> Times:
        """Runs once, with its folder there."""
        file = self.folder / "saves.json"
        given = ["--timed", file, "--idle", self.asked.idle, *self.words, "--output", output]
        line = [sys.executable, "-m", "tests.benchmarks.buckets", *map(str, given)]
        is_bucket = output.startswith("gs://")
        self.proxy.latency = self.asked.latency if is_bucket else 0.0
        subprocess.run(line, env=os.environ | self.variables, check=True, stdout=subprocess.DEVNULL)
        self.proxy.latency = 0.0
        saves, written = json.loads(file.read_text())
        if is_bucket:
            name = f"{output[12:]}/metrics.jsonl"
            text = self.proxy.objects(name)[name].decode()
        else:
            text = (Path(output) / "metrics.jsonl").read_text()
        return Times(seconds_a_step(text), saves[:-1], written)


def main() -> None:
    """Prints the seconds of each run, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--save-every", type=int, default=300)
    parser.add_argument("--latency", type=float, default=2.0, help="seconds an object")
    parser.add_argument("--idle", type=float, default=0.2, help="seconds of sleep a step")
    parser.add_argument("--timed", type=Path, help=argparse.SUPPRESS)
    asked, words = parser.parse_known_args()
    if asked.timed is not None:
        sizes = ["--steps", str(asked.steps), "--save-every", str(asked.save_every)]
        return train_timed(asked.idle, asked.timed, [*sizes, *words])
    with tempfile.TemporaryDirectory() as name, bucket_store() as (proxy, variables):
        folder = Path(name)
        model = write_model(folder / "model", head_dim=32, num_key_value_heads=2, **_SIZES)
        rows = write_rows(folder / "rows.jsonl", 200)
        line = ["--model", model, "--dataset", rows, "--batch-size", 2, "--seq-len", 64]
        line += ["--steps", asked.steps, "--save-every", asked.save_every, "--log-every", _LOG]
        bench = Bench(folder, [*line, "--report-to", "none"], proxy, variables, asked)
        ratios = []
        for turn in range(asked.rounds):
            places = [str(folder / f"run-{turn}"), f"gs://bucket/run-{turn}"]
            times = {}
            for place in places if turn % 2 == 0 else reversed(places):
                before = len(proxy.requests)
                times[place] = bench.run(place)
                requests = len(proxy.requests) - before
                print(f"{place}: {times[place]} ({requests} requests)", flush=True)
            disk, bucket = (times[place].step for place in places)
            ratios.append(bucket / disk)
            print(f"round {turn + 1}: {ratios[-1]:.3f} x", flush=True)
        print(f"median {statistics.median(ratios):.3f} x")


if __name__ == "__main__":
    main()
