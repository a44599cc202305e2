"""The whole script on a tiny encoder: what it leaves, what trains, resuming, and bad input."""

import dataclasses
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_jax as lj
from lora_jax import models
from lora_jax.core.paths import flatten_with_paths
from lora_jax.models import hf_tensors, key_table, read_config
from lora_jax.models.families import family_of
from lora_jax.training.data.labelled import Labelled, label_names, predict
from lora_jax.training.held_out import held_out_loss
from lora_jax.training.losses import CLASSES
from lora_jax.training.step import make_evaluation
from tests.models.tiny import draw
from tests.support import array, assert_identical, over, thorough
from tests.train.scripts import begun
from tests.train.tiny import tokenizer, write_jsonl, write_model
from train.classify import check, main, parse
from train.console.errors import UserError
from train.export import __main__ as export
from train.run.log import read_metrics
from train.tasks.classes import scores_of
from train.tasks.labelled import TASK, encode, read_labelled, select_spread

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
CONFIG = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 259,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 29,
    "type_vocab_size": 2,
    "pad_token_id": 256,
}


@functools.cache
def encoder_tensors():
    config = read_config(CONFIG)
    model = family_of("bert").module(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(5)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: draw(rng, jax.tree_util.keystr(path), leaf.shape), shapes
    )
    return dict(hf_tensors(params, key_table(config)))


def write_encoder(folder):
    """A tiny random BERT without a head, and a tokenizer of bytes."""
    tokenizer(None).save_pretrained(folder)
    save_file(encoder_tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def words(n, seed=0):
    """Rows of three classes that the letters tell apart, of few lengths: each is compiled."""
    rng = np.random.default_rng(seed)
    kinds = {"low": "abc", "middle": "mno", "top": "xyz"}
    rows = []
    for i in range(n):
        name = list(kinds)[i % 3]
        letters = rng.choice(list(kinds[name]), size=rng.choice([3, 8]))
        rows.append({"word": "".join(letters), "grade": name})
    return rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The options that name the tiny encoder and its rows."""
    folder = tmp_path_factory.mktemp("inputs")
    model = write_encoder(folder / "model")
    rows = write_jsonl(folder / "rows.jsonl", words(60))
    options = ["--model", model, "--dataset", rows, "--text", "word", "--label", "grade"]
    options += ["--seq-len", 16, "--batch-size", 8, "--rank", 2, "--lr", 3e-3, "--warmup", 1]
    options += ["--targets", "query", "value"]
    return [str(option) for option in options]


def without_rank(inputs):
    """Returns the options but --rank and --targets, which an adapter has."""
    return [*inputs[:12], *inputs[14:18]]


def run(inputs, folder, *args):
    main([*inputs, "--output", str(folder), *map(str, args)])
    return folder


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A run without a break."""
    folder = tmp_path_factory.mktemp("whole")
    return run(inputs, folder, "--steps", 120, "--eval-every", 60, "--alpha", 16, "--lr", 1e-2)


def base_of(inputs):
    return models.from_pretrained(inputs[1], head="classification", num_labels=3)


def adapter_of(inputs, folder):
    return lj.split(lj.load_adapter(folder / "adapter", base_of(inputs)[1]))[0]


def test_a_run_leaves_all_that_it_should(inputs, whole):
    assert {path.name for path in whole.iterdir()} == {
        *("adapter", "checkpoints", "checkpoints.json", "config.yaml", "facts.json"),
        "loss.png",
        *("metrics.jsonl", "report.json"),
        *("tensorboard", "scores.json", "confusion.png"),
    }
    assert json.loads((whole / "facts.json").read_text())["labels"] == ["low", "middle", "top"]
    scores = json.loads((whole / "scores.json").read_text())
    assert scores["always the commonest label"]["accuracy"] == pytest.approx(1 / 3)
    tuned = scores["fine-tuned"]
    assert (
        tuned["accuracy"] == np.trace(tuned["confusion"]) / 12 and np.sum(tuned["confusion"]) == 12
    )
    assert tuned["accuracy"] > 0.8  # letters are easy
    trained = adapter_of(inputs, whole)
    assert all("value" in trained[f"classifier/{name}"] for name in ("kernel", "bias"))
    assert any(np.any(parts["b"]) for parts in trained.values() if "b" in parts)
    lines = read_metrics(whole)
    assert [line["step"] for line in lines if "eval_loss" in line] == [60, 120]
    assert lines[-1]["eval_accuracy"] == pytest.approx(tuned["accuracy"])
    assert all(0 <= line["accuracy"] <= 1 for line in lines if "loss" in line)


@pytest.mark.slow
def test_long_evaluations_are_no_steps(inputs, tmp_path, monkeypatch, capsys):
    """Each takes two seconds between steps of milliseconds, and falls into a window of them."""

    def slow(*args, **how):
        measure = held_out_loss(*args, **how)

        def take(state):
            time.sleep(2.0)
            return measure.take(state)

        return dataclasses.replace(measure, take=take)

    monkeypatch.setattr("train.stages.steps.held_out_loss", slow)
    folder = run(inputs, tmp_path, "--steps", 6, "--eval-every", 2, "--log-every", 5)
    report = json.loads((folder / "report.json").read_text())
    seconds = report["median_step_seconds"]
    assert 0 < seconds < 1.0
    said = " ".join(capsys.readouterr().out.split())
    assert f"step (median) │ {1000 * seconds:.3g} ms" in said
    compiling = f"{report['further_compile_seconds']:.1f} s"
    assert f"further compilations │ {compiling}" in said
    lines = [line for line in read_metrics(folder) if "loss" in line]
    assert [line["step"] for line in lines] == [5, 6]
    n_tokens = 5 * 8 * 5  # five steps of eight rows with five tokens or more
    assert lines[0]["tokens_per_s"] > n_tokens / 2.0


@pytest.mark.slow
def test_a_loss_that_is_a_sum_is_logged_as_one(inputs, tmp_path, monkeypatch):
    options = ["--steps", 1, "--eval-every", 1]
    mean = run(inputs, tmp_path / "mean", *options)
    summed = dataclasses.replace(CLASSES, reduction="sum")
    monkeypatch.setattr("train.tasks.labelled.CLASSES", summed)
    folder = run(inputs, tmp_path / "sum", *options)
    of_sum, of_mean = (read_metrics(path)[0] for path in (folder, mean))
    assert of_sum["loss"] == pytest.approx(8 * of_mean["loss"], rel=1e-5)
    assert of_sum["grad_norm"] == pytest.approx(8 * of_mean["grad_norm"], rel=1e-5)
    assert of_sum["accuracy"] == of_mean["accuracy"]
    data = parse(inputs).data
    names, (_, test) = ("low", "middle", "top"), read_labelled(data)
    examples = encode(data, test, names, tokenizer(None), "rows")
    model, plain = base_of(inputs)
    params = lj.merge(lj.load_adapter(folder / "adapter", plain))
    mine = predict(model, params, examples, 4)[np.arange(12), examples.labels]
    held_out = read_metrics(folder)[-1]
    assert held_out["eval_loss"] == pytest.approx(-np.log(mine).sum(), rel=1e-4)
    assert 0 <= held_out["eval_accuracy"] <= 1


def test_the_scores_are_those_of_the_saved_adapter(inputs, whole):
    """By hand: the texts that were held out, one at a time and unpadded, through `adapt`."""
    model, params = base_of(inputs)
    tree = lj.load_adapter(whole / "adapter", params)
    forward = jax.jit(lj.adapt(model.apply))
    _, test = read_labelled(parse(inputs).data)
    right = []
    for row in test:
        ids = array([tokenizer(None)(row["word"])["input_ids"]])
        right.append(int(forward({"params": tree}, ids).argmax()) == "lmt".index(row["grade"][0]))
    scores = json.loads((whole / "scores.json").read_text())
    assert scores["fine-tuned"]["accuracy"] == sum(right) / len(test)
    assert scores["right"] == right, "the result of each text, in the order of the rows"
    assert "right" not in TASK.baselines(scores) and [*TASK.question_scores(scores)] == right


@pytest.mark.slow
@thorough  # as test_sft.py does
def test_a_resumed_run_ends_bitwise_where_a_whole_one_does(inputs, whole, tmp_path):
    options = ["--dropout", 0.1, "--eval-every", 6, "--log-every", 1, "--schedule", "constant"]
    run(inputs, tmp_path / "whole", "--steps", 6, *options)
    run(inputs, tmp_path / "half", "--steps", 3, *options)
    run(inputs, tmp_path / "half", "--steps", 6, *options, "--resume")
    assert_identical(adapter_of(inputs, tmp_path / "whole"), adapter_of(inputs, tmp_path / "half"))


@pytest.mark.parametrize("saved", [None, ["classifier", "score"]])
def test_the_head_trains_whether_a_peft_configuration_says_so_or_not(saved, inputs, tmp_path):
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 3, "target_modules": ["query"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": saved}))
    options = [*without_rank(inputs), "--peft-config", str(tmp_path)]
    params = begun(main, *options, "--output", tmp_path / "run")
    query = "bert/encoder/layer/attention/self/query/kernel"
    assert set(lj.split(params)[0]) == {"classifier/kernel", "classifier/bias", query}


HEAD = {"classifier/kernel", "classifier/bias"}


def test_biases_train(inputs, tmp_path):
    trained = set(lj.split(begun(main, *inputs, "--output", tmp_path, "--bias", "all"))[0])
    assert {path for path in trained if path.endswith("/bias")} > {"classifier/bias"}
    assert HEAD < trained


@pytest.mark.parametrize("way", ["--head-only", "--full"])
def test_what_trains_without_an_adapter(way, inputs, tmp_path):
    params = begun(main, *without_rank(inputs), way, "--output", tmp_path)
    leaves = {path for path, _ in flatten_with_paths(base_of(inputs)[1])[0]}
    assert {*lj.split(params)[0]} == (HEAD if way == "--head-only" else leaves)


@over("way", ["--head-only", "--full"], often=[])
def test_a_run_without_an_adapter(way, inputs, tmp_path):
    trained = set(adapter_of(inputs, run(without_rank(inputs), tmp_path, "--steps", 2, way)))
    if way == "--head-only":
        assert trained == HEAD
    else:
        assert len(trained) == len(jax.tree.leaves(base_of(inputs)[1]))


@pytest.mark.slow
def test_the_merged_export_knows_its_classes(inputs, whole, tmp_path):
    args = ["--adapter", whole / "adapter", "--output", tmp_path / "out", "--merged"]
    export.main([str(arg) for arg in args])
    model, params = models.from_pretrained(tmp_path / "out")
    assert model.config.label_names == ("low", "middle", "top")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["id2label"] == {"0": "low", "1": "middle", "2": "top"}
    tree = lj.load_adapter(whole / "adapter", base_of(inputs)[1])
    ids = array([[3, 9, 70]])
    expected = jax.jit(lj.adapt(model.apply))({"params": tree}, ids)
    got = jax.jit(model.apply)({"params": params}, ids)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_padding_and_filled_up_batches_change_no_loss(inputs):
    model, params = base_of(inputs)
    data, rows = parse(inputs).data, words(5)
    one = encode(data, rows, ("low", "middle", "top"), tokenizer(None), "rows")
    assert isinstance(one, Labelled) and one.ids.shape == (5, 8)
    evaluate = jax.jit(make_evaluation(lj.adapt(model.apply), CLASSES))
    tree = lj.lorafy(params, [lj.TrainRule(targets=["classifier"])])

    def mean(examples, batch_size):
        adapter, base = lj.split(tree)
        sums = [evaluate(adapter, base, part) for part in examples.parts(batch_size)]
        assert sum(int(s.count) for s in sums) == 5
        return sum(float(s.total) for s in sums) / 5

    by_hand, forward = 0.0, jax.jit(model.apply)
    for row in rows:
        ids = array([tokenizer(None)(row["word"])["input_ids"]])
        log_probs = jax.nn.log_softmax(forward({"params": params}, ids)[0])
        by_hand -= float(log_probs["lmt".index(row["grade"][0])]) / 5
    assert mean(one, 2) == pytest.approx(by_hand, rel=1e-4)
    assert mean(one, 5) == pytest.approx(by_hand, rel=1e-4)


def test_scores_of_a_small_case_by_hand():
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 1])
    scores = scores_of(labels, predicted, ["a", "b", "c"])
    assert scores["accuracy"] == 0.5
    assert scores["confusion"] == [[2, 1, 0], [1, 1, 0], [0, 1, 0]]
    assert scores["classes"]["a"] == {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "texts": 3}
    f1_b = 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + f1_b + 0) / 3)


def test_the_loss_on_the_way_is_of_texts_from_all_over():
    columns = {name: np.arange(20).reshape(10, 2) for name in ("ids", "attention_mask")}
    columns["token_type_ids"] = np.zeros((10, 2), int)
    test = Labelled(**columns, labels=np.arange(10), weights=np.ones(10))
    few = select_spread(test, 4)
    assert few.labels.tolist() == [0, 3, 6, 9] and few.ids[:, 0].tolist() == [0, 6, 12, 18]
    assert select_spread(test, 10) is None and select_spread(test, None) is None


def test_numbers_are_ordered_as_numbers():
    label = parse(["--dataset", "a.csv", "--label", "n"]).data.label
    assert label_names([{"n": 10}, {"n": 2}, {"n": "-1"}], label) == ("-1", "2", "10")
    assert label_names([{"n": "b"}, {"n": "10"}, {"n": "a"}], label) == ("10", "a", "b")


def fails(capsys, *args):
    """What the script says before it ends with the code for bad input."""
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert "Traceback" not in captured.err and "loss" not in captured.out
    return captured.err.strip()


def test_rows_that_cannot_be_used(inputs, tmp_path, capsys):
    model = inputs[:2]

    def message(rows, *args):
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        output = ["--output", tmp_path / "out", "--dataset", path]
        return fails(capsys, *model, *output, "--seq-len", 16, *args)

    good = [{"text": "abc", "label": i % 2} for i in range(10)]
    assert "line 11 has `label`, but no `text`. Name the field with --text" in message(
        [*good, {"label": 1}]
    )
    assert "line 11: `text` is None, but it must be a text" in message(
        [*good, {"text": None, "label": 1}]
    )
    assert "line 11: `label` is 0.5, but it must be a name or a whole number" in message(
        [*good, {"text": "a", "label": 0.5}]
    )
    assert "no `hypothesis`. Name the field with --text-pair" in message(
        good, "--text-pair", "hypothesis"
    )
    assert "all rows have the label 1" in message([{"text": "a", "label": 1}] * 9)
    long = [*good, {"text": "a" * 40, "label": 1}, {"text": "a" * 41, "label": 0}]
    said = message(long, "--test-share", 0.5)
    assert "longer than --seq-len 16. The longest text has 4" in said and "--truncate" in said
    assert "cannot be held out" in message([*good, {"text": "abc", "label": 7}])
    other = write_jsonl(tmp_path / "test.jsonl", [{"text": "abc", "label": 3}])
    assert "line 1: the label 3 is none of the labels of training: 0, 1" in message(
        good, "--test", other
    )
    assert "does not exist" in message(good, "--test", tmp_path / "none.csv")


def test_models_that_cannot_classify(inputs, tmp_path, capsys):
    llama = write_model(tmp_path / "llama")
    args = [*inputs, "--output", tmp_path / "out", "--model", llama]
    assert "is a llama model, which cannot classify texts here. Pass a BERT" in fails(capsys, *args)
    args = [*inputs, "--output", tmp_path / "out", "--targets", "qwery"]
    assert "qwery" in fails(capsys, *args)
    args = [*inputs, "--output", tmp_path / "out", "--seq-len", 99]
    assert "allows at most 29 tokens" in fails(capsys, *args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--dataset a.csv --test-share 1", "--test-share is 1.0. Pass a number between 0 and 1"),
        ("--dataset a.csv --test validation", "a.csv is a file, which has no splits"),
        ("--head-only --full", "--head-only trains only the head. Remove --full"),
        ("--head-only --peft-config x", "Remove --peft-config"),
        ("--head-only --rank 4", "without an adapter. Remove --rank"),
        ("--text word", "its own rows and its own test. Remove --text"),
        ("--seq-len 2", "--seq-len 2 is out of range. Pass a number of at least 3"),
        ("--test x.csv", "holds out words itself"),
        ("--lr-rule llama", "--lr-rule was fitted to language models"),
        ("--batch-size 0", "--batch-size 0 is out of range. Pass a number of at least 1"),
        ("--eval-rows 9", "nothing is measured. Remove --eval-rows"),
        (
            "--eval-every 2 --eval-rows 0",
            "--eval-rows 0 is out of range. Pass a number of at least 1",
        ),
    ],
)
def test_options_that_make_no_sense(args, message):
    with pytest.raises(UserError, match=message):
        check(parse(args.split()))


def test_a_pair_of_texts_is_told_apart(inputs):
    data = parse([*inputs, "--text-pair", "other"]).data
    rows = [{"word": "ab", "other": "xyz", "grade": "low"}]
    encoded = encode(data, rows, ("low",), tokenizer(None), "rows")
    joined = tokenizer(None)("ab")["input_ids"] + tokenizer(None)("xyz")["input_ids"]
    assert encoded.ids[0].tolist() == [*joined, *[256] * 3]
    assert encoded.attention_mask[0].tolist() == [1] * 5 + [0] * 3
    assert encoded.token_type_ids[0].tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
