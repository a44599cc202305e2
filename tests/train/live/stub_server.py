"""A server of OpenAI's API that says what a test has written, with a model's own log-probabilities.

It loads adapters as vLLM does, holds them or something else, and fails as servers fail.
"""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax import models, peft

EOS, LENGTH = 258, 64  # tokens of a row, padded


class Holder:
    """A model and the adapters that were loaded over it, by name.

    Attributes:
        loaded, unloaded: The names, in order.
    """

    def __init__(self, folder, temperature=1.0, lies=None):
        """Takes the model's folder; `lies(loaded, name)` names the adapter held in its place."""
        self.model, self.params = models.from_pretrained(folder)
        self.adapters, self.loaded, self.unloaded = {}, [], []
        self._trees = {}  # those that were unloaded, too
        self.lies = lies or (lambda loaded, name: name)
        forward, apart = lj.adapt(self.model.apply), temperature

        def logps(params, ids):
            logits = forward({"params": params}, ids[None])[0].astype(jnp.float32) / apart
            return jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), ids[1:, None], -1)[:, 0]

        self._logps, self._lock = jax.jit(logps), threading.Lock()
        self._fresh = None

    def load(self, name, path):
        assert Path(path, "adapter_config.json").exists()
        tree = peft.load(path, self.model, self.params)
        self._fresh = jax.tree.map(jnp.zeros_like, lj.split(tree)[0])
        self.hold(name, tree)
        self.loaded.append(name)

    def hold(self, name, tree):
        self.adapters[name] = self._trees[name] = tree

    def unload(self, name):
        del self.adapters[name]
        self.unloaded.append(name)

    def logps(self, name, prompt, ids):
        """The log-probabilities of ids after a prompt, by what it holds under that name."""
        held = self.lies(self.loaded, name)
        tree = self._trees[held or name]
        if held is None:  # the base
            tree = lj.join(self._fresh, lj.split(tree)[1])
        row = np.zeros(LENGTH, np.int32)
        row[: len(prompt) + len(ids)] = [*prompt, *ids]
        with self._lock:
            found = np.asarray(self._logps(tree, jax.device_put(row)))
        return found[len(prompt) - 1 :][: len(ids)].tolist()


class StubServer:
    """Answers by `holder`, with the completions that `script(name, prompt, n)` returns.

    Attributes:
        holder: The model; None for log-probabilities of -1.
        script: Returns n lists of ids.
        change: Changes an answer before it is sent.
        failures: Answers (status, text) that come first, instead of its own.
        asked: The bodies of requests for completions.
    """

    def __init__(self, holder, script, change=lambda answer: answer):
        self.holder, self.script, self.change = holder, script, change
        self.failures, self.asked, self.paths = [], [], []
        self.routes = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")

    def answer(self, path, body):
        """Status and content of an answer."""
        self.paths.append(path)
        if self.failures and path != "/v1/models":
            return self.failures.pop(0)
        if path == "/v1/models":
            return 200, {"data": [{"id": "base"}]}
        if path in self.routes:
            if "lora_name" not in body:
                return 400, {"error": {"message": "lora_name is missing"}}
            if path.endswith("/load_lora_adapter"):
                self.holder and self.holder.load(body["lora_name"], body["lora_path"])
            else:
                self.holder and self.holder.unload(body["lora_name"])
            return 200, "Success"
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        self.asked.append(body)
        name, prompt = body["model"], body["prompt"]
        if self.holder and name not in self.holder.adapters:
            return 404, {"error": {"message": "no such model"}}
        choices = [self.choice(name, prompt, ids) for ids in self.script(name, prompt, body["n"])]
        return 200, self.change({"choices": choices})

    def choice(self, name, prompt, ids):
        logps = self.holder.logps(name, prompt, ids) if self.holder else [-1.0] * len(ids)
        return {
            "text": "",
            "token_ids": [*map(int, ids)],
            "prompt_token_ids": prompt,
            "logprobs": {"token_logprobs": logps},
            "finish_reason": "stop" if ids[-1] == EOS else "length",
        }

    @contextlib.contextmanager
    def serving(self):
        """The address of the server."""
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply({})

            def do_POST(self):
                n = int(self.headers["Content-Length"])
                self.reply(json.loads(self.rfile.read(n)))

            def reply(self, body):
                try:
                    status, content = stub.answer(self.path, body)
                except Exception as error:  # a fault of the stub's, or of a test's
                    status, content = 418, repr(error)
                text = content if isinstance(content, str) else json.dumps(content)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
