"""The frame of all contenders in JAX: one model, loss and optimiser; they differ in LoRA alone."""

import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import models
from lora_jax.training.losses import summed_loss
from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.contenders.settings import (
    BETAS,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    checked,
)
from tests.benchmarks.peers.inputs import Pair, data_of, read_peft
from train.plan.flops.jaxpr import count_flops


class Method(NamedTuple):
    """One way to write LoRA.

    Attributes:
      train: the tree that trains.
      frozen: the tree that does not; both are arguments of the compiled step.
      params: (train, frozen) -> the parameters of the model.
      apply_of: model -> a function that is called like ``model.apply``.
    """

    train: Any
    frozen: Any
    params: Callable[[Any, Any], Any]
    apply_of: Callable[[Any], Callable[..., Any]]


# With remat, logits are not all kept either; train.sft's default.
CHUNK = 256

_LAYER = re.compile(r"\.(layers?)\.(\d+)\.")

MakeMethod = Callable[[Case, Any, Any, Path], Method]


class Factors(NamedTuple):
    """A and B of one kernel: [layers, in, r] and [layers, r, out], or without layers."""

    a: np.ndarray
    b: np.ndarray


def read_adapter(folder: Path) -> tuple[dict[str, Factors], dict[str, np.ndarray], float]:
    """Reads a PEFT folder: (kernel's path -> factors, path -> trained array, alpha / r)."""
    pairs, trained, scale = read_peft(folder)
    layers: dict[str, dict[int, Pair]] = {}
    for module, pair in pairs.items():
        found = _LAYER.search(module)
        path = _LAYER.sub(r".\1.", module).replace(".", "/") + "/kernel"
        layers.setdefault(path, {})[int(found[2]) if found else -1] = pair
    factors = {
        path: Factors(*(_joined(parts, i).swapaxes(-1, -2) for i in (0, 1)))
        for path, parts in layers.items()
    }
    names = {name: name.replace(".", "/").replace("/weight", "/kernel") for name in trained}
    arrays = {path: trained[name].T for name, path in names.items()}
    return factors, arrays, scale


def _joined(layers: dict[int, Pair], which: int) -> np.ndarray:
    """Stacks the layers' A or B; -1 is a kernel outside of the layers."""
    if -1 in layers:
        return layers[-1][which]
    return np.stack([layers[i][which] for i in sorted(layers)])


def plain(model: Any) -> Callable[..., Any]:
    """Returns the model's own function: the ``apply_of`` of methods that need no other."""
    return model.apply


def with_leaves(params: Any, change: Callable[[str, Any], Any]) -> Any:
    """Maps ``change(path, leaf)`` over a tree of dicts, paths joined by slashes."""

    def visit(path: Any, leaf: Any) -> Any:
        return change("/".join(key.key for key in path), leaf)

    return jax.tree_util.tree_map_with_path(visit, params)


class Program:
    """A compiled function, and the state that it carries from call to call."""

    def __init__(self, case: Case, base: Path, adapter: Path, make: MakeMethod) -> None:
        began = time.perf_counter()
        dtype = jnp.dtype(case.dtype)
        self.case = case
        options = {"remat": case.remat, "attention": case.attention, "dtype": dtype}
        self.model, params = models.from_pretrained(base, **options)
        self.method = make(case, self.model, params, adapter)
        self.data = data_of(case, self.model.config.vocab_size)
        self.arguments: list[Any] = [self.method.frozen, self.data]
        if case.kind == "decode":
            self.function: Callable[..., Any] = functools.partial(_decode, case)
            self.carry: list[Any] = [self.method.train]
            self.tokens_a_run = case.batch * case.new_tokens
        else:
            self.optimizer = optax.adamw(LEARNING_RATE, *BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
            chunk = CHUNK if case.remat else 0
            self.function = functools.partial(_step, self.optimizer, chunk)
            self.carry = [self.method.train, self.optimizer.init(self.method.train)]
            self.tokens_a_run = case.batch * case.seq
        jax.block_until_ready((self.carry, self.arguments))
        self.load_s = time.perf_counter() - began

    def compile(self) -> dict[str, Any]:
        """Traces and compiles; returns seconds, bytes, FLOPs and the device."""
        began = time.perf_counter()
        traced = self._jitted(self.model).trace(*self.carry, *self.arguments)
        trace_s, began = time.perf_counter() - began, time.perf_counter()
        self.run_once = traced.lower().compile()
        compile_s = time.perf_counter() - began
        memory = self.run_once.memory_analysis()
        flops = model_flops = count_flops(traced.jaxpr).flops
        if self.case.remat:  # MFU does not count what is computed again
            plain = self._jitted(self.model.clone(remat=False))
            model_flops = count_flops(plain.trace(*self.carry, *self.arguments).jaxpr).flops
        device = jax.devices()[0]
        return {
            "load_s": self.load_s,
            "trace_s": trace_s,
            "compile_s": compile_s,
            "temporaries": memory.temp_size_in_bytes,
            "arguments": memory.argument_size_in_bytes,
            "flops": flops,
            "model_flops": model_flops,
            "tokens": self.tokens_a_run,
            "device": {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu"}.get(
                device.platform, device.platform
            ),
            "device_kind": device.device_kind,
        }

    def check(self, steps: int) -> dict[str, Any]:
        """Runs the program for what has to agree; see ``checked``."""
        return checked(self.case.kind, self._run, steps)

    def time(self, runs: int) -> float:
        """Returns the seconds of that many runs."""
        began = time.perf_counter()
        for _ in range(runs):
            out = self._run()
        jax.block_until_ready((out, self.carry))
        return time.perf_counter() - began

    def device_peak(self) -> int | None:
        """Returns the peak of device memory in bytes, where the device tells."""
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    def _jitted(self, model: Any) -> Any:
        donated = (0, 1) if len(self.carry) == 2 else ()
        function = functools.partial(self.function, model, self.method)
        return jax.jit(function, donate_argnums=donated)

    def _run(self) -> Any:
        out = self.run_once(*self.carry, *self.arguments)
        if len(self.carry) == 1:
            return out
        *self.carry[:], loss = out
        return loss


def _step(
    optimizer: Any,
    chunk: int,
    model: Any,
    method: Method,
    train: Any,
    state: Any,
    frozen: Any,
    data: dict[str, Any],
) -> Any:
    apply = method.apply_of(model)

    def loss_of(train: Any) -> jax.Array:
        variables = {"params": method.params(train, frozen)}
        if "labels" in data:
            logits = apply(variables, data["ids"], data["mask"])
            targets = data["labels"]
        elif chunk:
            sums = summed_loss(apply, variables["params"], _predicted(data["ids"]), chunk=chunk)
            return sums.total / sums.count
        else:
            logits = apply(variables, data["ids"])[:, :-1]
            targets = data["ids"][:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), targets
        )
        return losses.mean()

    loss, grads = jax.value_and_grad(loss_of)(train)
    updates, state = optimizer.update(grads, state, train)
    return optax.apply_updates(train, updates), state, loss


def _predicted(ids: jax.Array) -> dict[str, Any]:
    """Returns the batch in which each token of a row predicts the next; see ``summed_loss``."""
    places = jnp.broadcast_to(jnp.arange(ids.shape[1] - 1), ids[:, 1:].shape)
    batch = {"ids": ids, "positions": None, "segment_ids": None}
    return batch | {"predict_at": places, "targets": ids[:, 1:], "weights": jnp.ones(places.shape)}


def _decode(
    case: Case, model: Any, method: Method, train: Any, frozen: Any, data: dict[str, Any]
) -> jax.Array:
    return models.generate(
        model,
        method.params(train, frozen),
        data["ids"],
        max_new_tokens=case.new_tokens,
        eos_token_id=(),
        apply=method.apply_of(model),
    )
