"""Real training steps of a model with random weights, beside the plan of these steps."""

import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax import models
from lora_jax.core.paths import flatten_with_paths
from lora_jax.training.layout import Layout
from lora_jax.training.setup import Setup
from train.check.rows import CheckRow
from train.check.table import FAILS, HOLDS, NOT_APPLICABLE, RowResult
from train.options.common import AdapterConfig, OptimConfig
from train.options.optim import fill_optimizer_defaults, make_optimizer
from train.plan.flops.closed_form import model_flops
from train.plan.job import PlanJob, PlanVariant, abstract_params, batch_shapes
from train.plan.local import measure_flop_rate, memory_capacity_of
from train.plan.machines import Machine
from train.processes.memory import device_peak_bytes, peak_bytes, reset_peak
from train.processes.mesh import choose_product_form, make_mesh
from train.run.model_code import make_model
from train.run.pretrained import read_shapes
from train.run.rules import rules

_LEARNING_RATE = 1e-2  # the loss falls at once, because the tokens are few
_WORDS = 16  # of the vocabulary, which the rows consist of
_MEMORY_TOLERANCE = 0.25  # of the plan's bytes
_MAX_SLOWDOWN = 2.0  # of a step over the compiler's estimate
_PROMPT, _NEW_TOKENS = 64, 16
_TIE = 0.1  # a token may be so many deviations of its logits behind another, by rounding
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_COMPILATIONS: list[str] = []  # an entry for each program that JAX compiles


def _note_compilation(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == _COMPILE_EVENT:
        _COMPILATIONS.append(str(kwargs.get("fun_name")))


jax.monitoring.register_event_duration_secs_listener(_note_compilation)


@dataclasses.dataclass(kw_only=True)
class Measured:
    """Figures of two steps.

    Attributes:
      losses: the loss of each step.
      seconds: the time of the second step.
      compilations: programs that were compiled during the second step.
      peak: the largest number of bytes on a device; None if it does not report them.
      mfu: the share of the devices' peak that the FLOPs of a step take; None if not computed.
    """

    losses: list[float]
    seconds: float
    compilations: int
    peak: int | None = None
    mfu: float | None = None


class StepCheck:
    """Two steps of rows of one length, with the rows of the table about them."""

    def __init__(self, model: str | Path, seq: int, plan: Mapping[str, Any] | None) -> None:
        """Takes the model's config.json, tokens per row, and the plan; None for no plan."""
        self.model_path = str(model)
        self.seq = seq
        self.plan = plan
        self.measured: Measured | None = None
        self.trained: tuple[Any, Any] | None = None  # the model, and its adapted tree

    def rows(self) -> list[CheckRow]:
        """Returns the rows, which follow each other."""
        length = f"{self.seq:,} tokens"
        return [
            CheckRow(f"steps: two, of {length}", self.check_steps),
            CheckRow(f"memory: steps of {length}", self.check_memory),
            CheckRow(f"time: a step of {length}", self.check_time),
            CheckRow(f"decoding: after steps of {length}", self.check_decoding),
        ]

    def check_steps(self) -> RowResult:
        """Runs two steps: the loss must fall, and nothing may compile again."""
        name = self.rows()[0].name
        measured = self.run_steps()
        self.measured = measured
        first, second = measured.losses
        n_tokens = self.seq * jax.device_count()
        figures = {
            "losses": measured.losses,
            "compilations": measured.compilations,
            "tokens_per_second": n_tokens / measured.seconds,
            "mfu": measured.mfu,
        }
        text = f"{n_tokens / measured.seconds:,.0f} tokens/s, MFU {measured.mfu:.1%}"
        if not second < first:  # a NaN is not
            return RowResult(
                name, FAILS, f"the loss goes from {first:.4f} to {second:.4f}", figures
            )
        if measured.compilations:
            problem = f"the second step compiles {measured.compilations} programs"
            return RowResult(name, FAILS, problem, figures)
        return RowResult(name, HOLDS, f"loss {first:.3f} to {second:.3f}, {text}", figures)

    def check_memory(self) -> RowResult:
        """Compares the device's memory with the plan."""
        planned = self.plan["per_chip_bytes"]["total"] if self.plan else None
        if planned is not None and jax.default_backend() == "cpu":
            planned *= jax.device_count()  # its devices share the memory of this process
        return judge_memory(self.rows()[1].name, self._measurement().peak, planned)

    def check_time(self) -> RowResult:
        """Compares the time of a step with the estimate of the device's compiler."""
        estimate = self.plan["estimated_seconds"] if self.plan else None
        return judge_time(self.rows()[2].name, self._measurement().seconds, estimate)

    def _measurement(self) -> Measured:
        if self.measured is None:
            raise LookupError("no step was measured")
        return self.measured

    def run_steps(self) -> Measured:
        """Compiles the step of a run, and takes two steps on one batch."""
        job = self._make_job()
        layout = job.layout
        adapter_options = AdapterConfig()
        optim = fill_optimizer_defaults(OptimConfig(remat="full"), lr=_LEARNING_RATE, beta2=0.999)
        shapes = abstract_params(job, PlanVariant(adapter_options, "full"))
        schedule = optax.constant_schedule(_LEARNING_RATE)
        setup = Setup.make(layout, shapes, make_optimizer(optim, schedule, shapes), schedule)
        config: Any = job.outline.config
        dtype = jnp.dtype(job.dtype)
        model = make_model(config, dtype, dtype, remat=optim.remat_policy)
        adapter, base = lj.split(shapes)
        step = setup.compile(
            setup.forward(model), job.loss, setup.abstract_state(adapter), base, batch_shapes(job)
        )
        weight_shapes = lj.strip(shapes)

        def adapt_drawn_weights() -> Any:
            return lj.lorafy(draw_weights(weight_shapes), rules(adapter_options, job.outline))

        def take_steps() -> Measured:
            adapter, base = lj.split(layout.placed(adapt_drawn_weights()))
            state = setup.state(adapter, jax.random.key(0))
            batch = make_batch(batch_shapes(job), layout)
            losses: list[float] = []
            for _ in range(2):
                _COMPILATIONS.clear()
                start = time.perf_counter()
                state, metrics = jax.block_until_ready(step(state, base, batch))
                seconds = time.perf_counter() - start
                losses.append(float(metrics["loss"]))
            self.trained = (layout.constrained(model), lj.join(state.adapter, base))
            return Measured(losses=losses, seconds=seconds, compilations=len(_COMPILATIONS))

        devices = list(layout.mesh.devices.flat)
        if layout.platform == "cpu":  # the memory of compilers is no part of the device's
            take_steps()
            self.trained = None
            reset_peak()
            start_bytes = peak_bytes()
            measured = take_steps()
            measured.peak = peak_bytes() - start_bytes
        else:
            measured = take_steps()
            measured.peak = device_peak_bytes(jax.local_devices())
        peak_rate = self.plan["peak_flops_per_device"] if self.plan else None
        if peak_rate is None:
            rate = measure_flop_rate(job.dtype, devices)
        else:
            rate = len(devices) * peak_rate
        flops = model_flops(config, shapes, batch=job.batch_size, seq=self.seq)
        measured.mfu = flops / (rate * measured.seconds)
        return measured

    def _make_job(self) -> PlanJob:
        """Returns the job of a plan, on the devices of all processes."""
        devices = jax.devices()
        outline = read_shapes(self.model_path)
        mesh = make_mesh(None, len(devices), devices)
        layout, form = choose_product_form(Layout.of(mesh, outline.config), "auto")
        return PlanJob(
            outline=outline,
            layout=layout,
            machine=Machine("this device", devices, memory_capacity_of(devices[0]) or 0, None),
            batch_size=len(devices),
            grad_accum=1,
            seq_len=self.seq,
            loss_chunk=None,
            dtype=dtype_of_steps(layout.platform),
            products=form,
        )

    def check_decoding(self) -> RowResult:
        """Decodes tokens with a cache: each must be the most likely one without a cache."""
        name = self.rows()[3].name
        if self.trained is None:
            raise LookupError("no step was measured")
        model, params = self.trained
        apply = lj.adapt(model.apply)
        rng = np.random.default_rng(1)
        prompt = rng.integers(0, _WORDS, (jax.device_count(), _PROMPT)).astype(np.int32)
        start = time.perf_counter()
        with jax.set_mesh(model.placement.mesh):
            new = models.generate(
                model, params, prompt, max_new_tokens=_NEW_TOKENS, eos_token_id=(), apply=apply
            )

        def measure_distances(params: Any, prompt: jax.Array, new: jax.Array) -> jax.Array:
            """Returns the distances of tokens from the largest logits, in deviations."""
            row = jnp.concatenate([prompt, new], axis=1)
            logits = apply({"params": params}, row)[:, _PROMPT - 1 : -1].astype(jnp.float32)
            chosen = jnp.take_along_axis(logits, new[..., None], axis=-1)[..., 0]
            return (jnp.max(logits, axis=-1) - chosen) / jnp.std(logits, axis=-1)

        distances = model.placement.jitted(measure_distances)(params, prompt, new)
        behind = float(np.max(distances))
        seconds = time.perf_counter() - start
        figures = {"behind": behind, "seconds": seconds}
        if not behind < _TIE:
            problem = f"a token is {behind:.2f} deviations less likely than another"
            return RowResult(name, FAILS, problem, figures)
        return RowResult(name, HOLDS, f"{_NEW_TOKENS} tokens, as without a cache", figures)


def dtype_of_steps(platform: str) -> str:
    """Returns the dtype in which steps compute; a CPU has no products in bf16."""
    return "float32" if platform == "cpu" else "bfloat16"


def judge_memory(name: str, peak: int | None, planned: int | None) -> RowResult:
    """Compares the memory of a device with the plan.

    Args:
      name: the row's name.
      peak: the device's bytes; None if it reports none.
      planned: the plan's bytes; None for no plan.
    """
    if peak is None:
        return RowResult(name, NOT_APPLICABLE, "the device does not report its memory")
    figures = {"measured_bytes": peak, "planned_bytes": planned}
    if planned is None:
        return RowResult(name, NOT_APPLICABLE, f"{peak / 2**30:.2f} GiB, without a plan", figures)
    difference = peak / planned - 1
    text = f"{peak / 2**30:.2f} GiB, {difference:+.0%} of the plan's {planned / 2**30:.2f} GiB"
    state = HOLDS if abs(difference) <= _MEMORY_TOLERANCE else FAILS
    return RowResult(name, state, text, figures)


def judge_time(name: str, seconds: float, estimate: float | None) -> RowResult:
    """Compares the time of a step with the estimate of its compiler."""
    figures = {"seconds": seconds, "estimated_seconds": estimate}
    if estimate is None:
        text = f"{seconds:.3g} s; the compiler estimates no time"
        return RowResult(name, NOT_APPLICABLE, text, figures)
    text = f"{seconds:.3g} s, {seconds / estimate:.2f} times the estimate of {estimate:.3g} s"
    state = HOLDS if seconds <= _MAX_SLOWDOWN * estimate else FAILS
    return RowResult(name, state, text, figures)


def draw_weights(shapes: Any) -> Any:
    """Returns random weights for shapes with shardings: norms of one, and small kernels."""
    leaves, structure = flatten_with_paths(shapes)
    drawn = []
    for index, (path, leaf) in enumerate(leaves):
        is_drawn = path.rsplit("/", 1)[-1] in ("kernel", "embedding")
        fill = functools.partial(_fill, leaf.shape, leaf.dtype, is_drawn)
        drawn.append(jax.jit(fill, out_shardings=leaf.sharding)(jax.random.key(index)))
    return jax.tree.unflatten(structure, drawn)


def _fill(shape: tuple[int, ...], dtype: Any, is_drawn: bool, key: jax.Array) -> jax.Array:
    if not is_drawn:
        return jnp.ones(shape, dtype)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)


def make_batch(shapes: Mapping[str, Any], layout: Layout) -> dict[str, jax.Array]:
    """Returns a batch of one text per row, of few words."""
    arrays: dict[str, np.ndarray] = {}
    seq = shapes["ids"].shape[-1]
    words = np.random.default_rng(0).integers(0, _WORDS, shapes["ids"].shape)
    for name, shape in shapes.items():
        values: Any = {
            "ids": words,
            "targets": np.roll(words, -1, axis=-1),
            "positions": np.arange(seq),
            "predict_at": np.arange(seq),
        }.get(name, np.ones(()))
        arrays[name] = np.broadcast_to(values, shape.shape).astype(shape.dtype)
    return layout.batch(arrays, parts=True)
