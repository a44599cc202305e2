"""A chat's earlier turns are found again, over HTTP: counted, in the same bits, by their owner."""

import contextlib
import re

import pytest
from starlette.testclient import TestClient

from lora_jax.training.layout import layout_of_one_device
from tests.train.serve.engine.engines import running, tell, unused
from tests.train.tiny import decoder, tokenizer
from train.serve.app import make_app
from train.serve.engine.base import ServedBase
from train.serve.engine.engine import Engine
from train.serve.engine.sizes import Sizes
from train.serve.protocol.requests import AdapterSpec, Create, Leave, Save
from train.serve.routes.access import Access
from train.serve.routes.openai.table import CHAT

CHUNK = 8
SAID = ("Which rivers", "flow north?", "And south?", "The longest?", "To the sea?")


class Served:
    """A server in this process, of a base and the adapters "first" and "second"."""

    def __init__(self, engine, client):
        self.engine, self.client, self.turns = (
            engine,
            client,
            3 if engine.sizes.max_length == 128 else 5,
        )
        for seed, name in enumerate(("first", "second")):
            self.save(name, seed)

    def save(self, name, seed):
        """Names weights that no others are."""
        tell(self.engine, name, Create(AdapterSpec(rank=2, seed=seed)))
        tell(self.engine, name, Save(unused(), name=name))
        tell(self.engine, name, Leave())

    def ask(self, messages, model="first", key="tml-one"):
        """Returns the answer to a chat, and its numbers of tokens: asked, found, and those run."""
        body = {"model": model, "messages": messages, "max_tokens": 6, "temperature": 0}
        before = self.engine.status().prompt_tokens
        head = {"X-API-Key": key}
        answer = self.client.post(CHAT, json=body | {"logprobs": True}, headers=head)
        assert answer.status_code == 200, answer.text
        usage, (choice,) = answer.json()["usage"], answer.json()["choices"]
        found = usage["prompt_tokens_details"]["cached_tokens"]
        return choice, usage["prompt_tokens"], found, self.engine.status().prompt_tokens - before

    def forget(self):
        self.engine._sampler._runner.store.clear()


@pytest.fixture(scope="module", params=[128, pytest.param(256, marks=pytest.mark.slow)])
def served(request):
    """With caches of one length, or of two."""
    model, params = decoder()
    sizes = Sizes(max_length=request.param, tokens=64, sequences=2, chunk=CHUNK)
    base, made = ServedBase(model, params, "tiny", 2), tokenizer()
    engine = Engine(base, sizes, layout_of_one_device(), eos=[258], text_of=made.decode, slots=2)
    with contextlib.ExitStack() as held:
        held.enter_context(running(engine))
        app = make_app(engine, made, access=Access({"tml-one": "anna", "tml-two": "ben"}))
        yield Served(engine, held.enter_context(TestClient(app, "http://localhost")))


def chat(served, between=lambda: None):
    """Asks turn by turn; returns the answers with their numbers, and the messages."""
    messages, answers = [], []
    for text in SAID[: served.turns]:
        between()
        messages = [*messages, {"role": "user", "content": text}]
        answers.append(served.ask(messages))
        messages.append(answers[-1][0]["message"] | {"tool_calls": None})
    return answers, messages[:-1]


@pytest.mark.slow
def test_the_turns_of_a_chat_are_run_once(served):
    served.forget()
    found, messages = chat(served)
    anew, _ = chat(served, served.forget)
    assert [choice for choice, *_ in found] == [choice for choice, *_ in anew], "the same bits"
    lengths = [n for _, n, *_ in found]
    assert lengths[-1] > 2 * lengths[0] and (lengths[-1] > 128) == (served.turns == 5)
    for before, (_, n, cached, ran) in zip([0, *lengths], found, strict=False):
        assert cached == before - before % CHUNK and ran == n - cached
    assert all((cached, ran) == (0, n) for _, n, cached, ran in anew)
    metrics = served.client.get("/metrics", headers={"X-API-Key": "tml-one"}).text
    (total,) = re.findall(r"^lora_jax_found_tokens_total (\d+)", metrics, re.MULTILINE)
    assert int(total) == sum(cached for *_, cached, _ in found)
    assert int(re.findall(r"^lora_jax_prefix_size (\d+)", metrics, re.MULTILINE)[0]) > 0


@pytest.mark.slow
def test_turns_of_others_are_not_found(served):
    """Neither by times of answers: an owner's prompt takes as long as if nobody had asked it."""
    messages = [{"role": "user", "content": "x" * 50}]
    for seen in (0, 64):
        assert served.ask(messages)[2] == served.ask(messages, key="tml-two")[2] == seen
        assert served.ask(messages, "second")[2] == served.ask(messages, "tiny")[2] == seen
    served.save("first", 5)
    for seen in (0, 64):
        assert served.ask(messages)[2] == seen, "its weights are others"
    assert served.ask(messages, "second")[2] == 64
