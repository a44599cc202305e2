"""`train.dpo` on a tiny model: its first step, its reference, batches in parts, and bad input."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from tests.adapted_trees import with_random_factors
from tests.support import assert_close, thorough
from tests.train.scripts import fails
from tests.train.tiny import tokenizer, write_jsonl, write_model
from train.adapters.source import find_adapter
from train.console.errors import UserError
from train.dpo import main, parse
from train.live import preferences
from train.live.reference import reference_params
from train.run.log import read_metrics

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
RNG = np.random.default_rng(6)
BATCH = 8


def said(most):
    return "".join(RNG.choice(list("abcd efgh"), RNG.integers(1, most)))


# The chosen completions end with another letter than the rejected ones.
PAIRS = [
    {"prompt": said(9), "chosen": said(9) + "x", "rejected": said(6) + "y"} for _ in range(BATCH)
]
LABELLED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row, side in zip(PAIRS, ["chosen", "rejected", "rejected", "chosen"] * 2, strict=True)
]


def write_inputs(folder):
    """Writes a model, an adapter over it that is in use, and rows, as many as a batch."""
    write_model(folder / "model", scale=0.4)
    _, params = models.from_pretrained(folder / "model")
    tree = lj.lorafy(params, [lj.LoraRule(targets=["q_proj", "v_proj"], rank=3, alpha=6)])
    lj.save_adapter(folder / "used", with_random_factors(tree))
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    write_jsonl(folder / "labelled.jsonl", LABELLED)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def run(folder, output, *args, start="used", metrics=True):
    """Runs the script, from the adapter in use where no other is named; returns its metrics."""
    line = ["--model", folder / "model", "--dataset", folder / "pairs.jsonl", "--warmup", 1]
    line += ["--report-to", "none", "--output", output]
    line += ["--init-adapter", folder / start] if start else ["--targets", "q_proj", "v_proj"]
    main([str(arg) for arg in [*line, *args]])
    return read_metrics(output) if metrics else []


def adapter_of(folder, output):
    """The arrays of an adapter, by their names."""
    model, params = models.from_pretrained(folder / "model")
    return lj.split(find_adapter(str(output)).load(model, params, "the base"))[0]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run from a new adapter, whose reference is the base, and its metrics."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    args = ["--rank", 3, "--steps", 30, "--lr", 4e-2, "--beta", 0.3]
    return output, run(folder, output, *args, start=None)


@pytest.mark.slow
def test_an_adapter_begins_at_its_reference(whole):
    _, lines = whole
    first = lines[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert all(first[name] == 0 for name in ("chosen", "rejected", "margin", "accuracy"))
    assert first["count"] == BATCH and first["grad_norm"] > 1e-3


def test_separable_pairs_are_learned(whole):
    _, lines = whole
    assert lines[-1]["loss"] < 0.1 and lines[-1]["accuracy"] == 1
    assert lines[-1]["chosen"] > 0 > lines[-1]["rejected"]


@pytest.mark.slow
def test_the_reference_is_an_adapter(folder, tmp_path):
    """Its log-probabilities, kept or not, are those of the adapter that begins."""
    args = ["--reference", folder / "used", "--steps", 4, "--lr", 1e-2]
    kept = run(folder, tmp_path / "kept", *args)
    live = run(folder, tmp_path / "live", *args, "--reference-logps", "live")
    for first in (kept[0], live[0]):
        assert all(first[name] == 0 for name in ("chosen", "rejected", "margin", "accuracy"))
    assert kept[-1]["margin"] > 0.01
    assert_close(*(adapter_of(folder, tmp_path / way) for way in ("kept", "live")), 1e-6)


def tokens_nll(folder, *, predict_prompts):
    """The cross-entropy of chosen completions in use, a mean over the tokens of all of them."""
    model, params = models.from_pretrained(folder / "model")
    tree = find_adapter(str(folder / "used")).load(model, params, "the base")
    forward, found = jax.jit(lj.adapt(model.apply)), []
    texts = [CHATML_PAIR.format(**row) for row in PAIRS]
    length = max(map(len, (tokenizer()(text)["input_ids"] for text in texts)))
    for row, text in zip(PAIRS, texts, strict=True):
        ids = np.array(tokenizer()(text)["input_ids"])
        padded = np.pad(ids, (0, length - len(ids)))[None]
        logits = np.asarray(forward({"params": tree}, padded))[0, : len(ids) - 1]
        each = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]
        completion = len(tokenizer()(row["chosen"])["input_ids"]) + len(END)
        found.extend(each if predict_prompts else each[-completion:])
    return np.mean(found)


CHATML_PAIR = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{chosen}<|im_end|>\n"
END = ("<|im_end|>", "\n")


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "predict_prompts"), [("orpo", True), ("cpo", False)])
def test_losses_without_a_reference_count_their_cross_entropy(
    folder, tmp_path, loss, predict_prompts
):
    """By default, as TRL's trainers do; sft and a weight of 0 are in its place."""
    first = {}
    ways = {"alone": [loss], "no": [loss, "--nll-weight", 0], "sft": [loss, "sft"]}
    for way, args in ways.items():
        args = ["--loss", *args, "--steps", 1, "--beta", 0.4]
        (first[way],) = run(folder, tmp_path / way, *args)
    nll = tokens_nll(folder, predict_prompts=predict_prompts)
    pair = first["no"]["loss"]
    assert first["alone"]["loss"] == pytest.approx(pair + nll, abs=1e-5)
    sft = tokens_nll(folder, predict_prompts=False)
    assert first["sft"]["loss"] == pytest.approx(pair + sft, abs=1e-5)
    assert nll > 1


def test_what_a_batch_gets_of_a_divergence_is_single_precision(monkeypatch):
    batch = {"ids": np.zeros((2, 3, 8), np.int32)}
    ready = SimpleNamespace(feed=SimpleNamespace(batch=lambda number: batch))
    live = preferences.ReferenceBatches(
        ready, None, None, cached=True, mismatch_examples=SimpleNamespace()
    )
    monkeypatch.setattr(preferences.ReferenceBatches, "_batch_divergence", lambda *_: 0.1)
    kl = live.batch(0, None)["kl"]
    assert kl.shape == (2, 3) and kl.dtype == np.float32


@pytest.mark.slow
def test_a_run_of_before_goes_on_with_its_loss(folder, tmp_path, capsys):
    """Its cpo was the loss of pairs alone."""
    args = ["--loss", "cpo", "--steps", 1]
    run(folder, tmp_path / "run", *args, "--nll-weight", 0)
    kept = tmp_path / "run" / "config.yaml"
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(line for line in lines if "nll_weight" not in line))
    args = ["--model", folder / "model", "--init-adapter", folder / "used", *args, "--resume"]
    args += ["--dataset", folder / "pairs.jsonl", "--warmup", 1, "--output", tmp_path / "run"]
    told = fails(capsys, main, *args)
    assert "--nll-weight was 0.0 and is now 1.0" in told
    main([str(arg) for arg in [*args, "--nll-weight", 0]])


@pytest.mark.slow
def test_the_reference_is_read_once(folder, tmp_path, monkeypatch, capsys):
    """Another run finds its log-probabilities, unless they are those of something else."""

    class Read(BaseException):
        pass

    def stop(*_):
        raise Read

    monkeypatch.setattr("train.stages.alone.compile_step", stop)
    used = tmp_path / "used"
    _, params = models.from_pretrained(folder / "model")
    rules = [lj.LoraRule(targets=["q_proj", "v_proj"], rank=3, alpha=6)]

    def reads(*args, seed=7):
        lj.save_adapter(used, with_random_factors(lj.lorafy(params, rules), seed), overwrite=True)
        kept = ["--token-cache", tmp_path / "cache", "--reference", used, "--overwrite"]
        with pytest.raises(Read):
            run(folder, tmp_path / "run", *kept, *args)
        out = capsys.readouterr().out
        found = "log-probabilities come from an earlier run" in out
        assert found != ("the reference scores 8 rows" in out)
        return not found

    others = write_jsonl(tmp_path / "rows.jsonl", [*PAIRS[1:], PAIRS[0] | {"chosen": "cx"}])
    assert reads() and not reads("--batch-size", 4, "--seed", 3, "--lr", 1)
    assert reads(seed=8) and reads("--dtype", "bfloat16") and reads("--dataset", others)
    assert reads("--reference", "base") and not reads("--reference", "base", seed=9)


SPLITS = {
    "4 x 2": ["--batch-size", 2, "--grad-accum", 4],
    "8 x 1": ["--batch-size", 1, "--grad-accum", 8],
    "in chunks": ["--batch-size", 8, "--loss-chunk", 5],
    "packed": ["--packing", "--batch-size", 1, "--seq-len", 256],
    "in another order": ["--batch-size", 8],
}
LOSSES = {
    "sigmoid": [],
    "sigmoid and sft": ["--loss", "sigmoid", "sft", "--loss-weights", 1, 0.5],
    "orpo": ["--loss", "orpo", "--beta", 0.5],
    "kto": ["--loss", "kto", "--kto-weights", 1.2, 0.8],
}


# KTO compares the rows of a batch in their order.
CASES = [
    *(("sigmoid", "4 x 2"), ("sigmoid", "packed"), ("sigmoid and sft", "in chunks")),
    *(("orpo", "8 x 1"), ("kto", "4 x 2")),
    pytest.param("orpo", "in another order", marks=thorough),
    pytest.param("kto", "in chunks", marks=thorough),
]


@pytest.fixture(scope="module")
def stepped(folder, tmp_path_factory):
    """Takes one step of plain descent, so that the adapter's change is its gradient."""
    output, found = tmp_path_factory.mktemp("stepped"), {}

    def step(loss, way):
        if (loss, way) not in found:
            rows, name = (LABELLED, "labelled") if loss == "kto" else (PAIRS, "pairs")
            args = [] if loss == "orpo" else ["--reference", "base"]
            args += [*LOSSES[loss], *SPLITS.get(way, ["--batch-size", 8]), "--steps", 1, "--lr", 1]
            args += ["--optimizer", "sgd", "--momentum", 0, "--grad-clip", 0]
            path = folder / f"{name}.jsonl"
            if way == "in another order":
                path = write_jsonl(output / "rows.jsonl", rows[::-1])
            place = output / f"{loss} {way}"
            (line,) = run(folder, place, *args, "--dataset", path)
            found[loss, way] = line, adapter_of(folder, place)
        return found[loss, way]

    return step


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "way"), CASES)
def test_a_batch_in_parts_is_the_batch(folder, stepped, loss, way):
    (whole, expected), (line, adapter) = stepped(loss, "whole"), stepped(loss, way)
    begun = adapter_of(folder, folder / "used")
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), expected, begun)
    assert min(jax.tree.leaves(moved)) > 5e-4
    if loss != "orpo":  # it is compared with the base, from which the adapter has gone
        assert min(abs(whole["chosen"]), abs(whole["rejected"])) > 1e-3
    assert loss != "kto" or whole["kl"] > 0.01
    timed = {"time", "tokens_per_s"}
    assert line.keys() == whole.keys()
    got, want = ([x[name] for name in sorted(x.keys() - timed)] for x in (line, whole))
    assert got == pytest.approx(want, rel=1e-6, abs=1e-5)
    assert_close(adapter, expected, 1e-6)


@pytest.mark.slow
def test_runs_of_a_table_are_each_what_they_are_alone(folder, tmp_path):
    rows = [
        {"reference": "base"},
        {"reference": "base", "loss": ["kto"], "batch_size": 4},
        {"loss": ["simpo", "sft"], "grad_accum": 2},
        {"reference": str(folder / "used"), "reference_logps": "live"},
    ]
    line = ["--steps", 3, "--eps", 1e-4, "--lr", 1e-2]
    line += ["--eval-every", 2, "--eval-dataset", folder / "pairs.jsonl"]
    table = tmp_path / "runs.json"
    table.write_text(json.dumps([{"name": f"{i}"} | row for i, row in enumerate(rows)]))
    run(folder, tmp_path / "many", *line, "--many", table, metrics=False)
    for number, row in enumerate(rows):
        args = [
            arg
            for name, value in row.items()
            for arg in [
                f"--{name.replace('_', '-')}",
                *(value if isinstance(value, list) else [value]),
            ]
        ]
        alone = run(folder, tmp_path / f"alone {number}", *line, *args)
        beside = read_metrics(tmp_path / "many" / f"{number}")
        for name in ("loss", "grad_norm", "count", "eval_loss"):
            both = ([x[name] for x in lines if name in x] for lines in (beside, alone))
            assert_close(*map(np.array, both), 1e-5)
        places = (tmp_path / "many" / f"{number}", tmp_path / f"alone {number}")
        assert_close(*(adapter_of(folder, place) for place in places), 1e-5)


BAD = {
    "equal": (
        [{"prompt": "a", "chosen": "b", "rejected": "b"}],
        [],
        "line 1: `chosen` and `rejected` are the same. Remove the row",
    ),
    "empty": ([{"prompt": "a", "chosen": "", "rejected": "b"}], [], "line 1: `chosen` is empty"),
    "no pair": ([{"prompt": "a", "completion": "b"}], [], "line 1 has"),
    "unlabelled": ([{"prompt": "a", "completion": "b"}], ["--loss", "kto"], "label"),
    "too long": (PAIRS, ["--seq-len", "20"], "are longer than --seq-len 20"),
    "aot in parts": (
        PAIRS,
        ["--loss", "aot", "--grad-accum", "2"],
        "--grad-accum 2 cannot be used with the loss aot",
    ),
    "margin": (PAIRS, ["--margin", "1"], "--margin has no effect on --loss sigmoid"),
    "cross-entropy": (PAIRS, ["--nll-weight", "1"], "only these losses use it: cpo, simpo"),
    "smoothing": (
        PAIRS,
        ["--loss", "ipo", "--smoothing", "0.1"],
        "--smoothing has no effect on --loss ipo",
    ),
    "a reference without use": (
        PAIRS,
        ["--loss", "simpo", "--reference", "base"],
        "--reference base has no effect on --loss simpo",
    ),
    "no reference": (PAIRS, ["--reference", "none"], "--reference none: the loss sigmoid compares"),
    "no such reference": (PAIRS, ["--reference", "nowhere"], "--reference nowhere"),
    "live, none": (
        PAIRS,
        ["--loss", "orpo", "--reference-logps", "live"],
        "--reference-logps live has no effect without a reference",
    ),
    "kto alone": (PAIRS, ["--loss", "kto", "sft"], "kto without any other"),
    "kto packed": (PAIRS, ["--loss", "kto", "--packing"], "--packing cannot be used with --loss"),
    "one weight": (PAIRS, ["--loss-weights", "1", "2"], "needs 1. Pass one weight for each loss"),
}


@pytest.mark.parametrize("way", BAD)
def test_bad_input_is_one_paragraph_before_training(folder, tmp_path, capsys, way):
    rows, args, message = BAD[way]
    line = ["--model", folder / "model", "--dataset", write_jsonl(tmp_path / "rows.jsonl", rows)]
    told = fails(capsys, main, *line, "--output", tmp_path / "run", *args)
    assert message in told and len(told.splitlines()) == 1, told
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize("takes_from_base", [False, True])
def test_a_second_base_is_refused(takes_from_base):
    options = ["--dataset", "pairs.jsonl", "--reference", "base", "--reference-logps", "live"]
    config = parse([*options, *([] if takes_from_base else ["--full"])])
    what = "--init takes factors from" if takes_from_base else "--full trains"
    with pytest.raises(UserError, match=f"{what} the base itself"):
        reference_params(config, SimpleNamespace(name="tiny"), {}, takes_from_base)


def test_a_reference_over_another_base_is_refused(folder, tmp_path, capsys):
    other = write_model(tmp_path / "other", scale=0.3)
    line = ["--model", other, "--dataset", folder / "pairs.jsonl", "--output", tmp_path / "run"]
    told = fails(capsys, main, *line, "--reference", folder / "used")
    assert "base" in told and len(told.splitlines()) == 1, told
