"""The cookbook of Tinker's clients, unmodified, against a server in a process of its own.

The model was taught the format, and to answer right half of the time. Data lie in folders that are
named as on the hub, which clients prefer to it.
"""

import json
import os
import random
import subprocess
import sys

import pytest
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from tests.support import THOROUGH, thorough
from tests.train.serve.process import serve
from tests.train.serve.waiting import until
from train import sft
from train.export import __main__ as export
from train.findings.making import mixture
from train.tasks.sums import write_untrained

pytest.importorskip("tinker_cookbook", reason="the extra 'serve-test' has the cookbook")
pytestmark = pytest.mark.serving

NAME = "Qwen/Qwen3-8B-Base"
SUFFIX = " Provide a numerical answer without units, written inside \\boxed{}."
SHOT = (
    f"User: How many r's are in strawberry?{SUFFIX}\n\nAssistant: Let's spell the word out and "
    "number all the letters: 1) s 2) t 3) r 4) a 5) w 6) b 7) e 8) r 9) r 10) y. We have r's at "
    "positions 3, 8, and 9. \\boxed{3}\n\n"
)
WORDS = "cat dog sun sea red blue".split()
DEFAULT = "Qwen/Qwen3.5-9B-Base"  # the model of recipes that are given none
CONFIG = {name: value for name, value in mixture.CONFIG.items() if "expert" not in name} | {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
}
DEFAULT_CONFIG = CONFIG | {
    "model_type": "qwen3_5_text",
    "full_attention_interval": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 16,
}


def taught_rows(draw, n):
    """Answers in the formats of rl_loop, most of them right, and of math_rl, half broken."""
    for _ in range(n // 2):
        a, b = draw.randint(1, 2), draw.randint(1, 2)
        said = a + b if draw.random() < 0.5 else draw.randint(2, 8)
        question, answer = f"{SHOT}User: {a}+{b}{SUFFIX}", f" \\boxed{{{said}}}\n\nUser:"
        yield {"prompt": f"{question}\n\nAssistant:", "completion": answer}
        a, b = draw.randint(0, 99), draw.randint(0, 99)
        question = f"User: What is 4 + 5?\n\nAssistant: 9\n\nUser: What is {a} + {b}?"
        answer = f" {a + b}" + draw.choice(["\n\nUser:", " and so on and so on and so on"])
        yield {"prompt": f"{question}\n\nAssistant:", "completion": answer}


def word_tokenizer(texts):
    """A tokenizer without tokens across line breaks: texts and their parts have the same."""
    core = Tokenizer(tokenizer_models.BPE())
    lines, bytes_ = pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([lines, digits, bytes_])
    core.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in ("<|pad|>", "<|end|>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, **how))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with the model and the data of the recipes."""
    folder, draw = tmp_path_factory.mktemp("work"), random.Random(0)
    rows = [*taught_rows(draw, 4000)]
    write_jsonl(folder / "rows.jsonl", rows)
    tokenizer = word_tokenizer(row["prompt"] + row["completion"] for row in rows[:500])
    write_untrained(CONFIG | {"vocab_size": len(tokenizer)}, tokenizer, folder / "untrained")
    line = "--full --packing --seq-len 192 --batch-size 12 --steps 200 --lr 5e-3 --warmup 20"
    files = f"--model {folder}/untrained --dataset {folder}/rows.jsonl --output {folder}/taught"
    sft.main([*line.split(), *files.split(), "--report-to", "none"])
    export.main(["--adapter", f"{folder}/taught", "--merged", "--output", f"{folder}/{NAME}"])
    write_data(folder, draw)
    return folder


def write_data(folder, draw):
    """Writes the recipes' data, in folders that are named as on the hub."""
    for split, n in (("train", 200), ("test", 8)):
        said = [draw.sample(WORDS, 2) for _ in range(n)]
        turns = [
            [{"role": "user", "content": f"Say {a}"}, {"role": "assistant", "content": a * 2}]
            for a, _ in said
        ]
        write_jsonl(
            folder / f"HuggingFaceH4/no_robots/{split}.jsonl", [{"messages": t} for t in turns]
        )
        asked = [f"\n\nHuman: Say {a}\n\nAssistant: " for a, _ in said]
        pairs = [
            {"chosen": q + a, "rejected": q + b} for q, (a, b) in zip(asked, said, strict=True)
        ]
        write_jsonl(folder / f"Anthropic/hh-rlhf/{split}.jsonl", pairs)
        sums = [draw.choice([(1, 2), (2, 1)]) for _ in range(n)]  # one answer is right for all
        asked = [{"question": f"{a}+{b}", "answer": f"So #### {a + b}"} for a, b in sums]
        write_jsonl(folder / f"openai/gsm8k/main/{split}.jsonl", asked)
    files = "".join(f"  - split: {s}\n    path: main/{s}.jsonl\n" for s in ("train", "test"))
    head = f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n"
    (folder / "openai/gsm8k/README.md").write_text(head)


@pytest.fixture(scope="module")
def server(work):
    server = serve(work, NAME, "--max-length 256 --sequences 16 --slots 3 --tenants 2")
    try:
        server.ready()
        yield server
        server.end()
    finally:
        server.kill()


def started(server, recipe, run, **options):
    """Starts a recipe; its log goes beside its run."""
    work = server.folder
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "hf")}
    client = {"TINKER_API_KEY": "tml-dummy", "TINKER_TELEMETRY": "0"}
    given = {"base_url": f"http://127.0.0.1:{server.port}", "model_name": NAME} | options
    line = [f"{name}={value}" for name, value in given.items() if value is not None]
    command = [
        sys.executable,
        "-m",
        f"tinker_cookbook.recipes.{recipe}",
        *line,
        f"log_path={work}/{run}",
    ]
    with (work / f"{run}.log").open("a") as log:
        env = {**os.environ, **offline, **client}
        return subprocess.Popen(command, cwd=work, env=env, stdout=log, stderr=log)


def ended(server, process, run):
    """Waits for a recipe; returns its metrics, a dictionary a step."""
    code = process.wait(300)
    assert code == 0, (server.folder / f"{run}.log").read_text()[-3000:]
    lines = (server.folder / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def final(server, run):
    """The arrays of a run's last state."""
    last = (server.folder / run / "checkpoints.jsonl").read_text().splitlines()[-1]
    return arrays(server, json.loads(last)["state_path"])


def arrays(server, path):
    """The arrays of a state: its adapter and the optimiser's."""
    model, kind, name = path.removeprefix("tinker://").split("/")
    where = server.folder / "served/checkpoints" / model.replace(":", "-") / kind
    (folder,) = where.glob(f"{name}@*")
    return {file.name: load_file(file) for file in folder.glob("*.safetensors")}


def same(one, other):
    assert one.keys() == other.keys() and len(one) == 2
    for file, arrays in one.items():
        assert all((arrays[name] == other[file][name]).all() for name in arrays)


SL = {"batch_size": 8, "lora_rank": 8, "max_length": 128, "learning_rate": 3e-3, "save_every": 2}
DPO = {
    "dataset": "hhh",
    "renderer_name": "role_colon",
    "batch_size": 8,
    "max_length": 128,
    "learning_rate": 3e-3,
}


RECIPES = {
    "sl": ("sl_loop", SL | {"max_steps": 8}),
    "dpo": ("preference.dpo.train", DPO | {"max_steps": 12}),
}


@pytest.fixture(scope="module")
def whole(server):
    """Returns the metrics of a recipe that nothing disturbs; each runs once."""
    found = {}

    def of(name):
        if name not in found:
            recipe, how = RECIPES[name]
            found[name] = ended(server, started(server, recipe, name, **how), name)
        return found[name]

    return of


@thorough
def test_loops_run_by_their_default_model(tmp_path):
    """A tiny Qwen3.5 of random weights: none of its answers is right."""
    draw = random.Random(0)
    rows = [*taught_rows(draw, 500)]
    tokenizer = word_tokenizer(row["prompt"] + row["completion"] for row in rows)
    fields = DEFAULT_CONFIG | {"vocab_size": len(tokenizer)}
    write_untrained(fields, tokenizer, tmp_path / DEFAULT)
    write_data(tmp_path, draw)
    server = serve(tmp_path, DEFAULT, "--max-length 256 --sequences 16 --slots 3 --tenants 2")
    try:
        server.ready()
        how = SL | {"max_steps": 4, "model_name": None}
        lines = ended(server, started(server, "sl_loop", "sl", **how), "sl")
        losses = [line["train_mean_nll"] for line in lines if "train_mean_nll" in line]
        assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]
        how = COMMON | {"batch_size": 4, "max_steps": 2, "model_name": None}
        lines = ended(server, started(server, "rl_loop", "rl", **how), "rl")
        assert sum("reward/total" in line for line in lines) == 2
        server.end()
    finally:
        server.kill()


@thorough
def test_sl_loop_learns(whole):
    losses = [line["train_mean_nll"] for line in whole("sl") if "train_mean_nll" in line]
    assert len(losses) == 8 and losses[-1] < 0.6 * losses[0]


@thorough
def test_sl_loop_goes_on_where_it_was_stopped(server, whole):
    whole("sl")
    ended(server, started(server, "sl_loop", "stopped", **SL, max_steps=4), "stopped")
    lines = (server.folder / "stopped/checkpoints.jsonl").read_text().splitlines()
    kept = [line for line in lines if '"final"' not in line]
    (server.folder / "stopped/checkpoints.jsonl").write_text("\n".join(kept) + "\n")
    ended(server, started(server, "sl_loop", "stopped", **SL, max_steps=8), "stopped")
    same(final(server, "stopped"), final(server, "sl"))


def test_a_killed_server_takes_no_step_twice(server, whole):
    """By the recipe that asks for most: samples of a reference, gradients, updates."""
    whole("dpo")
    (recipe, how), run = RECIPES["dpo"], "killed"
    process = started(server, recipe, run, **how)
    metrics = server.folder / run / "metrics.jsonl"

    def taken():
        assert process.poll() is None, (server.folder / f"{run}.log").read_text()[-3000:]
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    for steps in (2, 5) if THOROUGH else (3,):
        until(lambda n=steps: taken() >= n, f"{steps} steps are taken", 300)
        server.restart()
        server.ready()
    ended(server, process, run)
    same(final(server, run), final(server, "dpo"))


def test_dpo_learns(whole):
    losses = [line["dpo_loss"] for line in whole("dpo") if "dpo_loss" in line]
    assert abs(losses[0] - 0.6931) < 1e-3 and sum(losses[-4:]) / 4 < 0.62


COMMON = {"group_size": 8, "max_tokens": 12, "lora_rank": 8, "learning_rate": 2e-3}


def test_rl_loop_learns(server):
    """Draws have no seed, and the rate is low.

    Where all of a group drew the same token, its advantages add up to the rounding of zero, and
    Adam, whose eps the recipe sets to 1e-8, makes whole steps of that: at 2e-3, one run in ten
    forgot the format.
    """
    how = COMMON | {"learning_rate": 1e-3, "lora_rank": 32}
    run = started(server, "rl_loop", "rl", **how, batch_size=8, max_steps=16)
    rewards = [line["reward/total"] for line in ended(server, run, "rl") if "reward/total" in line]
    assert 0.1 < rewards[0] < 0.7
    # Four standard deviations of what does not learn.
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.6, rewards
    saved = (server.folder / "rl/checkpoints.jsonl").read_text().splitlines()[-1]
    session = server.post("create_session", {"tags": []})["session_id"]
    load = {"session_id": session, "model_seq_id": 0, "optimizer": True}
    load["path"] = json.loads(saved)["state_path"]
    model = server.post("load_weights", load)["model_id"]
    again = server.result(server.save(model, 1, "again"))["path"]
    same(arrays(server, again), final(server, "rl"))


@thorough
def test_math_rl_learns(server):
    """Most rewards here are of the format: few of the sums are right."""
    how = {"env": "arithmetic", "renderer_name": "role_colon", "groups_per_batch": 8}
    run = started(server, "math_rl.train", "math", **COMMON, **how, max_steps=10)
    lines = [line for line in ended(server, run, "math") if "env/all/format" in line]
    formats = [line["env/all/format"] for line in lines]
    assert 0.1 < formats[0] < 0.9
    assert sum(formats[-3:]) > sum(formats[:3]) + 0.6, formats  # four standard deviations
