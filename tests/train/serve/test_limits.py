"""Fields with vLLM's meaning: what reaches the engine, and how answers are shown."""

import pytest
from starlette.testclient import TestClient

from tests.train.serve.scripted import EOS, TOKENIZER, ScriptedEngine, ids, logprob
from tests.train.tiny import CHATML, SPECIAL, tokenizer
from train.serve.app import make_app
from train.serve.protocol.limits import Penalties
from train.serve.routes.openai.table import CHAT, COMPLETIONS

SAID = f"Ab{SPECIAL[0]}c STOP d"
TURNS = [{"role": "user", "content": "hi"}]
ENGINE = ScriptedEngine(lambda sample, index: ids(SAID))


@pytest.fixture(scope="module")
def post():
    """Posts a body; returns the answer."""
    with TestClient(make_app(ENGINE, tokenizer()), "http://localhost") as client:

        def sent(path=CHAT, status=200, **fields):
            usual = {CHAT: {"messages": TURNS}, COMPLETIONS: {"prompt": "hello", "max_tokens": 99}}
            answer = client.post(path, json={"model": "tiny/base", **usual.get(path, {}), **fields})
            assert answer.status_code == status, answer.text
            return answer.json()

        yield sent


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_limits_reach_the_engine(post, path):
    post(path)
    assert not ENGINE.drawn[-1].is_adjusted
    fields = {"presence_penalty": -0.5, "frequency_penalty": 2, "repetition_penalty": 1.25}
    post(
        path,
        **fields,
        min_p=0.25,
        min_tokens=4,
        logit_bias={"7": 10**400, "9": -1.5},
        allowed_token_ids=[5, 9, 5],
        bad_words=["b", " cd"],
        stop_token_ids=[11],
        ignore_eos=True,
    )
    sample = ENGINE.drawn[-1]
    assert sample.is_adjusted and sample.min_p == 0.25
    assert sample.penalties == Penalties(repetition=1.25, frequency=2.0, presence=-0.5)
    limits = sample.limits
    assert limits.biases == {7: 100.0, 9: -1.5} and limits.allowed == (5, 9)
    assert limits.min_tokens == 4 and limits.ends == {11, EOS} and sample.stop_ids == {11}
    # Of a tokenizer of bytes, a word within a text has one more: it is not banned apart.
    assert limits.bad == tuple(tuple(ids(word, end=False)) for word in ("b", "cd"))


def test_how_answers_are_shown(post):
    def text(**fields):
        (choice,) = post(COMPLETIONS, **fields)["choices"]
        return choice["text"]

    assert text() == "Abc STOP d"
    assert text(skip_special_tokens=False) == SAID
    assert text(stop="STOP") == "Abc "
    assert text(stop=["zz", "STOP"], include_stop_str_in_output=True) == "Abc STOP"
    kept = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    assert text(stop_token_ids=ids("c", end=False), **kept) == f"Ab{SPECIAL[0]}c"
    assert text(stop_token_ids=ids("c", end=False)) == "Ab"
    assert text(**kept) == SAID + SPECIAL[2]
    assert text(stop=["b", "d"], min_tokens=3) == "Abc STOP "


def test_prompts_are_cut_at_their_beginning(post):
    post(COMPLETIONS, prompt="0123456789", truncate_prompt_tokens=4)
    assert TOKENIZER.decode(ENGINE.drawn[-1].prompt) == "6789"
    post(COMPLETIONS, prompt="x" * 10_000_000, truncate_prompt_tokens=-1, max_tokens=100)
    assert len(ENGINE.drawn[-1].prompt) == 300
    post(COMPLETIONS, prompt=[[1, 2, 3], [4]], truncate_prompt_tokens=2)
    assert sorted(sample.prompt for sample in ENGINE.drawn[-2:]) == [[2, 3], [4]]
    post(truncate_prompt_tokens=11)
    assert TOKENIZER.decode(ENGINE.drawn[-1].prompt) == "\n<|im_start|>assistant\n"[-22:]


def test_prompts_are_scored(post):
    prompt = ids("abc", end=False)
    (choice,) = post(COMPLETIONS, prompt="abc", prompt_logprobs=2)["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None and len(rest) == 2
    for token, place in zip(prompt[1:], rest, strict=True):
        own, other = place[str(token)], place[str(token + 1)]
        assert abs(own["logprob"] - logprob(token)) < 1e-6 and own["rank"] == 1
        assert own["decoded_token"] == TOKENIZER.decode([token]) and other["rank"] == 2
    whole = post(prompt_logprobs=0)
    assert whole["prompt_logprobs"][0] is None and "prompt_logprobs" not in whole["choices"][0]
    assert all(len(place) == 1 for place in whole["prompt_logprobs"][1:])
    both = post(COMPLETIONS, prompt="abc", prompt_logprobs=2, echo=True, logprobs=1)["choices"][0]
    assert [len(x) for x in both["logprobs"]["top_logprobs"][1:3]] == [1, 1]
    assert "come whole" in post(status=400, prompt_logprobs=1, stream=True)["error"]["message"]


def test_a_template_of_a_request_is_for_servers_that_trust_it(post):
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert "--trust-request" in post(status=400, chat_template=template)["error"]["message"]
    app = make_app(ENGINE, tokenizer(), trusts_templates=True)
    body = {"model": "tiny/base", "messages": TURNS, "chat_template": template}
    with TestClient(app, "http://localhost") as client:
        assert client.post(CHAT, json=body).status_code == 200
        assert TOKENIZER.decode(ENGINE.drawn[-1].prompt) == "<hi>"
        wrong = client.post(CHAT, json=body | {"chat_template": "{% if %}"})
        assert wrong.status_code == 400 and "template" in wrong.text


def test_texts_become_tokens_and_texts_again(post):
    told = post("/tokenize", prompt="é!", return_token_strs=True)
    tokens = ids("é!", end=False)
    assert told["tokens"] == tokens and told["count"] == 3 and told["max_model_len"] == 400
    assert len(told["token_strs"]) == 3
    assert post("/detokenize", tokens=tokens + [EOS]) == {"prompt": f"é!{SPECIAL[2]}"}
    chat = post("/tokenize", messages=TURNS)
    assert TOKENIZER.decode(chat["tokens"]) == TOKENIZER.apply_chat_template(
        TURNS, tokenize=False, add_generation_prompt=True, chat_template=CHATML
    )
    assert "`messages`" in post("/tokenize", status=400)["error"]["message"]
    assert "tokens" in post("/detokenize", status=400, tokens=[999])["error"]["message"]
    assert post("/tokenize", status=404, model="nobody", prompt="x")["error"]["code"]


def test_the_server_says_by_vllms_name_whether_it_is_ready():
    with TestClient(make_app(ENGINE, tokenizer()), "http://localhost") as client:
        assert client.get("/health").json() == {"status": "ok"}
