"""Measures what a run does before its first step with many short chats, and the memory it takes.

    python tests/benchmarks/many_chats.py --rows 200000

Draws chats of a question and an answer, of realistic lengths, and reads, tokenises and packs them
as `train.sft` does: first without kept tokens, then with them. Prints wall-clock seconds, CPU
seconds, and the peak memory above that of the imports.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WORDS = (
    "the a of to and in is that for it as was with be by on not he his but at are this have from "
    "or had an they which one you were all her she there would their we him been has when who will "
    "more no if out so said what up its about into than them can only other new some could time "
    "database question answer schema column average temperature customers between highest because"
).split()


def write_chats(path: Path, n: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(n):
            asked, said = (
                " ".join(draw.choices(WORDS, k=min(200, 3 + int(draw.lognormvariate(mu, 0.6)))))
                for mu in (2.3, 2.6)
            )
            turns = [
                {"role": "user", "content": f"{number}: {asked}?"},
                {"role": "assistant", "content": f"{said}."},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def measure(rows: Path, cache: Path, packing: bool) -> None:
    """Prints the cost of each part, in this process."""
    from lora_jax.training.data.order import Order
    from train.options.scripts.sft import Config, SftDataConfig
    from train.processes.memory import peak_bytes
    from train.tasks import chats

    began = clock = time.perf_counter()
    cpu = time.process_time()
    before = peak_bytes()

    def lap(what: str) -> None:
        nonlocal clock, cpu
        now, used = time.perf_counter(), time.process_time()
        print(f"  {what:24s} {now - clock:6.1f} s  {used - cpu:6.1f} s of CPU")
        clock, cpu = now, used

    data = SftDataConfig(
        model=MODEL, dataset=(str(rows),), seq_len=512, packing=packing, token_cache=str(cache)
    )
    config = Config(data=data)
    read = chats.read_rows(config)
    lap("rows")
    outline = chats.outline(config, read)
    lap("tokenizer")
    made = chats.examples(config, read, outline)
    lap("tokens")
    Order.of(made.train, 0, 8).rows(0)
    made.train.digest()
    lap("order and fingerprint")
    peak = peak_bytes()
    print(f"  {'all':24s} {time.perf_counter() - began:6.1f} s")
    print(f"  {(peak - before) / 2**30:.2f} GiB above the {before / 2**30:.2f} GiB of the imports")
    print("  " + "\n  ".join(made.lines))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--inside", nargs=2, type=Path)
    given = parser.parse_args()
    if given.inside:
        measure(*given.inside, given.packing)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_chats(rows, given.rows)
        for turn in ("the first time", "the second time"):
            print(f"{given.rows:,} chats, {turn}:", flush=True)
            command = [sys.executable, "-m", "tests.benchmarks.many_chats", "--inside"]
            command += [str(rows), folder, *(["--packing"] if given.packing else [])]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
