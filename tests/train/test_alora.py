"""Activated LoRA by the scripts: training, its rows, generation, export, and what is refused."""

import json

import numpy as np
import pytest

from lora_jax.adapt.activate import invocations_of
from lora_jax.models.layers import trunk
from lora_jax.training.data.batches import pack
from lora_jax.training.data.sequences import Sequences, TokenSequence
from tests.train.scripts import begun, fails
from tests.train.tiny import tokenizer, write_jsonl, write_model
from train.console.errors import UserError
from train.export.__main__ import main as export
from train.generate.__main__ import main as generate
from train.run.invocation import invoked_data, last_starts
from train.run.task import Data
from train.sft import main as sft

MARK = "CHECK"
WITHOUT = (3, 7)  # numbers of rows, counted from 1


def sequences(seed=0):
    rng = np.random.default_rng(seed)
    each = [
        TokenSequence(rng.integers(1, 3, n, np.int32), rng.random(n) < 0.6, row + 1)
        for row, n in enumerate(rng.integers(1, 9, 40))
    ]
    return Sequences.from_list(each)


def active_tokens(ids, invocation):
    """The tokens from the last occurrence on, by a look at each place."""
    n, wanted = len(invocation), list(invocation)
    starts = [i for i in range(len(ids) - n + 1) if ids[i : i + n].tolist() == wanted]
    return np.arange(len(ids)) >= (starts[-1] if starts else len(ids))


@pytest.mark.parametrize("invocation", [(1,), (1, 2), (2, 1, 2)], ids=str)
def test_last_starts(invocation):
    table = sequences()
    starts = last_starts(table, invocation)
    for at, one in enumerate(table):
        active = active_tokens(one.ids, invocation)
        want = table.starts[at] + active.argmax() if active.any() else -1
        assert starts[at] == want
    assert (starts < 0).any() and (starts >= 0).any()


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_counts_what_the_adapter_predicts(packing):
    """A token counts where it did, and the token before it is active; others are named."""
    packs = pack(sequences(), 8, packing=packing)
    data = Data(train=packs, held_out=None, name=packs.name, source="", facts={})
    invoked, lines = invoked_data(data, (2, 1))
    without = []
    for before, after in zip(packs.table, invoked.train.table, strict=True):
        active = active_tokens(before.ids, (2, 1))
        want = before.counts & np.concatenate([[False], active[:-1]])
        np.testing.assert_array_equal(after.counts, want)
        without += [] if active.any() else [before.row]
    n = len(packs.table)
    assert lines[0].startswith(
        f"{n - len(without)} of {n} rows have the invocation (2,1); rows without"
    )
    assert f"row {without[0]}" in lines[0] and "do not count in the loss" in lines[1]
    with pytest.raises(UserError, match=f"None of the {n} rows contains the invocation 7"):
        invoked_data(data, (7,))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alora")
    rows = [
        {"prompt": f"{i} {'' if i + 1 in WITHOUT else MARK}?", "completion": str(i) * (1 + i % 3)}
        for i in range(12)
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    return write_model(folder / "model")


def options(model, *more):
    rows = model.parent / "rows.jsonl"
    return ["--model", model, "--dataset", rows, "--rank", "2", "--steps", "2", *more]


def test_rows_are_named_before_the_run(model, tmp_path, capsys):
    ids = ",".join(map(str, tokenizer()(MARK)["input_ids"]))
    for given in (MARK, ids):
        tree = begun(sft, *options(model, "--alora", given, "--output", tmp_path / "run"))
        said = " ".join(capsys.readouterr().out.split())
        assert f"10 of 12 rows have the invocation ({ids}); rows without it" in said
        assert ": row 3, row 7" in said
        assert invocations_of(tree) == {tuple(map(int, ids.split(",")))}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--alora", "nowhere"], "None of the 12 rows contains the invocation"),
        (["--alora", "9999"], "contains the token id 9999"),
        (["--alora", MARK, "--dora"], "Remove dora"),
        (["--alora", MARK, "--train", "norm"], "Remove --train"),
        (["--alora", MARK, "--targets", "embed_tokens"], "is looked up by token"),
        (["--alora", MARK, "--full"], "--full trains every parameter"),
        (["--alora", MARK, "--stream", "--truncate"], "Use train.sft without --stream"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_options_that_do_not_go_with_it(model, tmp_path, capsys, more, message):
    said = fails(capsys, sft, *options(model, *more, "--output", tmp_path / "run"))
    assert message in " ".join(said.split())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_from_training_to_peft(model, tmp_path, capsys, monkeypatch):
    """A run's adapter answers alike here and in PEFT, and like the base where nothing invokes it.

    All rows are long ones, whose MLPs a model that recomputes its layers would take by chunks.
    """
    import torch
    from peft import AutoPeftModelForCausalLM

    monkeypatch.setattr(trunk, "CHUNK", 2)
    run, out = tmp_path / "run", tmp_path / "out"
    args = options(model, "--alora", MARK, "--lr", "0.05", "--packing", "--remat", "full")
    args += ["--output", run, "--eval-every", "2", "--eval-questions", "1"]
    sft([str(arg) for arg in args])
    capsys.readouterr()
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"{i} {MARK}?"} for i in range(3)])
    with prompts.open("a") as file:
        file.write(json.dumps({"prompt": "9 ?"}) + "\n")
    asked = ["--prompts", prompts, "--max-new-tokens", "12", "--model", model]

    def answers(*adapter):
        generate([str(arg) for arg in [*asked, *adapter, "--output", tmp_path / "a"]])
        lines = (tmp_path / "a").read_text().splitlines()
        (tmp_path / "a").unlink()
        return [json.loads(line)["answer"] for line in lines]

    base, ours = answers(), answers("--adapter", run)
    assert "not merged" in capsys.readouterr().err
    assert ours[3] == base[3] and ours[:3] != base[:3]

    export([str(arg) for arg in ["--adapter", run, "--output", out, "--base-name", model]])
    theirs = AutoPeftModelForCausalLM.from_pretrained(out).eval()
    tokens = tokenizer()
    for row, want in zip(prompts.read_text().splitlines(), ours, strict=True):
        chat = [{"role": "user", "content": json.loads(row)["prompt"]}]
        ids = tokens.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([ids])
        new = theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        assert tokens.decode(new[0, ids.shape[1] :], skip_special_tokens=True).strip() == want
    assert answers("--adapter", out) == ours
    for more in (["--merged"], ["--merged", "--gguf", tmp_path / "m.gguf"]):
        where = [] if "--gguf" in more else ["--output", tmp_path / "merged"]
        said = fails(capsys, export, "--adapter", run, "--model", model, *more, *where)
        assert "activated LoRA, which acts from its invocation" in " ".join(said.split())
    said = fails(capsys, export, "--adapter", run, "--model", model, "--gguf", tmp_path / "a.gguf")
    assert "activated LoRA" in " ".join(said.split())
    assert not (tmp_path / "merged").exists()
