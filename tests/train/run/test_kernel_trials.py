"""Kernels are compared before a device uses them first: once, and what fails is replaced."""

import dataclasses
import functools
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from lora_jax.cases.attention import attention_cases
from lora_jax.cases.case import Case, normal
from lora_jax.cases.mixtures import gated, mixture_cases
from lora_jax.cases.products import few_rows_cases, run_kernel
from lora_jax.models.decoder.experts import apply_blocks, apply_ragged
from lora_jax.models.decoder.moe import make_mixture
from lora_jax.models.layers.kernels.splash import Splash
from lora_jax.quantized import encode, is_coded, without_rows_kernel
from lora_jax.training.layout import layout_of_one_device
from tests.train.scripts import fails
from tests.train.tiny import write_model, write_rows
from train.generate import __main__ as generate
from train.processes import hosts
from train.run import kernel_trials
from train.run.kernel_trials import KernelTrial, choose_replacements, compare, find_trials
from train.run.pretrained import read_model_info
from train.serve import __main__ as server
from train.serve.options import ServeOptions
from train.sft import main
from train.stages import begin, kernels

ROOT = Path(__file__).parents[3]
UNIT, HEAD = 128, 16
SPLASH = Splash(block=128, interpret=True)


def splash_cases():
    return attention_cases(SPLASH, "float32", unit=UNIT, head_dim=HEAD)[:1]


def expert_cases():
    sizes = {"n_experts": 4, "shape": (2, 16, 2), "width": 32, "inner": 16}
    return mixture_cases("float32", "cpu", **sizes)[:1]


@dataclasses.dataclass(frozen=True)
class Spoiled:
    """An implementation of attention that scales its result."""

    factor: float = 1.01

    def __call__(self, *inputs):
        return SPLASH(*inputs) * self.factor


def spoiled_experts(*args, biases=()):
    """Sums in half precision."""
    out = apply_blocks(*args, biases=biases)
    return out.astype(jnp.bfloat16).astype(out.dtype)


def few_rows_trial(layer=0):
    """A trial of the interpreted kernel, which reads a later layer."""

    def multiply(kernel, stack, index, x):
        kernel = dataclasses.replace(kernel, interpret=True)
        return run_kernel(kernel, stack, index + layer, x)

    return KernelTrial(
        title="kernel for few rows",
        option="few_rows",
        name="kernel",
        replacement="xla",
        is_requested=False,
        dtype="float32",
        kernel=multiply,
        make_cases=lambda: few_rows_cases("float32", n_in=256, n_out=128)[:1],
    )


def attention_trial(kernel=SPLASH, cases=splash_cases, requested=False):
    return KernelTrial(
        title="attention kernel splash",
        option="attention",
        name="splash",
        replacement="blockwise",
        is_requested=requested,
        dtype="float32",
        kernel=kernel,
        make_cases=cases,
    )


def experts_trial(apply):
    return KernelTrial(
        title="kernel of ragged experts",
        option="experts",
        name="ragged",
        replacement="blocks",
        is_requested=False,
        dtype="float32",
        kernel=make_mixture(gated, apply),
        make_cases=expert_cases,
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lora_jax" / "kernels"


@pytest.fixture
def compared(monkeypatch):
    """The names of the kernels that are compared, in order."""
    names, compare = [], kernel_trials.compare

    def counted(trial, *rest):
        names.append(trial.name)
        return compare(trial, *rest)

    monkeypatch.setattr(kernel_trials, "compare", counted)
    return names


def choose(*trials):
    """Returns the replacements, and what the console shows."""
    console = Console(file=io.StringIO(), width=10_000)
    made = choose_replacements(trials, jax.devices()[:1], console)
    return made, " ".join(console.file.getvalue().split())


def test_a_kernel_that_holds_is_compared_once(cache, compared):
    made, told = choose(attention_trial())
    assert made == {} and "comparing the attention kernel splash" in told
    assert "the attention kernel splash holds in 1 of 1 cases (attention: causal, float32)" in told
    made, told = choose(attention_trial())
    assert made == {} and told == "" and compared == ["splash"]
    (file,) = cache.iterdir()
    record = {"failure": None, "held": ["attention: causal, float32"], "left": []}
    assert json.loads(file.read_text()) == record


def test_a_later_start_compares_the_cases_that_were_left(cache, monkeypatch):
    """The second case hangs at first: the kernel is used, and the message names both cases."""
    is_over = threading.Event()
    names, compare_on = [], Case.compare_on

    def cases():
        return attention_cases(SPLASH, "float32", unit=UNIT, head_dim=HEAD)[:2]

    first, second = (case.name for case in cases())

    def record(case, *rest):
        names.append(case.name)
        if case.name == second and not is_over.is_set():
            is_over.wait(30)
        return compare_on(case, *rest)

    monkeypatch.setattr(Case, "compare_on", record)
    slow = functools.partial(kernel_trials.compare, seconds=8)
    with monkeypatch.context() as patch:
        patch.setattr(kernel_trials, "compare", slow)
        made, told = choose(attention_trial(cases=cases))
    is_over.set()
    assert made == {} and f"holds in 1 of 2 cases ({first})" in told
    assert f"too short for the others ({second}), so the next start compares them" in told
    (file,) = cache.iterdir()
    assert json.loads(file.read_text()) == {"failure": None, "held": [first], "left": [second]}
    names.clear()
    made, told = choose(attention_trial(Spoiled(), cases=cases))  # fails in what was left
    assert names == [second] and made == {"attention": "blockwise"} and second in told
    made, told = choose(attention_trial(cases=cases))
    assert names == [second] and made == {"attention": "blockwise"}


def test_all_devices_of_a_process_are_compared(cache):
    """The first device computes right, and the second one does not."""

    def attend(*inputs):
        out = SPLASH(*inputs)
        factor = jnp.asarray([1.0, 1.1], out.dtype)[jax.lax.axis_index("device")]
        return factor * out

    verdict = compare(attention_trial(attend), jax.devices()[:2])
    assert "its error on device 1 is 0.1" in verdict.failure
    assert compare(attention_trial(), jax.devices()[:2]).failure is None


def test_a_spoiled_kernel_is_replaced_and_named_and_compared_once(cache, compared):
    for _ in range(2):
        made, told = choose(attention_trial(Spoiled()), experts_trial(spoiled_experts))
        assert made == {"attention": "blockwise", "experts": "blocks"}
        assert "the attention kernel splash is replaced by blockwise, because it failed" in told
        assert "the kernel of ragged experts is replaced by blocks" in told
        assert re.search(r"causal, float32: its error is 0\.0\d+, and rounding explains", told)
        assert re.search(r"\(delete /\S+\.json to compare it again\)", told)
    assert compared == ["splash", "ragged"] and len([*cache.iterdir()]) == 2


def test_ragged_products_hold():
    assert compare(experts_trial(apply_ragged), jax.devices()[:1]).failure is None


def test_a_damaged_entry_is_compared_again(cache, compared):
    choose(attention_trial(Spoiled()))
    (file,) = cache.iterdir()
    whole = file.read_text()
    for damaged in (whole[:-5], "", "[]", '{"failure": null}', "{}"):
        file.write_text(damaged)
        made, _ = choose(attention_trial(Spoiled()))
        assert made == {"attention": "blockwise"} and file.read_text() == whole
    assert len(compared) == 6
    assert [*cache.iterdir()] == [file]


def test_another_device_driver_version_or_source_is_compared_again(
    cache, compared, monkeypatch, tmp_path
):
    choose(attention_trial())
    device = jax.devices()[0]
    client = types.SimpleNamespace(platform_version="another driver")
    other = types.SimpleNamespace(device_kind="another", client=device.client, id=0)
    digest = functools.partial(kernel_trials._digest_of_trial, attention_trial())
    names = {digest([device]), digest([other]), digest([device, other])}
    names.add(digest([types.SimpleNamespace(device_kind=device.device_kind, client=client, id=0)]))
    head = dataclasses.replace(attention_trial(), variant="head_dim 8")
    names.add(kernel_trials._digest_of_trial(head, [device]))
    with monkeypatch.context() as patch:
        patch.setattr(kernel_trials, "version", lambda package: "99")
        names.add(digest([device]))
    folder = tmp_path / "lora_jax"
    sources = ("models/layers/splash.py", "models/decoder/dispatch.py", "core/routed.py")
    with monkeypatch.context() as patch:
        patch.setattr(kernel_trials.lora_jax, "__file__", str(folder / "__init__.py"))
        for source in sources:
            file = folder / source
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("changed")
            names.add(digest([device]))
    assert len(names) == 9
    assert digest([device]) in {file.name for file in cache.iterdir()}


def test_a_kernel_that_hangs_or_raises_is_replaced(cache):
    is_over = threading.Event()

    def hang(*_):
        is_over.wait(30)
        raise ValueError("too late")

    verdict = compare(attention_trial(hang), jax.devices()[:1], seconds=0.2)
    is_over.set()
    assert verdict.failure == "no case ended within 0.2 s" and not verdict.is_final

    def refuse(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    verdict = compare(attention_trial(refuse), jax.devices()[:1])
    assert "JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory" in verdict.failure
    assert not verdict.is_final

    def fail(*_):
        raise ValueError("Mosaic failed")

    made, told = choose(attention_trial(fail))
    assert made and "ValueError: Mosaic failed" in told and len([*cache.iterdir()]) == 1


def test_cases_that_the_kernel_refuses_are_passed_over():
    refused = dataclasses.replace(splash_cases()[0], refusal="no float32")
    trial = attention_trial(Spoiled(), cases=lambda: [refused])
    assert compare(trial, jax.devices()[:1]).failure is None


def test_a_kernel_by_name_is_not_compared(cache, compared):
    made, told = choose(attention_trial(Spoiled(), requested=True))
    assert made == {} and not compared and not cache.exists()
    assert (
        "--attention splash names a kernel, so the attention kernel splash is not compared" in told
    )


@pytest.mark.parametrize("spoiled", [0, 1])
def test_all_processes_replace_what_fails_in_one(spoiled, monkeypatch):
    """The other process sends its own finding; see test_two_processes_agree."""
    failures = [None, None]
    failures[spoiled] = "its error is 1"
    monkeypatch.setattr(hosts, "gather", lambda value: failures)
    made, told = choose(attention_trial())
    assert made == {"attention": "blockwise"}
    assert f"it failed in process {spoiled} on this device: its error is 1" in told


def test_auto_tries_the_kernels_of_the_platform():
    one, two = (types.SimpleNamespace(size=size) for size in (1, 2))
    config = types.SimpleNamespace(head_dim=48, hidden_size=64, num_attention_heads=2)

    def trials(name, *, ragged=False, n_experts=None, has_codes=False, mesh=one, **requested):
        found = find_trials(
            types.SimpleNamespace(active_experts=n_experts, has_codes=has_codes, config=config),
            types.SimpleNamespace(platform="tpu", ragged_kernels=ragged, mesh=mesh),
            attention=name,
            dtype="bfloat16",
            requested={"attention": "auto", "experts": "auto"} | requested,
        )
        assert all(trial.make_cases() for trial in found)
        return [(trial.option, trial.name, trial.is_requested) for trial in found]

    (case, *_) = kernel_trials._attention_cases(SPLASH, "float32", 48)
    assert case.arrays[0][0].shape[-1] == 48
    assert trials("dense") == trials("blockwise") == []
    assert trials("splash") == [("attention", "splash", False)]
    assert trials("flash", attention="flash") == [("attention", "flash", True)]
    ragged = functools.partial(trials, "dense", ragged=True, n_experts=2)
    assert ragged() == [("experts", "ragged", False)]
    assert ragged(experts="ragged") == [("experts", "ragged", True)]
    assert ragged(experts="blocks") == []
    assert trials("dense", ragged=True) == trials("dense", n_experts=2) == []
    codes = functools.partial(trials, "dense", has_codes=True)
    assert codes() == [("few_rows", "kernel", False)]
    assert codes(few_rows="kernel") == [("few_rows", "kernel", True)]
    assert codes(few_rows="xla") == codes(mesh=two) == []


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model, rows = write_model(folder / "model"), write_rows(folder / "rows.jsonl")
    options = ["--batch-size", "4", "--rank", "2", "--report-to", "none"]
    return ["--model", str(model), "--dataset", str(rows), *options]


@pytest.fixture
def kernel_of_auto(monkeypatch):
    """Lets a CPU choose a kernel by "auto", by default a spoiled one."""

    def use(kernel=Spoiled()):  # noqa: B008
        def find(outline, layout, *, attention, requested, **_):
            is_auto = requested["attention"] == "auto"
            return [attention_trial(kernel)] if is_auto else []

        monkeypatch.setattr(kernels, "find_trials", find)

    use()
    return use


def saved(folder, name="attention"):
    return re.search(rf"^{name}: (\S+)$", (folder / "config.yaml").read_text(), re.MULTILINE)[1]


def test_a_run_replaces_a_kernel_and_a_resumed_run_keeps_the_choice(
    inputs, tmp_path, compared, cache, kernel_of_auto, capsys
):
    line = [*inputs, "--output", str(tmp_path / "run")]
    main([*line, "--steps", "1", "--dry-run"])
    assert not compared and not cache.exists()
    capsys.readouterr()
    main([*line, "--steps", "1"])
    told = " ".join(capsys.readouterr().out.split())
    assert "the attention kernel splash is replaced by blockwise" in told
    assert "attention: blockwise" in told and saved(tmp_path / "run") == "blockwise"
    # The kernel would hold now, but the run keeps what it began with.
    (file,) = cache.iterdir()
    file.unlink()
    kernel_of_auto(SPLASH)
    main([*line, "--steps", "2", "--resume"])
    told = " ".join(capsys.readouterr().out.split())
    assert compared == ["splash"] and saved(tmp_path / "run") == "blockwise"
    assert "replaced" not in told and "attention: blockwise" in told
    message = fails(capsys, main, *line, "--steps", "3", "--resume", "--attention", "dense")
    assert "--attention was blockwise and is now dense" in message


def test_a_run_with_a_kernel_that_holds_stays_auto(
    inputs, tmp_path, compared, kernel_of_auto, capsys
):
    kernel_of_auto(SPLASH)
    for name in ("one", "two"):
        main([*inputs, "--output", str(tmp_path / name), "--steps", "1"])
        assert saved(tmp_path / name) == "auto"
    told = capsys.readouterr().out
    assert compared == ["splash"] and told.count("with dense arithmetic …") == 1


def test_a_cpu_compares_nothing(inputs, tmp_path, compared, cache):
    main([*inputs, "--output", str(tmp_path / "run"), "--steps", "1"])
    assert not compared and not cache.exists()


def quantized_leaves(params):
    return [leaf for leaf in jax.tree.leaves(params, is_leaf=is_coded) if is_coded(leaf)]


def test_few_rows_are_multiplied_by_xla_where_the_kernel_fails(
    inputs, tmp_path, compared, monkeypatch, capsys
):
    monkeypatch.setattr(kernels, "find_trials", lambda *_, **__: [few_rows_trial(layer=1)])
    allowed, load = [], begin.load_base

    def loaded(*args):
        base = load(*args)
        allowed.extend(leaf.allows_kernel for leaf in quantized_leaves(base.params))
        return base

    monkeypatch.setattr(begin, "load_base", loaded)
    line = [*inputs, "--quantize", "int8", "--output", str(tmp_path / "run"), "--steps"]
    main([*line, "1"])
    told = " ".join(capsys.readouterr().out.split())
    assert "the kernel for few rows is replaced by xla" in told and compared == ["kernel"]
    assert saved(tmp_path / "run", "few_rows") == "xla"
    assert allowed and not any(allowed)
    monkeypatch.setattr(kernels, "find_trials", lambda *_, **__: [])
    main([*line, "2", "--resume"])
    assert saved(tmp_path / "run", "few_rows") == "xla" and not any(allowed)
    message = fails(capsys, main, *inputs, "--few-rows", "xla", "--output", str(tmp_path / "x"))
    assert "--few-rows xla has no effect" in message and "is not quantized" in message
    kernel = [*line[:-1], "--few-rows", "kernel", "--overwrite"]
    assert "--few-rows kernel runs only on a TPU" in fails(capsys, main, *kernel)


def test_generate_replaces_the_kernel_for_few_rows(inputs, compared, monkeypatch, capsys):
    trees = []

    class Loaded:
        def __init__(self, model, params, *_):
            trees.append(params)

    monkeypatch.setattr(generate, "LoadedAdapters", Loaded)
    monkeypatch.setattr(generate, "answer_all", lambda *_: None)
    monkeypatch.setattr(generate, "stream_answers", lambda *_: 0)
    words = ["--model", inputs[1], "--prompt", "a"]
    generate.main(words)
    assert not compared and "kernel" not in capsys.readouterr().err
    monkeypatch.setattr(generate, "find_trials", lambda *_, **__: [few_rows_trial(layer=1)])
    monkeypatch.setattr(generate, "without_rows_kernel", lambda params: "replaced")
    generate.main(words)
    generate.main(words)
    told = " ".join(capsys.readouterr().err.split())
    assert trees[1:] == ["replaced"] * 2 and compared == ["kernel"]
    assert told.count("the kernel for few rows is replaced by xla") == 2


def test_a_tree_without_the_kernel_multiplies_the_same():
    stack = encode(jnp.asarray(normal(1, (3, 256, 128))), "int8")
    tree = without_rows_kernel({"kernel": stack, "bias": jnp.ones(3)})
    x = jnp.ones((5, 256))
    assert stack.rows_kernel(x, (), {}) is not None
    assert tree["kernel"].rows_kernel(x, (), {}) is None
    assert jnp.array_equal(tree["kernel"].as_array(), stack.as_array())


def test_a_server_replaces_a_kernel(inputs, compared, monkeypatch, capsys):
    monkeypatch.setattr(server, "find_trials", lambda *_, **__: [attention_trial(Spoiled())])
    outline = read_model_info(inputs[1])
    options = ServeOptions(model=inputs[1])
    console = Console(file=io.StringIO(), width=10_000)
    arguments = (options, outline, layout_of_one_device(), 1024, console)
    auto = {"attention": "auto", "experts": "auto", "few_rows": "auto"}
    assert server.choose_kernels(*arguments) == auto | {"attention": "blockwise"}
    assert "the attention kernel splash is replaced by blockwise" in console.file.getvalue()
    monkeypatch.setattr(server, "find_trials", find_trials)
    assert server.choose_kernels(*arguments) == auto
    assert compared == ["splash"]


_ONE_OF_TWO = """
import json, sys
from pathlib import Path
import jax
port, process, spoiled = map(int, sys.argv[1:])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
from rich.console import Console
from tests.train.run.test_kernel_trials import SPLASH, Spoiled, attention_trial
from train.run.kernel_trials import choose_replacements
kernel = Spoiled() if process == spoiled else SPLASH
devices = jax.local_devices()
made = choose_replacements([attention_trial(kernel)], devices, Console(width=10_000))
print(json.dumps(made))
"""


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    """The second process has a spoiled kernel, and a cache of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for process in range(2):
        folder = tmp_path / str(process)
        environment = {**os.environ, "XDG_CACHE_HOME": str(folder), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", _ONE_OF_TWO, port, process, 1]
        processes.append(
            subprocess.Popen(
                [*map(str, command)],
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        assert json.loads(out.splitlines()[-1]) == {"attention": "blockwise"}
        assert "because it failed in process 1 on this device" in out
