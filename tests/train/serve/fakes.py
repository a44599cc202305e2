"""An engine whose model is one number a tenant, for the tests of routes: exact, quick, in NumPy."""

import json
import os
import queue
import threading
from pathlib import Path

import numpy as np

from tests.train.serve.waiting import until
from train.serve.protocol.encryption import encrypt
from train.serve.protocol.engine import EngineFacts, Status, TenantStatus
from train.serve.protocol.requests import (
    ANYONE,
    AdapterSpec,
    Completion,
    Create,
    Discard,
    DrawnToken,
    Gradient,
    GradientResult,
    Leave,
    Load,
    RequestError,
    SampleResult,
    Save,
    SaveResult,
    Top,
    Update,
    UpdateResult,
)

FACTS = EngineFacts(
    model="tiny/base",
    max_length=64,
    max_rank=32,
    vocab_size=97,
    eos=(1,),
    slots=4,
    sequences=8,
)


def logprobs(tokens, number, temperature=1.0):
    """Log-probabilities that depend on tokens, places and the tenant's number: [n] or [n, k]."""
    tokens = np.asarray(tokens)
    places = np.arange(len(tokens)).reshape(-1, *[1] * (tokens.ndim - 1))
    raw = np.cos(0.37 * tokens + 0.11 * places + number) - 2.0
    return (raw / (temperature or 1.0)).astype(np.float32)


def text(tokens):
    """The text of tokens: a letter each."""
    return "".join(chr(97 + int(token) % 26) for token in tokens)


class Tenant:
    """A number that trains, with a momentum, so that order and repetitions show."""

    def __init__(self, spec, number=0.0, momentum=0.0, steps=0):
        self.spec, self.number, self.momentum, self.steps = spec, number, momentum, steps
        self.gradient = 0.0
        self.losses = []

    def write(self, path, optimizer, recipients=()):
        if path.exists():
            raise RequestError(f"{path} is there already")
        state = {"spec": vars(self.spec), "number": self.number}
        if optimizer:
            state |= {"momentum": self.momentum, "steps": self.steps}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.mkdir(exist_ok=True)
        data = json.dumps(state).encode()
        (partial / "adapter_model.safetensors").write_bytes(data)
        (partial / "adapter_config.json").write_text(json.dumps({"r": self.spec.rank}))
        if recipients:
            encrypt(partial, recipients)
        os.rename(partial, path)
        return SaveResult(sum(one.stat().st_size for one in path.iterdir()))

    @staticmethod
    def read(path, optimizer):
        file = path / "adapter_model.safetensors"
        if not file.exists():
            raise RequestError(f"{path} holds no adapter")
        state = json.loads(file.read_text())
        rest = (state.get("momentum", 0.0), state.get("steps", 0)) if optimizer else ()
        return Tenant(AdapterSpec(**state["spec"]), state["number"], *rest)


class FakeEngine:
    """Executes commands in a thread of its own, or, if `held`, when `step` or `release` says so.

    Attributes:
      executed: (tenant, command) in the order of execution.
      drawn: the samples, in theirs.
      ended: the samples that were ended early.
      clients: whose each tenant is.
    """

    def __init__(self, facts=FACTS, held=False):
        self.facts = facts
        self.tenants, self.snapshots = {}, {}
        self.executed, self.drawn = [], []
        self.clients, self.ended = {}, []
        self._jobs = queue.SimpleQueue()
        self._free = threading.Event()
        if not held:
            self.release()

    def release(self):
        """Executes all, from now on as it comes."""
        if not self._free.is_set():
            self._free.set()
            threading.Thread(target=self._run, daemon=True).start()

    def stop(self):
        """Ends the thread, once what is queued is done."""
        self._jobs.put(None)

    def wait(self):
        """Waits until what is queued now is done; then nothing is, unless that queued more."""
        until(lambda: self._jobs.empty() and self._idle(), "nothing is queued")

    def _idle(self):
        reached = threading.Event()
        self._jobs.put(reached.set)
        return reached.wait() and self._jobs.empty()

    def step(self, count=1):
        """Executes some of what is queued; returns how many there were."""
        for done in range(count):
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return done
            job()
        return count

    def submit(self, tenant, command, done, client=ANYONE):
        self.clients[tenant] = client
        self._jobs.put(lambda: self._finish(lambda: self._execute(tenant, command), done))

    def sample(self, request, done, seen=None):
        cancelled = threading.Event()
        self._jobs.put(lambda: self._finish(lambda: self._draw(request, seen, cancelled), done))

        def end():
            self.ended.append(request)
            cancelled.set()

        return end

    def adopt(self, name, folder, done):
        self._jobs.put(lambda: self._finish(lambda: self._adopt(name, folder), done))

    def drop(self, name):
        self.snapshots.pop(name, None)

    def knows(self, name):
        return name in self.snapshots

    def status(self):
        return Status(
            tenants={
                name: TenantStatus(
                    spec=one.spec,
                    steps=one.steps,
                    losses=one.losses,
                    size=8,
                    queued=0,
                    seconds=0.5,
                    client=self.clients[name],
                )
                for name, one in self.tenants.items()
            },
            adapters=list(self.snapshots),
            waiting=self._jobs.qsize(),
            drawing=0,
            prompt_tokens=sum(len(one.prompt) for one in self.drawn),
            found_tokens=3 * len(self.drawn),
            drawn_tokens=0,
            trained_tokens=0,
            compiled=3,
            base_size=1000,
            prefix_size=100,
        )

    def _run(self):
        while (job := self._jobs.get()) is not None:
            job()

    def _finish(self, work, done):
        try:
            result = work()
        except Exception as error:
            result = error
        done(result)

    def _execute(self, name, command):
        self.executed.append((name, command))
        if isinstance(command, Create):
            self.tenants[name] = Tenant(command.spec)
            return command.spec
        if isinstance(command, Load):
            self.tenants[name] = Tenant.read(command.path, command.optimizer)
            return self.tenants[name].spec
        if name not in self.tenants:
            raise RequestError(f"there is no tenant {name}")
        tenant = self.tenants[name]
        match command:
            case Gradient():
                return self._gradient(tenant, command)
            case Update():
                if command.learning_rate == 666.0:
                    raise ValueError("the device is on fire")
                tenant.momentum = command.beta1 * tenant.momentum + tenant.gradient
                tenant.number -= command.learning_rate * tenant.momentum
                tenant.gradient, tenant.steps = 0.0, tenant.steps + 1
                return UpdateResult({"step:max": float(tenant.steps)})
            case Discard():
                tenant.gradient = 0.0
            case Save():
                saved = tenant.write(command.path, command.optimizer, command.recipients)
                if command.name is not None:
                    self.snapshots[command.name] = tenant.number
                return saved
            case Leave():
                del self.tenants[name]
        return None

    def _gradient(self, tenant, command):
        """The loss is the weighted sum of log-probabilities; its gradient is a like sum."""
        found, loss, slope = [], 0.0, 0.0
        for datum in command.data:
            targets = datum.inputs["target_tokens"]
            weights = datum.inputs.get("weights", datum.inputs.get("advantages"))
            found.append(logprobs(targets, tenant.number))
            loss -= float((weights * found[-1]).sum())
            slope += float((weights * targets).sum()) / 100
        if not command.forward_only:
            tenant.gradient += slope
            tenant.losses = [*tenant.losses, (tenant.steps, loss)]
        return GradientResult(found, {"loss:sum": loss})

    def _adopt(self, name, folder):
        self.snapshots[name] = Tenant.read(Path(folder), False).number

    def _draw(self, request, seen, cancelled):
        self.drawn.append(request)
        if request.adapter is not None and request.adapter not in self.snapshots:
            raise RequestError(f"there is no adapter {request.adapter}")
        number = self.snapshots[request.adapter] if request.adapter else 0.0
        room = self.facts.max_length - len(request.prompt)
        most = room if request.max_tokens is None else request.max_tokens
        completions = [
            self._complete(request, number, index, most, seen, cancelled)
            for index in range(request.n)
        ]
        prompt = logprobs(request.prompt, number)
        prompt[0] = np.nan
        top = self._top(request.top_prompt, prompt) if request.top_prompt else None
        if top is not None:
            top.ids[0], top.logprobs[0] = 0, -99999
        asked = request.targets
        if asked is not None:
            asked = np.where(asked < 0, np.float32(0), logprobs(asked, number))
        return SampleResult(
            completions, prompt if request.prompt_logprobs else None, top, targets=asked
        )

    def _complete(self, request, number, index, most, seen, cancelled):
        tokens, values, stopped = [], [], False
        start = sum(request.prompt) + (request.seed or 0) + 5 * index + round(1000 * number)
        while len(tokens) < most and not stopped and not cancelled.is_set():
            token = (start + 3 * len(tokens)) % self.facts.vocab_size
            tokens.append(token)
            values.append(float(logprobs([token], number, request.temperature)[0]))
            stopped = token in request.stop_ids or any(
                stop in text(tokens) for stop in request.stop
            )
            if seen is not None:
                one = self._top(request.top, values[-1:]) if request.top else None
                top = (one.ids[0], one.logprobs[0]) if one is not None else None
                seen(DrawnToken(index, token, values[-1], top))
        return Completion(
            np.array(tokens, np.int32),
            np.array(values, np.float32),
            stopped,
            self._top(request.top, values) if request.top else None,
        )

    def _top(self, k, values):
        ids = np.tile(np.arange(k, dtype=np.int32), (len(values), 1))
        steps = np.asarray(values, np.float32)[:, None] - np.arange(k, dtype=np.float32)
        return Top(ids, steps)
