"""A reward model from its pairs to the rewards of `train.grpo`, and bad input."""

import json
from contextlib import closing
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.training.data.comparisons import comparisons
from lora_jax.training.losses import COMPARISONS
from tests.support import assert_identical, thorough, with_random_factors
from tests.train.test_classify import fails, write_encoder
from tests.train.tiny import tokenizer, write_jsonl, write_model
from train.adapters.source import find_adapter
from train.classify import check, main, parse
from train.console.errors import UserError
from train.export import __main__ as export
from train.predict import __main__ as predict
from train.rewards.find import RewardModel, find_rewards
from train.rewards.reward import RewardBatch
from train.run.classifiers import read_classifier_info
from train.run.log import read_metrics
from train.run.task import EvaluatedModel
from train.tasks.labelled import ADAPTED
from train.tasks.reward_model import BEFORE, LONGER, RewardModelEvaluation, read_rows

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SEQ = 14


def preferences(n, seed=0):
    """Pairs that the letters of their completions tell apart; several have the same prompt."""
    rng = np.random.default_rng(seed)

    def word(letters):
        return "".join(rng.choice(list(letters), rng.integers(2, 9)))

    return [
        {
            "prompt": "".join(rng.choice(list("pqrs"), 2)),
            "chosen": word("abc"),
            "rejected": word("xyz"),
        }
        for _ in range(n)
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The options that name a tiny encoder and its pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = write_jsonl(folder / "pairs.jsonl", preferences(70))
    options = ["--labels", "pairs", "--model", write_encoder(folder / "model"), "--dataset", rows]
    options += ["--seq-len", SEQ, "--batch-size", 8, "--rank", 2, "--lr", 3e-2, "--warmup", 1]
    return [str(option) for option in [*options, "--targets", "query", "value"]]


def run(inputs, folder, *args):
    main([*inputs, "--output", str(folder), "--report-to", "none", *map(str, args)])
    return folder


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A run without a break."""
    return run(inputs, tmp_path_factory.mktemp("whole"), "--steps", 30, "--eval-every", 30)


@pytest.fixture(scope="module")
def learned(whole):
    return RewardModel(str(whole))


@pytest.fixture(scope="module")
def drawn(inputs, tmp_path_factory):
    """The folder of a reward model that learned nothing, whose scores differ."""
    folder = tmp_path_factory.mktemp("drawn")
    _, params = models.from_pretrained(inputs[3], head="classification", num_labels=1)
    rules = [lj.TrainRule(targets=["classifier"]), lj.LoraRule(targets=["query"], rank=2)]
    adapter, base = lj.split(with_random_factors(lj.lorafy(params, rules)))
    adapter["classifier/kernel"]["value"] *= 20
    about = read_classifier_info(inputs[3], 1).about | {"labels": ["reward"], "seq_len": SEQ}
    lj.save_adapter(folder / "adapter", lj.join(adapter, base), about=about)
    return folder


@pytest.fixture(scope="module")
def model(drawn):
    return RewardModel(str(drawn))


def scored(model, prompts, completions):
    found = model(RewardBatch(prompts, completions, [], {}, 1))
    assert not found.failures and found.values.dtype == np.float32
    return found.values


@pytest.mark.slow
def test_a_saved_run_rewards_as_its_own_evaluation_says(inputs, whole, learned):
    scores = json.loads((whole / "scores.json").read_text())
    test = read_rows(parse(inputs)).held_out
    prompts = [row["prompt"] for row in test]
    chosen, rejected = (
        scored(learned, prompts, [row[side] for row in test]) for side in ("chosen", "rejected")
    )
    margin = chosen - rejected
    assert scores[ADAPTED]["accuracy"] == (margin > 0).mean() == 1
    assert scores["right"] == (margin > 0).tolist()
    assert scores[ADAPTED]["margin"] == pytest.approx(margin.mean(), rel=1e-5)
    assert scores[ADAPTED]["loss"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-4)
    last = read_metrics(whole)[-1]
    for name, value in scores[ADAPTED].items():
        assert last[f"eval_{name}"] == pytest.approx(value, rel=1e-4)
    assert scores[BEFORE]["loss"] == pytest.approx(np.log(2), abs=0.2)
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in test]
    assert scores[LONGER] == {"accuracy": np.mean(longer)}
    lines = [line for line in read_metrics(whole) if "accuracy" in line]
    assert lines[-1]["accuracy"] == 1 and lines[-1]["margin"] > lines[0]["margin"]


def test_results_stand_in_the_order_of_the_pairs(inputs):
    """An untrained model is wrong about some; each pair alone must give the same result."""
    model, params = models.from_pretrained(inputs[3], head="classification", num_labels=1)
    pairs = comparisons(preferences(9), tokenizer(None), seq_len=SEQ)
    config = SimpleNamespace(optim=SimpleNamespace(batch_size=4))
    context = SimpleNamespace(data=SimpleNamespace(held_out=pairs), config=config)
    results = RewardModelEvaluation(context)._is_pair_right(
        EvaluatedModel(model, params, model.apply)
    )
    compare = jax.jit(lambda batch: COMPARISONS(model.apply, params, batch))
    alone = [compare(pairs.take(np.array([i]))) for i in range(9)]
    assert results == [float(sums.logs["accuracy"]) == 1 for sums in alone]
    assert 0 < sum(results) < 9


def test_no_prompt_is_on_both_sides(inputs):
    train, test = read_rows(parse(inputs))
    of_train, of_test = ({row["prompt"] for row in rows} for rows in (train, test))
    assert len(train) + len(test) == 70 > len(of_train | of_test)  # some have several pairs
    assert of_test and not of_train & of_test


def test_scores_are_of_the_text_alone(model, capsys):
    """They depend on neither their neighbours nor padding, and a chat of one turn is a text."""
    rng = np.random.default_rng(4)
    prompts = ["".join(rng.choice(list("pqrs"), 2)) for _ in range(45)]
    texts = ["".join(rng.choice(list("abxy"), n % 12)) for n in range(45)]  # one is empty
    together = scored(model, prompts, texts)
    np.testing.assert_array_equal(together, scored(model, prompts, texts))
    alone = [scored(model, [p], [t])[0] for p, t in zip(prompts[:12], texts[:12], strict=True)]
    np.testing.assert_allclose(together[:12], alone, rtol=1e-5, atol=1e-5)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    np.testing.assert_array_equal(together, scored(model, chats, texts))
    assert np.ptp(together) > 1 and not capsys.readouterr().err


def test_long_texts_are_shortened_and_said_to_be_so_once(drawn, capsys):
    model = RewardModel(str(drawn))
    capsys.readouterr()
    short, long = "q" * (SEQ - 3), "p" * 40 + "q" * (SEQ - 3)
    values = scored(model, [short, long], ["abc", "abc"])
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    said = capsys.readouterr().err
    assert f"--reward {drawn} reads at most {SEQ} tokens. The beginnings of 1 of 2 prompts" in said
    scored(model, [long], ["abc"])
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_it_stands_beside_other_rewards(whole, learned):
    prompts, texts = ["pq", "pq", "rs", "rs"], ["abc", "xyz", "cab", "zyx"]
    ids = [tokenizer(None)(text)["input_ids"] for text in texts]
    with closing(
        find_rewards([str(whole), "length"], [1.0, -2.0], columns=[], max_tokens=6)
    ) as rewards:
        assert rewards.names == [whole.name, "length"]
        found = rewards(RewardBatch(prompts, texts, ids, {}, 2))
    values = scored(learned, prompts, texts)
    np.testing.assert_allclose(found.by_name[whole.name], values)
    np.testing.assert_allclose(found.total, values - 2 * 0.5, rtol=1e-6)
    assert (values[[0, 2]] > values[[1, 3]] + 1).all()


@pytest.mark.slow
@thorough  # as test_sft.py does
def test_a_resumed_run_ends_bitwise_where_a_whole_one_does(inputs, tmp_path):
    options = ["--dropout", 0.1, "--eval-every", 4, "--log-every", 1, "--schedule", "constant"]
    for folder, steps in (("whole", [4]), ("half", [2, 4])):
        for n in steps:
            resumed = ["--resume"] if n > steps[0] else []
            run(inputs, tmp_path / folder, "--steps", n, *options, *resumed)
    one, other = (tmp_path / name for name in ("whole", "half"))
    base = models.from_pretrained(inputs[3], head="classification", num_labels=1)[1]
    trees = [lj.load_adapter(folder / "adapter", base) for folder in (one, other)]
    assert_identical(*(lj.split(tree)[0] for tree in trees))
    assert (one / "scores.json").read_bytes() == (other / "scores.json").read_bytes()


@pytest.mark.parity
def test_transformers_scores_as_the_run_does(whole, learned, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    export.main(["--adapter", str(whole), "--output", str(tmp_path / "out"), "--merged"])
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.num_labels == 1
    prompts, texts = ["pq", "rss", "ssp"], ["abcab", "xyz", "c"]
    encoded = tokenizer(None)(
        prompts, texts, return_tensors="pt", padding=True, return_token_type_ids=True
    )
    with torch.no_grad():
        want = theirs(**encoded).logits[:, 0].numpy()
    np.testing.assert_allclose(scored(learned, prompts, texts), want, rtol=1e-4, atol=1e-5)


def test_other_folders_are_no_reward_models(inputs, drawn, tmp_path, capsys):
    def message(spec):
        with pytest.raises(UserError) as caught:
            find_rewards([str(spec)], columns=[], max_tokens=6)
        return str(caught.value)

    assert "neither a folder nor a known reward. Use arithmetic" in message(tmp_path / "none")
    assert "holds no adapter" in message(write_model(tmp_path / "lm"))
    params = models.from_pretrained(inputs[3], head="classification", num_labels=2)[1]
    tree = lj.lorafy(params, [lj.TrainRule(targets=["classifier"])])
    about = {"model": inputs[3], "labels": ["a", "b"]}
    lj.save_adapter(tmp_path / "classes", tree, about=about)
    assert "holds no reward model. Name the folder of a run" in message(tmp_path / "classes")
    with pytest.raises(SystemExit):
        predict.main(["--adapter", str(drawn), "abc"])
    said = capsys.readouterr().err
    assert "has one class, so it is a regression model or a reward model" in said


def test_a_base_that_is_gone(drawn, monkeypatch):
    gone = {"model": "/nowhere", "labels": ["reward"]}
    monkeypatch.setattr(type(find_adapter(str(drawn))), "base_info", gone)
    with pytest.raises(UserError, match="--reward .*: Its base cannot be read. --model /nowhere"):
        RewardModel(str(drawn))
    gone = {"model": "/nowhere", "labels": ["reward"], "tokenizer": "/nowhere/tokens"}
    monkeypatch.setattr(type(find_adapter(str(drawn))), "base_info", gone)
    with pytest.raises(UserError, match="in /nowhere/tokens, .* copy it there, or train the rew"):
        RewardModel(str(drawn))


def test_rows_that_are_no_pairs(inputs, tmp_path, capsys):
    def message(rows, *args):
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        return fails(
            capsys, *inputs[:4], "--seq-len", SEQ, "--dataset", path, "--output", "out", *args
        )

    good = preferences(6)
    assert "line 7 has `prompt`, `chosen`; a row needs `prompt`, `chosen`" in message(
        [*good, {"prompt": "a", "chosen": "b"}]
    )
    assert "line 7: `chosen` and `rejected` are the same. Remove the row" in message(
        [*good, {"prompt": "a", "chosen": "b", "rejected": "b"}]
    )
    assert "line 7: `rejected` is empty" in message(
        [*good, {"prompt": "a", "chosen": "b", "rejected": " "}]
    )
    said = message([*good, {"prompt": "a" * 20, "chosen": "b", "rejected": "c"}], "--rows", 7)
    assert "texts are longer than --seq-len 14. The longest text has 21 tokens" in said
    assert "with --truncate" in said
    same = [{**row, "prompt": "a"} for row in good]
    assert "--test-share 0.2 of the 6 rows cannot be held out: " in message(same)
    other = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "a", "chosen": "b"}])
    assert "test.jsonl, line 1 has `prompt`, `chosen`" in message(good, "--test", other)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--labels pairs", "--labels pairs needs pairs"),
        ("--labels pairs --dataset a.csv --label x", "reads the fields .*Remove --label"),
        ("--labels pairs --dataset a.csv --text x", "Remove --text"),
        ("--labels pairs --dataset a.csv --text-pair x", "Remove --text-pair"),
    ],
)
def test_options_that_make_no_sense(args, message):
    with pytest.raises(UserError, match=message):
        check(parse(args.split()))
