"""Times the steps of a run whose folder is in a bucket of 2 s an object, and of one on a disk.

    python -m tests.benchmarks.buckets

Needs the extra buckets-test. Both runs take turns; the steps between the first and the last line of
metrics are counted, checkpoints and all, but for the last one, which every run waits for.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.buckets.store_proxy import bucket_store
from tests.train.tiny import write_model, write_rows

_SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6}
_LOG = 10  # steps between lines of metrics


def seconds_a_step(text: str) -> float:
    """Returns the mean of a run, from its metrics."""
    lines = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
    return (lines[-1]["time"] - lines[0]["time"]) / (lines[-1]["step"] - lines[0]["step"])


def main() -> None:
    """Prints the seconds of each run, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--latency", type=float, default=2.0, help="seconds an object")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, bucket_store() as (proxy, variables):
        folder = Path(name)
        model = write_model(folder / "model", head_dim=32, num_key_value_heads=2, **_SIZES)
        rows = write_rows(folder / "rows.jsonl", 200)
        line = ["--model", model, "--dataset", rows, "--batch-size", 8, "--seq-len", 128]
        line += ["--steps", asked.steps, "--save-every", asked.save_every, "--log-every", _LOG]
        line += ["--report-to", "none"]

        def took(output: str) -> float:
            words = [sys.executable, "-m", "train.sft", *line, "--output", output]
            subprocess.run(
                [*map(str, words)],
                env=os.environ | variables,
                check=True,
                stdout=subprocess.DEVNULL,
            )
            proxy.latency = 0.0
            if output.startswith("gs://"):
                name = f"{output[12:]}/metrics.jsonl"
                return seconds_a_step(proxy.objects(name)[name].decode())
            return seconds_a_step((Path(output) / "metrics.jsonl").read_text())

        ratios = []
        for turn in range(asked.rounds):
            disk = took(str(folder / f"run-{turn}"))
            proxy.latency = asked.latency
            before = len(proxy.requests)
            bucket = took(f"gs://bucket/run-{turn}")
            ratios.append(bucket / disk)
            print(
                f"disk {disk:.3f} s a step, bucket {bucket:.3f} s ({len(proxy.requests) - before} "
                f"requests): {ratios[-1]:.3f} x",
                flush=True,
            )
        print(f"median {statistics.median(ratios):.3f} x")


if __name__ == "__main__":
    main()
