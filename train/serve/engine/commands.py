"""Executes the commands of tenants in small parts, and keeps the adapters that samples choose."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from train.serve.engine.adapter import Adapter, Factors, TrainingState
from train.serve.engine.base import ServedBase
from train.serve.engine.losses import total_weight
from train.serve.engine.trainer import Trainer
from train.serve.engine.turns import TurnPath
from train.serve.protocol import requests
from train.serve.protocol.engine import LATEST_LOSSES, check_update


class AdapterCache:
    """Finds adapters by name, and reads an evicted adapter again from its folder.

    A client that trains and samples in turn names one at each step, and asks for few again.
    """

    def __init__(self, max_adapters: int, read: Callable[[Path], Adapter]) -> None:
        """Creates an empty cache.

        Args:
          max_adapters: adapters in memory at most, beside those without a folder.
          read: reads the adapter in a folder, and waits while that is written.
        """
        self._max_adapters = max_adapters
        self._read = read
        self._folders: dict[str, Path | None] = {}
        self._in_memory: dict[str, Adapter] = {}  # the least recently used first

    def __contains__(self, name: str) -> bool:
        """Returns True if there is an adapter of this name. Any thread may call it."""
        return name in self._folders

    def __iter__(self) -> Iterator[str]:
        """Returns the names of the adapters."""
        return iter(tuple(self._folders))

    def __len__(self) -> int:
        """Returns the number of adapters in memory."""
        return len(self._in_memory)

    def add(self, name: str, folder: Path | None, adapter: Adapter) -> None:
        """Adds an adapter under a name, or marks it as the most recently used.

        Args:
          name: its name.
          folder: where it can be read again; None for one that stays in memory, since its folder
            may change.
          adapter: its arrays.
        """
        self._folders[name] = folder
        self._in_memory.pop(name, None)
        self._in_memory[name] = adapter
        readable_names = [name for name in self._in_memory if self._folders[name] is not None]
        if len(readable_names) > self._max_adapters:
            del self._in_memory[readable_names[0]]

    def drop(self, name: str) -> None:
        """Removes an adapter if there is one of this name."""
        self._folders.pop(name, None)
        self._in_memory.pop(name, None)

    def find(self, name: str) -> Adapter:
        """Returns an adapter; raises a RequestError if there is none of this name."""
        if name not in self._folders:
            names = ", ".join(self) or "none"
            raise requests.RequestError(f"there is no adapter {name!r}. Use one of these: {names}.")
        # An adapter that was evicted is read again from its folder.
        folder = self._folders[name]
        adapter = self._in_memory.get(name)
        if adapter is None:
            assert folder is not None
            adapter = self._read(folder)
        self.add(name, folder, adapter)
        return adapter


class EngineTenant:
    """An adapter that trains, and its queue of commands.

    Attributes:
      client: the client that it is of.
      seconds: seconds of the engine's time that it had.
      job, done: the command that is executed, and what gets its result.
      loss_sum, weight_sum: the loss, and the weight of its targets, since the last update.
    """

    def __init__(self, name: str, client: requests.Client) -> None:
        """Creates a tenant without an adapter."""
        self.name = name
        self.client = client
        self.seconds = 0.0
        self.queue: deque[tuple[requests.Command, requests.Done]] = deque()
        self.job: Generator[None, None, requests.CommandResult] | None = None
        self.done: requests.Done | None = None
        self.state: TrainingState | None = None
        self.grads: Factors | None = None
        self.loss_sum = 0.0
        self.weight_sum = 0.0
        self.losses: deque[tuple[int, float]] = deque(maxlen=LATEST_LOSSES)

    def set_state(self, state: TrainingState | None) -> None:
        """Sets the adapter's state and clears the gradient; None removes the adapter."""
        self.state = state
        self.grads = None
        self.loss_sum = 0.0
        self.weight_sum = 0.0

    @property
    def path(self) -> TurnPath:
        """The tenant's path in the order of turns."""
        return self.client.owner, self.client.session, self.name

    @property
    def loss(self) -> float | None:
        """The loss per weighted target since the last update; None if no target had a weight."""
        return self.loss_sum / self.weight_sum if self.weight_sum else None

    @property
    def is_waiting(self) -> bool:
        """True if the tenant has a command to execute."""
        return self.job is not None or bool(self.queue)

    @property
    def size(self) -> int:
        """The bytes of the tenant's arrays."""
        state = self.state
        if state is None:
            return 0
        arrays = jax.tree.leaves((state.first, state.second, self.grads or {}))
        return state.adapter.size + sum(x.nbytes for x in arrays)


class CommandRunner:
    """Executes commands in the engine's thread, and writes files in another thread.

    Attributes:
      adapters: adapters that samples may choose.
      trained_tokens: tokens of the data whose gradients were added.
    """

    def __init__(
        self, base: ServedBase, trainer: Trainer, max_adapters: int, check_room: Callable[[], None]
    ) -> None:
        """Starts the thread that writes files.

        Args:
          base, trainer: see their classes.
          max_adapters: see `AdapterCache`.
          check_room: raises a RequestError if there is no room for another tenant.
        """
        self._base = base
        self._trainer = trainer
        self._check_room = check_room
        self.adapters = AdapterCache(max_adapters, lambda folder: self.read_state(folder).adapter)
        self.trained_tokens = 0
        self._files = ThreadPoolExecutor(1, "files")
        self._writes: dict[Path, Future[None]] = {}  # by folder; the engine's thread alone has it

    def close(self) -> None:
        """Waits until all files are written."""
        self._files.shutdown()

    def execute(
        self, tenant: EngineTenant, command: requests.Command
    ) -> Generator[None, None, requests.CommandResult]:
        """Executes a command in parts, one per iteration, and returns the result."""
        is_new_tenant = tenant.state is None
        if is_new_tenant and isinstance(command, (requests.Create, requests.Load)):
            self._check_room()
        if isinstance(command, requests.Create):
            spec = command.spec
            tenant.set_state(TrainingState.begin(self._base.begin(spec, spec.seed or 0)))
            return spec
        if isinstance(command, requests.Load):
            loaded_state = self.read_state(command.path, command.optimizer)
            if loaded_state.adapter.invocation is not None:
                raise requests.RequestError(
                    f"{command.path.name} is an activated LoRA, which a server samples from and "
                    "does not train. Use train.sft --alora to train it."
                )
            tenant.set_state(loaded_state)
            return loaded_state.adapter.spec
        if isinstance(command, requests.Leave):
            tenant.set_state(None)
            return None
        state = tenant.state
        if state is None:
            raise requests.RequestError(
                f"there is no adapter {tenant.name}. Create or load it first."
            )
        if isinstance(command, requests.Gradient):
            return (yield from self._add_gradient(tenant, state, command))
        if isinstance(command, requests.Update):
            return self._take_step(tenant, state, command)
        if isinstance(command, requests.Discard):
            tenant.set_state(state)
            return None
        self._save(tenant, state, command)
        return None

    def _add_gradient(
        self, tenant: EngineTenant, state: TrainingState, request: requests.Gradient
    ) -> Generator[None, None, requests.GradientResult]:
        """Adds the gradient of a request to the tenant's gradient, batch by batch."""
        logprobs = [np.zeros(0, np.float32)] * len(request.data)
        # Sum losses and gradients of the batches. Each batch is one turn of the engine.
        loss = 0.0
        grads = None
        for batch in self._trainer.batches(request):
            if request.forward_only:
                batch_loss, batch_logps = self._trainer.loss(state.adapter, request, batch)
            else:
                grads, batch_loss, batch_logps = self._trainer.gradient(
                    state.adapter, grads, request, batch
                )
            loss += batch_loss
            for row, i in enumerate(batch.data_indices):
                targets = request.data[i].inputs["target_tokens"]
                if targets.ndim == 1:
                    logprobs[i] = batch_logps[row, : len(targets), 0]
                else:
                    logprobs[i] = batch_logps[row, : len(targets), : targets.shape[1]]
            yield
        # A gradient that is not finite is discarded as a whole.
        is_finite = np.isfinite(loss) and (grads is None or self._trainer.is_finite(grads))
        if not request.forward_only and not is_finite:
            raise requests.RequestError(
                f"the loss is {loss:g}, or its gradient is not finite. No gradient was added. "
                "Check the data of this request."
            )
        if grads is not None:
            tenant.grads = self._trainer.add(tenant.grads, grads)
            tenant.loss_sum += loss
            tenant.weight_sum += sum(
                total_weight(request.loss, datum.inputs) for datum in request.data
            )
            self.trained_tokens += sum(len(datum.tokens) for datum in request.data)
        return requests.GradientResult(logprobs, {"loss:sum": loss})

    def _take_step(
        self, tenant: EngineTenant, state: TrainingState, settings: requests.Update
    ) -> requests.UpdateResult:
        """Updates a tenant's adapter, and records the loss since the last update."""
        check_update(settings)
        next_state, norm = self._trainer.update(state, tenant.grads, settings)
        if tenant.loss is not None:
            tenant.losses.append((next_state.steps, tenant.loss))
        tenant.set_state(next_state)
        return requests.UpdateResult({"grad_norm:max": norm, "step:max": float(next_state.steps)})

    def _save(self, tenant: EngineTenant, state: TrainingState, command: requests.Save) -> None:
        """Names an adapter at once, and writes its files in another thread."""
        if command.name is not None:
            self.adapters.add(command.name, command.path, state.adapter)
        done = tenant.done
        tenant.done = None  # the result follows once the files are written
        assert done is not None

        def write() -> requests.SaveResult:
            return requests.SaveResult(self._base.write(state, command))

        for folder, future in [*self._writes.items()]:
            if future.done():
                del self._writes[folder]
        self._writes[command.path.absolute()] = self._files.submit(deliver_result, write, done)

    def read_state(self, folder: Path, optimizer: bool = False) -> TrainingState:
        """Reads an adapter and its training state, after any pending write of the folder."""
        write = self._writes.get(folder.absolute())
        if write is not None:
            write.result()
        return self._base.read_state(folder, optimizer)


def deliver_result(function: Callable[[], requests.CommandResult], done: requests.Done) -> None:
    """Calls a function, and passes its result or its error to `done`."""
    try:
        result = function()
    except Exception as error:
        result = error
    done(result)
