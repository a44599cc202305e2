"""Pairs for a reward model: their tokens by hand, and the loss against NumPy and TRL."""

import collections
import json
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

import lora_jax as lj
from lora_jax import training
from lora_jax.training import losses
from lora_jax.training.data.batches import Examples
from lora_jax.training.data.comparisons import encode
from tests.support import assert_close
from tests.train.tiny import tokenizer
from train.data.preview import lengths, preview_rows

RNG = np.random.default_rng(11)
PAIRS, SEQ = 7, 5
SCORES = RNG.normal(0, 3, (PAIRS, 2)).astype(np.float32)
SCORES[2] = SCORES[2, 0]  # a tie, which is not right
COUNTED = np.arange(PAIRS) != 4


def batch():
    """Texts whose first token is the index of their score."""
    ids = np.zeros((PAIRS, 2, SEQ), np.int32)
    ids[..., 0] = np.arange(2 * PAIRS).reshape(PAIRS, 2)
    ones = np.ones_like(ids)
    return {
        "ids": ids,
        "attention_mask": ones,
        "token_type_ids": ones,
        "labels": np.zeros(PAIRS, np.int32),
        "weights": COUNTED.astype(np.int32),
    }


def looked_up(variables, ids, *, attention_mask, token_type_ids):
    assert ids.shape == attention_mask.shape == token_type_ids.shape == (2 * PAIRS, SEQ)
    return variables["params"][ids[:, 0]][:, None]


def ours(scores):
    sums = losses.COMPARISONS(looked_up, scores, batch())
    return sums.total / sums.count, sums


def test_the_loss_and_its_gradient_in_numpy():
    (got, sums), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(SCORES.ravel()))
    margin = np.where(COUNTED, SCORES[:, 0] - SCORES[:, 1], 0).astype(np.float64)
    n = COUNTED.sum()
    assert_close(got, np.float32(np.log1p(np.exp(-margin))[COUNTED].sum() / n), 1e-6)
    slope = np.where(COUNTED, -1 / (1 + np.exp(margin)), 0) / n
    assert_close(gradient, np.stack([slope, -slope], 1).ravel().astype(np.float32), 1e-6)
    assert float(sums.count) == n == 6
    assert float(sums.logs["accuracy"]) == (margin > 0).sum()
    assert float(sums.logs["margin"]) == pytest.approx(margin.sum(), rel=1e-5)


@pytest.mark.parity
def test_the_loss_and_its_gradient_in_trl():
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.reward_trainer import RewardTrainer

    kept = SCORES[COUNTED]
    theirs = torch.tensor(kept.T.ravel(), requires_grad=True)  # the chosen ones, then the others
    settings = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(center_rewards_coefficient=None),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
    )
    outputs = SimpleNamespace(logits=theirs[:, None])
    want = RewardTrainer.compute_loss(settings, lambda **_: outputs, {})
    want.backward()
    (got, sums), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(SCORES.ravel()))
    assert_close(got, np.float32(want.item()), 1e-6)
    assert_close(gradient.reshape(PAIRS, 2)[COUNTED].T.ravel(), theirs.grad.numpy(), 1e-6)
    logged = settings._metrics["eval"]
    for name in ("accuracy", "margin"):
        assert float(sums.logs[name] / sums.count) == pytest.approx(logged[name][0], rel=1e-5)


def test_a_mesh_keeps_pairs_together():
    """The only values that devices exchange are sums."""
    layout = training.Layout(training.make_mesh(data=2, tensor=2), ())
    rows = {name: np.concatenate([array, array[:1]]) for name, array in batch().items()}  # 8
    placed = layout.batch(rows, parts=False)

    def forward(variables, ids, **_):
        return variables["params"][ids[:, 0]][:, None]

    run = jax.jit(lambda scores, batch: losses.COMPARISONS(forward, scores, batch))
    scores = jnp.asarray(SCORES.ravel())
    compiled = run.lower(scores, placed).compile()
    assert "all-reduce" in compiled.as_text()
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in compiled.as_text()
    assert_close(compiled(scores, placed).total, run(scores, rows).total, 1e-6)


def with_specials():
    """The tokenizer of bytes, with tokens around a pair of texts as BERT has them."""
    made = tokenizer(None)
    a, b = "<|im_start|>", "<|im_end|>"
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{a} $A {b}",
        pair=f"{a} $A {b} $B:1 {b}:1",
        special_tokens=[(name, made.convert_tokens_to_ids(name)) for name in (a, b)],
    )
    return made


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


CALL = {"function": {"name": "f", "arguments": {"x": 1}}}
ROWS = [
    {"prompt": "Why?", "chosen": "So.", "rejected": "No idea"},
    {"prompt": [user("Why?")], "chosen": [assistant("So.")], "rejected": "No idea"},
    {"chosen": "Why? So.", "rejected": "Why? No"},
    {
        "prompt": [{"role": "system", "content": "Be"}, user("Hm")],
        "chosen": [assistant(None, tool_calls=[CALL]), {"role": "tool", "content": 3},
                   assistant("é")],
        "rejected": [assistant("x", tool_calls=[CALL])],
    },
]  # fmt: skip
TEXTS = [
    ("Why?", "So.", "No idea"),
    ("Why?", "So.", "No idea"),
    ("Why?", " So.", " No"),
    (
        "system: Be\nuser: Hm",
        f"assistant: {json.dumps({'content': None, 'tool_calls': [CALL]})}\n"
        f"tool: {json.dumps({'content': 3})}\nassistant: é",
        json.dumps({"content": "x", "tool_calls": [CALL]}),
    ),
]


def test_the_texts_of_pairs():
    made = with_specials()
    found = training.comparisons(ROWS, made, seq_len=400)
    assert isinstance(found, Examples) and found.ids.shape[:2] == (len(ROWS), 2)
    for row, (prompt, *both) in enumerate(TEXTS):
        for side, text in enumerate(both):
            there = found.attention_mask[row, side] > 0
            first, second = (
                made(one, add_special_tokens=False)["input_ids"] for one in (prompt, text)
            )
            start, end = made.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
            assert found.ids[row, side][there].tolist() == [start, *first, end, *second, end]
            types = found.token_type_ids[row, side]
            assert types[there].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
            assert there[: there.sum()].all() and not types[~there].any()
    sizes = (found.attention_mask > 0).sum(-1)
    assert lengths(found).tolist() == sizes.ravel().tolist()
    one, other = preview_rows(found, made, 2)
    assert one.title == "pair 1, chosen: 10 tokens" and other.title.startswith("pair 1, rejected")
    assert "So." in one.spans[0].text and "No idea" in other.spans[0].text


def test_batches_are_cut_to_the_longest_text_of_their_pairs():
    rows = [{"prompt": "p", "chosen": "c" * n, "rejected": "r" * (9 - n)} for n in (1, 2, 3, 4)]
    rows += [{"prompt": "p", "chosen": "c", "rejected": "r" * 30}]
    found = training.comparisons(rows * 300, tokenizer(None))
    assert found.lengths == (8, 16, 32) and found.take(np.arange(1, 4))["ids"].shape == (3, 2, 8)
    short, mixed = found.take(np.array([[0, 1], [2, 8]])), found.take(np.array([3, 4]))
    assert short["ids"].shape == (2, 2, 2, 16) and mixed["ids"].shape == (2, 2, 32)
    assert mixed["labels"].shape == (2,)
    np.testing.assert_array_equal(mixed["ids"][0, 0], found.ids[3, 0])
    assert found.tokens(mixed) == (1 + 4 + 1 + 5) + (1 + 1 + 1 + 30)


@pytest.mark.parametrize("most", [4, 9, 14, 20, 99])
def test_long_texts_lose_the_prompts_beginning_first(most):
    made, texts = with_specials(), [("abcdefghij", "123456"), ("ab", "12345678901"), ("", "1")]
    found, n = encode(texts, made, most)
    start, end = made.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    for (prompt, completion), ids, types in zip(texts, *found.values(), strict=True):
        while len(prompt) + len(completion) + 3 > most and prompt:
            prompt = prompt[1:]
        completion = completion[: most - 3]
        one, other = (made(x, add_special_tokens=False)["input_ids"] for x in (prompt, completion))
        assert ids == [start, *one, end, *other, end]
        assert types == [0] * (len(one) + 2) + [1] * (len(other) + 1)
    assert n == sum(len(a) + len(b) + 3 > most for a, b in texts)


def test_texts_that_are_too_long():
    rows = [*ROWS[:1], {"prompt": "p" * 30, "chosen": "c", "rejected": "r" * 9}]
    with pytest.raises(
        training.TrainingError, match="2 of 4 texts are longer than seq_len=20. The"
    ):
        training.comparisons(rows, tokenizer(None), seq_len=20)
    found = training.comparisons(rows, tokenizer(None), seq_len=20, truncate=True)
    text = tokenizer(None).decode(found.ids[1, 1][found.attention_mask[1, 1] > 0])
    assert text == "p" * 11 + "r" * 9
    with pytest.raises(training.TrainingError, match="rows, row 1 has .*surrogate"):
        bad = {"prompt": "p\ud800", "chosen": "c", "rejected": "r"}
        training.comparisons([bad], tokenizer(None))


def test_the_librarys_own_training_takes_pairs():
    examples = training.comparisons(ROWS[:2] * 4, tokenizer(None), seq_len=16)

    def model(variables, ids, *, attention_mask, token_type_ids, dropout_key=None):
        rows = variables["params"]["table"]["kernel"][ids] * attention_mask[..., None]
        return rows.sum(1)

    params = {"table": {"kernel": jnp.zeros((259, 1))}}
    rules = [lj.TrainRule(targets=["table"])]
    _, report = training.finetune(
        model, params, examples, rules, lr=0.1, steps=20, batch_size=4, held_out=examples,
        log=None, log_every=1, warmup=1,
    )  # fmt: skip
    assert (
        report.metrics[0]["loss"] == pytest.approx(np.log(2)) and not report.metrics[0]["accuracy"]
    )
    assert report.held_out["accuracy"] == 1 and report.held_out["margin"] > 1
