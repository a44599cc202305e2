"""An engine that says what a test has written, a byte a token, and a server around it."""

import contextlib
import socket
import threading

import numpy as np
import uvicorn

from tests.train.tiny import tokenizer
from train.serve.app import make_app
from train.serve.protocol.engine import EngineFacts, Status, TenantStatus
from train.serve.protocol.requests import (
    AdapterSpec,
    Client,
    Completion,
    DrawnToken,
    RequestError,
    SampleResult,
    Top,
)
from train.serve.routes.openai.text import ServedTokenizer

EOS = 258
FACTS = EngineFacts(
    model="tiny/base",
    max_length=400,
    max_rank=32,
    vocab_size=259,
    eos=(EOS,),
    slots=4,
    sequences=8,
)


class ScriptedEngine:
    """Draws the tokens of `script(sample, index)`, each after `wait()`, in a thread a sample.

    Attributes:
      drawn: the samples.
      ended: those that were ended early.
      adapters: folders by name.
    """

    facts = FACTS

    def __init__(self, script, wait=lambda: None):
        self.script, self.wait = script, wait
        self.drawn, self.ended, self.adapters = [], [], {}
        self.tenants, self.dropped = {}, []

    def sample(self, request, done, seen=None):
        cancelled = threading.Event()
        self.drawn.append(request)
        work = threading.Thread(target=self._draw, args=(request, done, seen, cancelled))
        work.daemon = True
        work.start()

        def cancel():
            self.ended.append(request)
            cancelled.set()

        return cancel

    def _draw(self, request, done, seen, cancelled):
        if request.adapter is not None and request.adapter not in self.adapters:
            return done(RequestError(f"there is no adapter {request.adapter}"))
        room = self.facts.max_length - len(request.prompt)
        most = room if request.max_tokens is None else request.max_tokens
        scripts = [self.script(request, i) for i in range(request.n)]
        if any(isinstance(one, Exception) for one in scripts):
            return done(scripts[0])
        completions = []
        for index, script in enumerate(scripts):
            tokens, stopped, data = [], False, b""
            for token in script[:most]:
                self.wait()
                if cancelled.is_set():
                    break
                tokens.append(token)
                data += bytes_of(token) if len(tokens) > request.limits.min_tokens else b""
                stopped = token in request.stop_ids or any(s.encode() in data for s in request.stop)
                if seen is not None:
                    ids, values = likely([token], request.top)
                    top = (ids[0], values[0]) if request.top else None
                    seen(DrawnToken(index, token, logprob(token), top))
                if stopped:
                    break
            values = np.array([logprob(token) for token in tokens], np.float32)
            top = Top(*likely(tokens, request.top)) if request.top else None
            completions.append(Completion(np.array(tokens, np.int32), values, stopped, top))
        scored = np.array([np.nan, *map(logprob, request.prompt[1:])], np.float32)
        top = Top(*likely(request.prompt, request.top_prompt)) if request.top_prompt else None
        return done(
            SampleResult(completions, scored if request.prompt_logprobs else None, top, cached=3)
        )

    def adopt(self, name, folder, done):
        found = (folder / "adapter_config.json").exists()
        if found:
            self.adapters[name] = folder
        done(None if found else RequestError(f"{folder.name} holds no adapter"))

    def drop(self, name):
        self.dropped.append(name)
        del self.adapters[name]

    def knows(self, name):
        return name in self.adapters

    def status(self):
        numbers = {"waiting": 5, "drawing": len(self.drawn)}
        counts = {"prompt_tokens": 11, "drawn_tokens": 13, "trained_tokens": 17, "compiled": 19}
        numbers |= {"found_tokens": 37, "base_size": 23, "prefix_size": 41}
        return Status(tenants=self.tenants, adapters=[*self.adapters], **numbers, **counts)


def tenant(steps=2):
    """A tenant with a loss that fell, and one that is not finite."""
    losses = [(0, 3.5), (1, float("nan")), (2, 1.25)]
    spec, rest = AdapterSpec(rank=6), {"size": 29, "queued": 31, "seconds": 0.5}
    who = {"client": Client("anna", "one"), "used": 5.0, "parked": True}
    return TenantStatus(spec=spec, steps=steps, losses=losses, **rest, **who)


def logprob(token):
    return -0.01 * (token + 1)


def likely(tokens, k):
    """The ids after each token, and their log-probabilities: [n, k] each."""
    ids = (np.asarray(tokens, np.int32)[:, None] + np.arange(k, dtype=np.int32)) % 256
    return ids, -0.01 * (ids + 1).astype(np.float32)


TOKENIZER = tokenizer()
TOKENS = ServedTokenizer(TOKENIZER)


def bytes_of(token):
    return TOKENS.of(token)


def ids(text, end=True):
    """The tokens of a text, and the one that ends it."""
    return TOKENIZER(text, add_special_tokens=False)["input_ids"] + [EOS] * end


@contextlib.contextmanager
def serving(engine, **options):
    """The address of a server in a thread."""
    app = make_app(engine, options.pop("tokenizer", TOKENIZER), **options)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
