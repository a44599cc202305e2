"""Predictions of tiny classifiers: the same for every source of texts, in few shapes; bad input."""

import csv
import functools
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from tests.support import array, with_random_factors
from tests.train.test_classify import CONFIG, write_encoder
from tests.train.tiny import tokenizer, write_jsonl, write_model
from train import classify
from train.export import __main__ as export
from train.predict import batches
from train.predict.__main__ import PredictOptions, main, read_texts
from train.predict.classifier import find_classifier
from train.predict.texts import TokenizedTexts
from train.run import pretrained

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
LABELS = ("low", "middle", "top")
# Few lengths: each is compiled for the judge, which runs them one by one.
TEXTS = ["abc", "onm", "a" * 27, "zzy", "cab", "mno", "xyz", 'ü, "b"\tc', "bca", "mmn"]
HEAD = {"head": "classification", "num_labels": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders of one classifier: a run, and PEFT's; its function and its tree.

    Also the probabilities of each text by hand: alone, without padding.
    """
    folder = tmp_path_factory.mktemp("made")
    base = write_encoder(folder / "base")
    model, params = models.from_pretrained(base, **HEAD)
    rules = [lj.TrainRule(targets=["classifier"]), lj.LoraRule(targets=["query"], rank=2, alpha=9)]
    tree = with_random_factors(lj.lorafy(params, rules))
    forward = lj.adapt(model.apply)
    run = jax.jit(forward)
    ids = [array([tokenizer(None)(text)["input_ids"]]) for text in TEXTS]
    logits = jnp.stack([run({"params": tree}, one)[0] for one in ids])
    adapter, plain = lj.split(tree)  # each class is the likeliest of some texts
    adapter["classifier/bias"]["value"] -= logits.mean(axis=0)
    tree, expected = lj.join(adapter, plain), jax.nn.softmax(logits - logits.mean(axis=0))
    about = {"model": str(base), "labels": LABELS}
    lj.save_adapter(folder / "run" / "adapter", tree, about=about)
    lp.save(folder / "peft", model, tree, base_model=str(base), task_type="SEQ_CLS")
    return folder, forward, tree, np.asarray(expected)


@pytest.fixture(scope="module")
def expected(made):
    """The probabilities of each text."""
    return made[3]


def predict(capsys, *args):
    main([str(arg) for arg in args])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def values(rows, names=LABELS):
    return np.array([[row["probabilities"][name] for name in names] for row in rows])


def fails(capsys, *args, script=main):
    """Returns the one paragraph before the end with the code for bad input."""
    with pytest.raises(SystemExit) as caught:
        script([str(arg) for arg in args])
    out, said = capsys.readouterr()
    assert caught.value.code == 2 and "Traceback" not in said
    assert out == "" or script is not main
    return said.strip().splitlines()[-1].removeprefix("error: ")


def test_predictions_as_lines_and_as_a_table(made, expected, tmp_path, capsys, monkeypatch):
    run = ["--adapter", made[0] / "run"]
    rows = predict(capsys, *run, *TEXTS)
    assert [row["text"] for row in rows] == TEXTS
    assert np.abs(values(rows) - expected).max() < 1e-5
    assert [row["label"] for row in rows] == [LABELS[i] for i in expected.argmax(-1)]
    assert len({row["label"] for row in rows}) == 3
    assert all(row["probability"] == max(row["probabilities"].values()) for row in rows)
    found = values(rows)
    monkeypatch.setattr("train.predict.__main__.probabilities", lambda *_, **__: found)
    out = tmp_path / "new" / "out.csv"
    main([str(arg) for arg in [*run, *TEXTS, "--out", out]])
    with out.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["text"] for row in table] == TEXTS
    assert [float(row["p(top)"]) for row in table] == found[:, 2].tolist()
    assert [path.name for path in out.parent.iterdir()] == ["out.csv"]


def test_texts_from_everywhere(tmp_path, monkeypatch, capsys):
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS[:3], "", *TEXTS[3:]]) + "\n")
    write_jsonl(tmp_path / "rows.jsonl", [{"body": text, "id": 3} for text in TEXTS])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(TEXTS)))
    for options in (
        PredictOptions(texts=tuple(TEXTS)),
        PredictOptions(input=str(tmp_path / "texts.txt")),
        PredictOptions(input=str(tmp_path / "rows.jsonl"), field="body"),
        PredictOptions(),
    ):
        assert read_texts(options).first == TEXTS
    assert "texts.txt: 1 empty lines were skipped" in capsys.readouterr().err


@pytest.mark.slow
def test_every_form_of_a_classifier(made, expected, tmp_path, capsys):
    folder = made[0]
    merged = ["--adapter", folder / "run", "--output", folder / "merged", "--merged"]
    export.main([str(arg) for arg in merged])
    capsys.readouterr()
    short = [i for i, text in enumerate(TEXTS) if len(text) < 16]  # of one length, padded
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": TEXTS[i]} for i in short])
    for args in (
        ["--adapter", folder / "run" / "adapter"],
        ["--model", folder / "merged"],
        ["--adapter", folder / "peft", "--labels", *LABELS, "--batch-size", 5],
    ):
        rows = predict(capsys, "--input", path, *args)
        assert np.abs(values(rows) - expected[short]).max() < 1e-5
    unnamed = find_classifier(str(folder / "peft"), None)
    assert unnamed.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.slow
def test_pairs(made, tmp_path, capsys):
    folder, forward, tree, _ = made
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"text": "ab", "other": "xyz"}])
    args = ["--adapter", folder / "run", "--input", path, "--field-pair", "other"]
    (row,) = predict(capsys, *args)
    ids = [tokenizer(None)(text)["input_ids"] for text in ("ab", "xyz")]
    types = array([[0] * len(ids[0]) + [1] * len(ids[1])])
    whole = array([ids[0] + ids[1]])
    logits = jax.jit(forward)({"params": tree}, whole, token_type_ids=types)
    assert np.abs(values([row])[0] - jax.nn.softmax(logits[0])).max() < 1e-5
    assert row["text_pair"] == "xyz"


@pytest.mark.parametrize("n", [1, 3, 32, 33, 1000])
def test_batches_hold_each_text_once_in_few_shapes(n):
    lengths = np.random.default_rng(n).integers(1, 513, n)
    found = list(batches.batches(lengths, 32, 512))
    assert sorted(np.concatenate([texts for texts, *_ in found])) == list(range(n))
    assert all(lengths[texts].max() <= length <= 512 for texts, _, length in found)
    assert all(len(texts) <= rows <= 32 for texts, rows, _ in found)
    assert len({(rows, length) for _, rows, length in found}) <= 6
    padded = sum(rows * length for _, rows, length in found)
    assert n < 1000 or padded < 1.6 * lengths.sum(), "little is padding"


@pytest.mark.slow
def test_more_texts_compile_nothing_more(monkeypatch):
    """Each trace is a compilation. The control has more lengths."""
    traced = []

    def toy(variables, ids, *, attention_mask, token_type_ids):
        traced.append(ids.shape)
        weights = (attention_mask + token_type_ids)[..., None] * jnp.array([1.0, 0.1, 0.0])
        return (ids[..., None] * weights).sum(axis=1)

    def run(n):
        traced.clear()
        ids = [np.full(1 + 5 * i % 28, 1 + i % 3, np.int32) for i in range(n)]
        tokens = TokenizedTexts(ids, [np.zeros_like(one) for one in ids], 29, 7)
        new = functools.partial(toy)  # of one function, programs are kept
        found = batches.probabilities(new, {}, tokens, batch_size=4)
        sums = np.array([one.sum() for one in ids])
        want = jax.nn.softmax(sums[:, None] * np.array([1.0, 0.1, 0.0]))
        assert np.abs(found - want).max() < 1e-6
        return len(traced)

    assert run(9) == run(90) == 2 and set(traced) == {(4, 16), (4, 29)}
    monkeypatch.setattr(batches, "padded_lengths_up_to", lambda most: (6, 12, 18, 24, most))
    assert run(90) == 5


def test_a_file_is_whole_or_not_there(made, tmp_path, capsys, monkeypatch):
    def thirds(apply, params, tokens, **_):
        return np.full((len(tokens.ids), 3), 1 / 3, np.float32)

    monkeypatch.setattr("train.predict.__main__.probabilities", thirds)
    out = tmp_path / "out.jsonl"
    args = ["--adapter", made[0] / "run", "ab", "--out", out]
    main([str(arg) for arg in args])
    before = out.read_text()
    assert "exists already. Pass another file, or replace it with --overwrite" in fails(
        capsys, *args
    )
    assert out.read_text() == before
    main([str(arg) for arg in [*args[:2], "xyz", *args[2:], "--overwrite"]])
    assert len(out.read_text().splitlines()) == 2
    before = out.read_text()

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.predict.__main__.probabilities", stopped)
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in [*args, "--overwrite"]])
    assert caught.value.code == 130
    assert out.read_text() == before and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["ab", "--input", "x.csv"], "The command line names texts, and --input"),
        (["ab", "--field", "body"], "--field names a field of the rows of --input"),
        (["--input", "x.txt", "--field", "body"], "--field names a field of the rows of --input"),
        (["--input", "nowhere.txt"], "--input nowhere.txt does not exist"),
        (["--input", "nowhere.csv"], "--input nowhere.csv does not exist"),
        (["ab", "--overwrite"], "--overwrite replaces the file of --out"),
        (["ab", " "], "text 2 of the command line is empty"),
        (["ab", "--batch-size", "0"], "--batch-size 0 is too small"),
        (["ab", "--seq-len", "99"], "--seq-len 99: the model"),
        (["a" * 30], "1 of 1 texts have more tokens than the 29 that the model allows"),
        (["ab", "a" * 9, "--seq-len", "8"], "the 8 that --seq-len allows. The first is text 2"),
        (["ab", "--out", "."], "--out . is a folder"),
        (["ab", "--labels", "a", "b", "c"], "already have names (low, middle, top)"),
    ],
)
def test_bad_options(made, tmp_path, capsys, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "from_pretrained", None)  # no weights are read
    assert words in fails(capsys, *args, "--adapter", made[0] / "run")
    assert list(tmp_path.iterdir()) == []


def test_rows_without_a_text_are_named(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrained, "from_pretrained", None)
    args = ["--adapter", made[0] / "run", "--input", tmp_path / "rows.jsonl"]
    for row, said in (
        ({"text": None}, "line 2: `text` is None. Write a text"),
        ({"body": "ab"}, "line 2 has `body`, and no `text`. Name the field"),
    ):
        write_jsonl(tmp_path / "rows.jsonl", [{"text": "ab"}, row])
        assert said in fails(capsys, *args)
    (tmp_path / "rows.jsonl").write_text("")
    assert "has no rows" in fails(capsys, *args)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "standard input has no text" in fails(capsys, *args[:2])
    args[-1] = tmp_path / "rows.txt"
    args[-1].write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in fails(capsys, *args)


def test_models_that_do_not_classify(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrained, "from_pretrained", None)
    folder = made[0]
    assert fails(capsys, "ab").startswith("No classifier is named")
    said = fails(capsys, "ab", "--model", folder / "base")
    assert "its config.json names BertModel. Use a model whose architecture ends in" in said

    llama = write_model(tmp_path / "llama")
    (llama / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]})
    )
    assert "is a llama model, which cannot classify" in fails(capsys, "ab", "--model", llama)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (other / name).symlink_to(folder / "base" / name)
    fields = CONFIG | {"architectures": ["BertForSequenceClassification"]}

    def of(**changes):
        (other / "config.json").write_text(json.dumps(fields | changes))
        return fails(capsys, "ab", "--model", other)

    assert "The files contain no classifier/kernel, so the head is not trained" in of()
    assert "problem_type multi_label_classification, but only one class per text" in of(
        problem_type="multi_label_classification"
    )
    assert "has one class, so it is a regression model" in of(num_labels=1)
    model, params = models.from_pretrained(folder / "base", **HEAD)
    tree = lj.lorafy(params, [lj.LoraRule(targets=["query"], rank=2)])
    lp.save(tmp_path / "plain", model, tree, base_model=str(folder / "base"))
    said = fails(capsys, "ab", "--adapter", tmp_path / "plain")
    assert "is not the adapter of a classifier, because it has no head" in said
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "ab", "label": i % 3} for i in range(30)])
    args = ["--init-adapter", tmp_path / "plain", "--dataset", rows, "--output", tmp_path / "run"]
    said = fails(capsys, *args, "--seq-len", 16, script=classify.main)
    assert "--init-adapter" in said and "do not make a classifier" in said
