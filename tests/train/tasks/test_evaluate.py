"""Answers in batches equal answers one by one, and scores outlive an interruption."""

import json

import numpy as np
import pytest

from lora_jax import models
from lora_jax.models.sampling.prompts import pad_left
from tests.support import over
from tests.train.tiny import decoder, tokenizer
from train.run.complete import answer_prompts, tokenize_chats
from train.run.pretrained import ModelInfo
from train.run.task import EvaluatedModel
from train.tasks.sql import question_scores
from train.tasks.sql_scores import (
    ADAPTED,
    FEW_SHOT,
    UNSEEN_BOTH,
    UNSEEN_SCHEMAS,
    ZERO_SHOT,
    SqlScores,
    draw_questions,
)

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def outline():
    model, params = decoder()
    return ModelInfo("tiny", tokenizer(), model.config, params)


def alone(outline, chat, new_tokens):
    """The answer to one chat, without padding, batching or a shared beginning."""
    model, params = decoder()
    ids = np.array(tokenize_chats(outline, [chat]))
    new = models.generate(model, params, ids, max_new_tokens=new_tokens)
    return outline.tokenizer.decode(np.asarray(new)[0].tolist(), skip_special_tokens=True).strip()


@pytest.mark.slow
@over("system", [[SYSTEM], []], often=["said"], called=lambda system: "said" if system else "none")
def test_a_batch_with_a_shared_beginning_answers_as_each_chat_alone(outline, system):
    model, params = decoder()
    questions = ["one", "another, longer one", "one"]
    chats = [[*system, {"role": "user", "content": text}] for text in questions]
    evaluated = EvaluatedModel(model, params, model.apply)
    texts = answer_prompts(evaluated, outline, tokenize_chats(outline, chats), new_tokens=6)
    assert texts == [alone(outline, chat, 6) for chat in chats]
    assert texts[0] != texts[1]


def test_more_chats_than_a_batch_keep_their_order(outline, monkeypatch):
    """The model repeats its prompt, so that the order of its answers shows."""
    batches = []

    def generate(model, params, ids, mask, **_):
        batches.append(ids.shape)  # padded at the left
        return np.stack([np.roll(row, n) for row, n in zip(ids, mask.sum(1), strict=True)])

    monkeypatch.setattr("train.run.complete._MAX_BATCH_ROWS", 2)
    monkeypatch.setattr("train.run.complete.generate", generate)
    monkeypatch.setattr("train.run.complete.share", lambda *_, **__: None)
    model, params = decoder()
    asked = ["b", "cc", "d", "ee", "f"]
    chats = [[{"role": "user", "content": text}] for text in asked]
    evaluated = EvaluatedModel(model, params, model.apply)
    texts = answer_prompts(evaluated, outline, tokenize_chats(outline, chats), new_tokens=4)
    assert [text.split("\n")[0] for text in texts] == asked
    assert len(batches) == 3 and len({*batches}) == 1


def test_prompts_are_padded_at_the_left():
    ids, mask = pad_left([[1, 2], [3]], 3, pad=9)
    assert ids.tolist() == [[9, 1, 2], [9, 9, 3]]
    assert mask.tolist() == [[0, 1, 1], [0, 0, 1]]


@pytest.fixture
def scores():
    """Two questions of each kind; the base knows nothing, the fine-tuned model all but one."""
    scores = SqlScores(draw_questions(2))
    gold = {kind: [e.sql for e in examples] for kind, examples in scores.questions.items()}
    scores.answers[ZERO_SHOT] = {kind: ["no", "idea"] for kind in gold}
    scores.answers[FEW_SHOT] = {kind: ["SELECT 1", "[x]"] for kind in gold}
    scores.answers[ADAPTED] = {**gold, UNSEEN_BOTH: [gold[UNSEEN_BOTH][0], ""]}
    return scores


def test_accuracy_is_by_kind_of_question_and_way_to_answer(scores):
    assert scores.accuracies() == {
        UNSEEN_SCHEMAS: {ZERO_SHOT: 0, FEW_SHOT: 0, ADAPTED: 1},
        UNSEEN_BOTH: {ZERO_SHOT: 0, FEW_SHOT: 0, ADAPTED: 0.5},
    }
    assert question_scores(json.loads(json.dumps(scores.as_json()))) == [1, 1, 1, 0]
    assert question_scores({"accuracy": {}}) == []
    marks = [(row["before"][0], row["after"][0]) for row in scores.examples(4)]
    assert marks == [("✗", "✓"), ("✗", "✓"), ("✗", "✓"), ("✗", "✗")]


def test_the_base_is_asked_once(scores):
    again = SqlScores(scores.questions)
    assert again.reuse_base_scores(scores.as_json())
    assert again.answers == {way: scores.answers[way] for way in (ZERO_SHOT, FEW_SHOT)}
    assert not SqlScores(draw_questions(1)).reuse_base_scores(scores.as_json())
    assert not SqlScores(scores.questions).reuse_base_scores({})
