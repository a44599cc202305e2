"""The engine's thread: it owns the arrays, and executes what tenants ask for, in fair turns."""

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.training.layout import Layout
from train.serve.engine.base import Adapter, Base, Factors, Training
from train.serve.engine.drawing import Drawing
from train.serve.engine.pool import Pool
from train.serve.engine.sampler import Job, Sampler
from train.serve.engine.sizes import Sizes
from train.serve.engine.trainer import Trainer
from train.serve.requests import (
    TOP,
    AdapterSpec,
    Command,
    Create,
    Datum,
    Done,
    Facts,
    Gradient,
    Leave,
    Load,
    Outputs,
    Piece,
    RequestError,
    Sample,
    Save,
    Saved,
    Status,
    TenantStatus,
    Update,
    Updated,
)

_LOSSES_KEPT = 200


class _Tenant:
    """An adapter that trains, and what it waits for."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self.queue: deque[tuple[Command, Done]] = deque()
        self.job: Iterator[Any] | None = None
        self.done: Done | None = None
        self.state: Training | None = None
        self.grads: Factors | None = None
        self.summed = [0.0, 0.0]  # the loss and its targets since the last update
        self.losses: deque[tuple[int, float]] = deque(maxlen=_LOSSES_KEPT)

    @property
    def is_waiting(self) -> bool:
        """Whether there is something to do."""
        return self.job is not None or bool(self.queue)

    @property
    def size(self) -> int:
        """The bytes of its arrays."""
        state = self.state
        if state is None:
            return 0
        arrays = jax.tree.leaves((state.first, state.second, self.grads or {}))
        return state.adapter.size + sum(x.nbytes for x in arrays)


class Engine:
    """Trains tenants' adapters and draws samples over one base; see `train.serve.requests.Serving`.

    One thread does all that computes. Training and sampling have equal shares of its time, and so
    have tenants, and adapters that are sampled.
    """

    def __init__(
        self,
        base: Base,
        sizes: Sizes,
        layout: Layout,
        *,
        eos: Sequence[int],
        text_of: Callable[[Sequence[int]], str],
        slots: int,
        chunk: int = 256,
    ) -> None:
        """Makes an engine, which computes once `start` is called.

        Args:
          base: the model.
          sizes: the shapes in which it computes.
          layout: the mesh.
          eos: tokens that end a text.
          text_of: decodes tokens.
          slots: adapters that samples use at once.
          chunk: predictions whose logits are there at a time in training.
        """
        self._base, self._sizes = base, sizes
        self._trainer = Trainer(base, sizes, layout, chunk)
        self._drawing = Drawing(base.model, layout, sizes.chunk)
        self._pool = Pool(base, slots)
        self._sampler = Sampler(base, self._trainer, self._drawing, self._pool, sizes, text_of)
        self.facts = Facts(
            model=base.name,
            max_length=sizes.max_length,
            max_rank=base.max_rank,
            vocab_size=base.model.config.vocab_size,
            eos=tuple(eos),
            slots=slots,
            sequences=sizes.sequences,
        )
        self._tenants: dict[str, _Tenant] = {}
        self._named: dict[str, Adapter] = {}
        self._calls: deque[Callable[[], Any]] = deque()
        self._something = threading.Condition()
        self._stopping = False
        self._seeds = 0
        self._spent = {"training": 0.0, "sampling": 0.0}
        self._trained_tokens = 0
        self._files = ThreadPoolExecutor(1, "files")
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begins to compute."""
        self._thread.start()

    def close(self) -> None:
        """Ends once all that was asked for is done."""
        with self._something:
            self._stopping = True
            self._something.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._files.shutdown()

    def warm_up(self, tell: Callable[[str], None] = lambda text: None) -> None:
        """Compiles what requests will need; before `start`."""
        state = Training.begin(self._base.begin(AdapterSpec(rank=1), 0))
        for length in self._sizes.lengths:
            tell(f"compiling for rows of {length} tokens")
            tokens = np.zeros(length, np.int32)
            datum = Datum(tokens, {"target_tokens": tokens})
            request = Gradient([datum], "cross_entropy")
            (part,) = self._trainer.parts(request)
            grads, *_ = self._trainer.gradient(state.adapter, None, request, part)
            self._trainer.loss(state.adapter, request, part)
        grads = self._trainer.add(grads, grads)
        self._trainer.is_finite(grads)
        self._trainer.update(state, grads, Update())
        tell("compiling what draws tokens")
        self._sampler.warm_up()

    def submit(self, tenant: str, command: Command, done: Done) -> None:
        """Queues a command of a tenant."""

        def queued() -> None:
            if tenant not in self._tenants:
                seconds = min((t.seconds for t in self._tenants.values()), default=0.0)
                self._tenants[tenant] = _Tenant(tenant, seconds)
            mine = self._tenants[tenant]
            if not mine.is_waiting:  # time that it did not want is not saved up
                others = (t.seconds for t in self._tenants.values() if t.is_waiting)
                mine.seconds = max(mine.seconds, min(others, default=0.0))
            mine.queue.append((command, done))

        self._call(queued)

    def sample(
        self, request: Sample, done: Done, seen: Callable[[Piece], None] | None = None
    ) -> Callable[[], None]:
        """Queues a sample; returns what ends it early."""
        job = Job(request, None, request.seed or 0, done, seen)

        def queued() -> None:
            try:
                self._check(request)
                if request.adapter is not None:
                    job.adapter = self._adapter(request.adapter)
            except RequestError as error:
                done(error)
                return
            if request.seed is None:
                self._seeds += 1
                job.seed = self._seeds
            self._sampler.add(job)

        def cancel() -> None:
            job.cancelled = True
            self._call(lambda: None)

        self._call(queued)
        return cancel

    def adopt(self, name: str, folder: Path, done: Done) -> None:
        """Reads an adapter that samples may choose."""

        def adopted() -> None:
            try:
                self._named[name] = self._base.read(folder).adapter
                done(self._named[name].spec)
            except Exception as error:
                done(error)

        self._call(adopted)

    def drop(self, name: str) -> None:
        """Forgets an adapter."""
        self._call(lambda: self._named.pop(name, None))

    def knows(self, name: str) -> bool:
        """Returns whether samples may choose an adapter of this name."""
        return name in self._named

    def status(self) -> Status:
        """Returns what the engine does now."""
        tenants = {
            name: TenantStatus(
                spec=tenant.state.adapter.spec,
                steps=tenant.state.steps,
                losses=tuple(tenant.losses),
                size=tenant.size,
                queued=len(tenant.queue) + (tenant.job is not None),
                seconds=tenant.seconds,
            )
            for name, tenant in [*self._tenants.items()]
            if tenant.state is not None
        }
        return Status(
            tenants=tenants,
            adapters=tuple(self._named),
            waiting=self._sampler.waiting,
            drawing=self._sampler.drawing,
            prompt_tokens=self._sampler.prompt_tokens,
            drawn_tokens=self._sampler.drawn_tokens,
            trained_tokens=self._trained_tokens,
            compiled=self._trainer.compiled + self._drawing.compiled,
            base_size=self._base.size,
        )

    def _call(self, function: Callable[[], Any]) -> None:
        with self._something:
            if self._stopping:
                raise RuntimeError("the engine is closed")
            self._calls.append(function)
            self._something.notify()

    def _work(self) -> None:
        while True:
            with self._something:
                while not (self._calls or self._stopping or self._is_busy()):
                    self._something.wait()
                if self._stopping and not self._calls and not self._is_busy():
                    return
                calls, self._calls = [*self._calls], deque()
            for call in calls:
                call()
            self._turn()

    def _is_busy(self) -> bool:
        return self._sampler.busy or any(t.is_waiting for t in self._tenants.values())

    def _turn(self) -> None:
        """Does a bit of what had the least time so far, of what there is to do."""
        waiting = [tenant for tenant in self._tenants.values() if tenant.is_waiting]
        kinds = ["training"] * bool(waiting) + ["sampling"] * self._sampler.busy
        if not kinds:
            return
        kind = min(kinds, key=self._spent.__getitem__)
        if len(kinds) == 1:  # what no one else wanted is not held against it
            self._spent = dict.fromkeys(self._spent, 0.0)
        began = time.monotonic()
        if kind == "sampling":
            self._sampler.step()
        else:
            self._train(min(waiting, key=lambda tenant: tenant.seconds))
        self._spent[kind] += time.monotonic() - began

    def _train(self, tenant: _Tenant) -> None:
        """Executes a part of a tenant's command: a batch, of a gradient."""
        if tenant.job is None:
            command, tenant.done = tenant.queue.popleft()
            tenant.job = self._executed(tenant, command, tenant.done)
        began = time.monotonic()
        try:
            next(tenant.job)
        except StopIteration:
            tenant.job = None
        except Exception as error:  # it is this command's alone
            tenant.job = None
            assert tenant.done is not None
            tenant.done(error)
        tenant.seconds += time.monotonic() - began

    def _executed(self, tenant: _Tenant, command: Command, done: Done) -> Iterator[None]:
        """Executes a command bit by bit."""
        if isinstance(command, Create):
            spec = command.spec
            seed = spec.seed
            if seed is None:
                seed = int.from_bytes(hashlib.sha256(tenant.name.encode()).digest()[:4], "big")
            tenant.state = Training.begin(self._base.begin(spec, seed))
            done(spec)
        elif isinstance(command, Load):
            tenant.state, tenant.grads = self._base.read(command.path, command.optimizer), None
            done(tenant.state.adapter.spec)
        elif isinstance(command, Leave):
            del self._tenants[tenant.name]
            done(None)
        else:
            state = tenant.state
            if state is None:
                raise RequestError(f"there is no adapter {tenant.name}: create or load it first")
            if isinstance(command, Gradient):
                yield from self._add_gradient(tenant, state, command, done)
            elif isinstance(command, Update):
                self._step(tenant, state, command, done)
            else:
                self._save(state, command, done)
        return
        yield

    def _add_gradient(
        self, tenant: _Tenant, state: Training, request: Gradient, done: Done
    ) -> Iterator[None]:
        parts = self._trainer.parts(request)
        logps: list[Any] = [None] * len(request.data)
        total, grads = 0.0, None
        for part in parts:
            if request.forward_only:
                loss, p = self._trainer.loss(state.adapter, request, part)
            else:
                grads, loss, p = self._trainer.gradient(state.adapter, grads, request, part)
            total += loss
            for row, place in enumerate(part.at):
                targets = request.data[place].inputs["target_tokens"]
                n, k = len(targets), 1 if targets.ndim == 1 else targets.shape[1]
                found = p[row, :n, :k]
                logps[place] = found[:, 0] if targets.ndim == 1 else found
            self._trained_tokens += sum(len(request.data[i].tokens) for i in part.at)
            yield
        finite = np.isfinite(total) and (grads is None or self._trainer.is_finite(grads))
        if not request.forward_only and not finite:
            raise RequestError(
                f"the loss is {total:g}, or its gradient is not finite: nothing was added"
            )
        if grads is not None:
            tenant.grads = self._trainer.add(tenant.grads, grads)
            tenant.summed[0] += total
            tenant.summed[1] += sum(len(datum.tokens) for datum in request.data)
        done(Outputs(logps, {"loss:sum": total}))

    def _step(self, tenant: _Tenant, state: Training, how: Update, done: Done) -> None:
        moved, norm = self._trainer.update(state, tenant.grads, how)
        if not self._trainer.is_finite(moved.adapter.factors):
            tenant.grads = None
            raise RequestError("the update is not finite: the adapter stays as it is")
        tenant.state, tenant.grads = moved, None
        loss, targets = tenant.summed
        tenant.losses.append((moved.steps, loss / max(targets, 1.0)))
        tenant.summed = [0.0, 0.0]
        done(Updated({"grad_norm:max": norm, "step:max": float(moved.steps)}))

    def _save(self, state: Training, command: Save, done: Done) -> None:
        """Names an adapter at once; its files are written while others compute."""
        if command.name is not None:
            self._named[command.name] = state.adapter

        def written() -> None:
            try:
                done(Saved(self._base.write(state, command.path, command.optimizer)))
            except Exception as error:
                done(error)

        self._files.submit(written)

    def _adapter(self, name: str) -> Adapter:
        if name not in self._named:
            there = ", ".join(self._named) or "none"
            raise RequestError(f"there is no adapter {name!r}; there are {there}")
        return self._named[name]

    def _check(self, request: Sample) -> None:
        """Raises a RequestError if a sample makes no sense."""
        n, most = len(request.prompt), self._sizes.max_length
        if not n:
            raise RequestError("the prompt is empty: give one token at least")
        room = n if request.max_tokens == 0 else n + 1
        if room > most:
            raise RequestError(f"the prompt has {n} tokens: {most} with the completion at most")
        if not all(0 <= token < self.facts.vocab_size for token in request.prompt):
            raise RequestError(f"the prompt holds an id outside 0 to {self.facts.vocab_size - 1}")
        if not 1 <= request.n <= 1024:
            raise RequestError(f"{request.n} completions: from 1 to 1024 are possible")
        if request.max_tokens is not None and request.max_tokens < 0:
            raise RequestError(f"max_tokens is {request.max_tokens}: at least 0 is needed")
        if not (request.temperature >= 0 and np.isfinite(request.temperature)):
            raise RequestError(f"the temperature is {request.temperature}: 0 or more is needed")
        if not 0 < request.top_p <= 1:
            raise RequestError(f"top_p is {request.top_p}: above 0 and at most 1")
        if not (request.top_k == -1 or request.top_k >= 1):
            raise RequestError(f"top_k is {request.top_k}: at least 1, or -1 for all")
        for name in ("top", "top_prompt"):
            if not 0 <= getattr(request, name) <= TOP:
                raise RequestError(f"{getattr(request, name)} likeliest tokens: {TOP} at most")
