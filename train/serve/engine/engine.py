"""The engine's thread owns the arrays, and executes the commands of tenants in fair turns."""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeVar

from lora_jax.training.layout import Layout
from train.serve.engine.adapter import TrainingState
from train.serve.engine.base import ServedBase
from train.serve.engine.commands import CommandRunner, EngineTenant, deliver_result
from train.serve.engine.jobs import SampleJob
from train.serve.engine.pool import AdapterPool
from train.serve.engine.programs import SamplingPrograms
from train.serve.engine.sampler import Sampler
from train.serve.engine.sizes import Sizes
from train.serve.engine.trainer import Trainer
from train.serve.engine.turns import TurnPath, levels, parties
from train.serve.protocol import requests
from train.serve.protocol.engine import EngineFacts, Status, TenantStatus, check_sample

T = TypeVar("T")
_logger = logging.getLogger(__name__)


class Engine:
    """Trains tenants' adapters and draws samples over one base; see `EngineProtocol`.

    One thread does all that computes. Training and sampling have equal shares of its time; owners
    take turns, and an owner's sessions, whose tenants have equal shares. Between two tokens of
    somebody, all others train one batch each at most.

    Attributes:
      facts: the model, and the limits of requests.
      sizes: the shapes in which it computes.
    """

    def __init__(
        self,
        base: ServedBase,
        sizes: Sizes,
        layout: Layout,
        *,
        eos: Sequence[int],
        text_of: Callable[[Sequence[int]], str],
        slots: int,
        tenants: int = 64,
        chunk: int = 256,
    ) -> None:
        """Creates an engine, which computes after `start` is called.

        Args:
          base: the model.
          sizes: the shapes in which it computes.
          layout: the mesh.
          eos: tokens that end a text.
          text_of: decodes tokens.
          slots: adapters that samples use at once.
          tenants: adapters that train at once.
          chunk: predictions whose logits are there at a time in training.
        """
        self._base = base
        self.sizes = sizes
        self._max_tenants = tenants
        self._trainer = Trainer(base, sizes, layout, chunk)
        self._programs = SamplingPrograms(base.model, layout, sizes.chunk)
        self._pool = AdapterPool(base, slots)
        self._sampler = Sampler(base, self._trainer, self._programs, self._pool, sizes, text_of)
        self.facts = EngineFacts(
            model=base.name,
            max_length=sizes.max_length,
            max_rank=base.max_rank,
            vocab_size=base.model.config.vocab_size,
            eos=tuple(eos),
            slots=slots,
            sequences=sizes.sequences,
        )
        self._tenants: dict[str, EngineTenant] = {}
        self._commands = CommandRunner(base, self._trainer, 2 * slots, self._check_room)
        self._adapters = self._commands.adapters
        self._calls: deque[Callable[[], object]] = deque()
        self._has_news = threading.Condition()  # a call, or the end
        self._stopping = False
        # Seconds of training, of owners, sessions and tenants: who has had the least is next.
        self._train_seconds: dict[TurnPath, float] = {}
        self._trained_parties: set[TurnPath] = set()  # since the sampler's latest round
        self._trained_round = 0
        self._seconds_of_kind = {"training": 0.0, "sampling": 0.0}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the engine's thread."""
        self._thread.start()

    def close(self) -> None:
        """Stops the engine after its pending work, and refuses new requests."""
        with self._has_news:
            self._stopping = True
            self._has_news.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._commands.close()

    def warm_up(self, report: Callable[[int, int], object] = lambda done, steps: None) -> None:
        """Compiles the programs that requests will need; call it before `start`.

        Args:
          report: is told how many steps are done, and how many there are.
        """
        state = TrainingState.begin(self._base.begin(requests.AdapterSpec(rank=1), 0))
        steps = self._trainer.steps + self._sampler.steps
        report(0, steps)
        for n_done, _ in enumerate(
            chain(self._trainer.warm_up(state), self._sampler.warm_up()), start=1
        ):
            report(n_done, steps)

    def submit(
        self,
        tenant: str,
        command: requests.Command,
        done: requests.Done,
        client: requests.Client = requests.ANYONE,
    ) -> None:
        """Queues a command of a tenant."""

        def queue_command() -> None:
            engine_tenant = self._tenants.setdefault(tenant, EngineTenant(tenant, client))
            if not engine_tenant.is_waiting:
                self._enqueue_tenant(engine_tenant.path)
            engine_tenant.queue.append((command, _log_errors_of(done)))

        self._call(queue_command)

    def sample(
        self,
        request: requests.SampleRequest,
        done: requests.SampleDone,
        on_token: Callable[[requests.DrawnToken], None] | None = None,
    ) -> Callable[[], None]:
        """Queues a sample, and returns a function that ends the sample early."""
        seed = secrets.randbits(32) if request.seed is None else request.seed
        job = SampleJob(
            request=request,
            adapter=None,
            seed=seed,
            done=_log_errors_of(done),
            on_token=None if on_token is None else _log_errors_of(on_token),
        )

        def queue_sample() -> None:
            """Checks the sample, and queues it with its adapter's present arrays."""
            try:
                check_sample(request, self.facts)
                if request.adapter is not None:
                    adapter = self._adapters.find(request.adapter)
                    active_start = adapter.find_active_start(request.prompt)
                    if active_start is not None:  # else the base alone answers
                        job.adapter = adapter
                        job.active_start = active_start
                self._sampler.add(job)
            except Exception as error:
                job.done(error)

        def end_early() -> None:
            self._call(lambda: self._sampler.end(job), even_if_closed=True)

        self._call(queue_sample)
        return end_early

    def adopt(self, name: str, folder: Path, done: requests.Done) -> None:
        """Reads an adapter from a folder, so that samples may choose it."""

        def read_adapter() -> requests.AdapterSpec:
            adapter = self._base.read_state(folder).adapter
            self._adapters.add(name, None, adapter)
            return adapter.spec

        self._call(lambda: deliver_result(read_adapter, _log_errors_of(done)))

    def drop(self, name: str) -> None:
        """Removes an adapter, so that samples can no longer choose it."""
        self._call(lambda: self._adapters.drop(name))

    def knows(self, name: str) -> bool:
        """Returns True if samples may choose an adapter of this name."""
        return name in self._adapters

    def status(self) -> Status:
        """Returns the state of the engine."""
        tenants: dict[str, TenantStatus] = {}
        for name, tenant in self._tenants.copy().items():
            state = tenant.state
            if state is not None:
                tenants[name] = TenantStatus(
                    spec=state.adapter.spec,
                    steps=state.steps,
                    losses=tuple(tenant.losses),
                    size=tenant.size,
                    queued=len(tenant.queue) + (tenant.job is not None),
                    seconds=tenant.seconds,
                    client=tenant.client,
                )
        return Status(
            tenants=tenants,
            adapters=tuple(self._adapters),
            waiting=self._sampler.waiting,
            drawing=self._sampler.drawing,
            prompt_tokens=self._sampler.prompt_tokens,
            found_tokens=self._sampler.found_tokens,
            drawn_tokens=self._sampler.drawn_tokens,
            trained_tokens=self._commands.trained_tokens,
            compiled=self._trainer.compiled + self._programs.compiled,
            base_size=self._base.size,
            prefix_size=self._sampler.prefix_size,
        )

    def _call(self, function: Callable[[], object], even_if_closed: bool = False) -> None:
        """Has the engine's thread call a function."""
        with self._has_news:
            if self._stopping and not even_if_closed:
                raise RuntimeError("the engine is closed")
            self._calls.append(function)
            self._has_news.notify()

    def _work(self) -> None:
        """Runs calls of other threads, and turns of work, until the engine is closed and idle."""
        while True:
            with self._has_news:
                while not (self._calls or self._stopping or self._is_busy()):
                    self._has_news.wait()
                if self._stopping and not self._calls and not self._is_busy():
                    return
                calls = [*self._calls]
                self._calls.clear()
            for call in calls:
                call()
            try:
                self._take_turn()
            except Exception:  # nothing may end the thread
                _logger.exception("a turn failed")

    def _is_busy(self) -> bool:
        return self._sampler.busy or any(tenant.is_waiting for tenant in self._tenants.values())

    def _take_turn(self) -> None:
        """Runs a step of sampling or of training, whichever has had less time."""
        waiting = [tenant for tenant in self._tenants.values() if tenant.is_waiting]
        kinds: list[str] = []
        if waiting:
            kinds.append("training")
        if self._sampler.busy:
            kinds.append("sampling")
        if not kinds:
            return
        kind = min(kinds, key=self._seconds_of_kind.__getitem__)
        if len(kinds) == 1:  # the time that nobody else could use does not count
            self._seconds_of_kind = dict.fromkeys(self._seconds_of_kind, 0.0)
        trainable = [tenant for tenant in waiting if self._may_train(tenant)]
        start_time = time.monotonic()
        if kind == "training" and trainable:
            self._train_tenant(min(trainable, key=self._turn_key))
        else:
            kind = "sampling"
            try:
                self._sampler.step()
            except Exception as error:
                self._sampler.fail(error)
        self._seconds_of_kind[kind] += time.monotonic() - start_time

    def _enqueue_tenant(self, path: TurnPath) -> None:
        """Queues a tenant for training, so that idle time earns it no advantage."""
        waiting_paths = [tenant.path for tenant in self._tenants.values() if tenant.is_waiting]
        for level in levels(path):
            n_levels = len(level)
            is_in_line = any(waiting_path[:n_levels] == level for waiting_path in waiting_paths)
            if is_in_line:
                continue
            waiting_siblings = {
                waiting_path[:n_levels]
                for waiting_path in waiting_paths
                if waiting_path[: n_levels - 1] == level[:-1]
            }
            if waiting_siblings:
                min_seconds = min(self._train_seconds[sibling] for sibling in waiting_siblings)
            else:  # as much as the one that trained longest
                min_seconds = max(self._seconds_of_siblings(level), default=0.0)
            own_seconds = self._train_seconds.get(level, 0.0)
            self._train_seconds[level] = max(own_seconds, min_seconds)

    def _seconds_of_siblings(self, level: TurnPath) -> list[float]:
        """Returns the training seconds of all paths with the same parent as a path."""
        return [seconds for path, seconds in self._train_seconds.items() if path[:-1] == level[:-1]]

    def _turn_key(self, tenant: EngineTenant) -> tuple[float, ...]:
        """Returns a key to sort tenants by. The tenant with the smallest key is next."""
        return tuple(self._train_seconds[level] for level in levels(tenant.path))

    def _may_train(self, tenant: EngineTenant) -> bool:
        """Returns True if a tenant may have a turn before the next sampled token."""
        if self._trained_round != self._sampler.rounds:
            self._trained_round = self._sampler.rounds
            self._trained_parties = set()
        for party in parties(tenant.path):
            if party in self._trained_parties and self._sampler.serves_others(party):
                return False
        return True

    def _train_tenant(self, tenant: EngineTenant) -> None:
        """Executes a part of a tenant's command, such as one batch of a gradient."""
        if tenant.job is None:
            command, tenant.done = tenant.queue.popleft()
            tenant.job = self._commands.execute(tenant, command)
        self._trained_parties.update(parties(tenant.path))
        start_time = time.monotonic()
        is_over = True
        result: requests.CommandResult = None
        try:
            next(tenant.job)
            is_over = False
        except StopIteration as stop:
            result = stop.value
        except Exception as error:  # it is this command's alone
            result = error
        seconds = time.monotonic() - start_time
        tenant.seconds += seconds
        for level in levels(tenant.path):
            self._train_seconds[level] += seconds
        if is_over:
            self._finish_command(tenant, result)

    def _finish_command(self, tenant: EngineTenant, result: requests.CommandResult) -> None:
        """Delivers a command's result, and removes a tenant without an adapter."""
        done = tenant.done
        tenant.job = None
        tenant.done = None
        if tenant.state is None and not tenant.queue:
            del self._tenants[tenant.name]
        if done is not None:
            done(result)

    def _check_room(self) -> None:
        """Raises a RequestError if the maximum number of adapters is in training."""
        n_adapters = sum(tenant.state is not None for tenant in self._tenants.values())
        if n_adapters >= self._max_tenants:
            raise requests.RequestError(
                f"{self._max_tenants} adapters train here, and there is room for no more. Unload "
                "one, or wait until a session ends."
            )


def _log_errors_of(function: Callable[[T], None]) -> Callable[[T], None]:
    """Returns a callback that logs its errors, so that none ends the engine's thread."""

    def call(result: T) -> None:
        try:
            function(result)
        except Exception:
            _logger.exception("a result was not taken")

    return call
