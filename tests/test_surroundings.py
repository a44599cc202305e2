"""Tests find the same surroundings wherever they run, and keep compiled programs whole."""

import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import array
from tests.surroundings import (
    ISA,
    MOST_BYTES,
    ROOT,
    STORE,
    KeptPrograms,
    isolate,
    keep_single_device_programs,
    xla_flags,
)

HOSTILE = {
    "HF_HOME": "/elsewhere",
    "JAX_ENABLE_X64": "1",
    "WANDB_MODE": "online",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=3",
    "COLUMNS": "20",
}


def test_surroundings_are_clean():
    assert os.listdir() == [] and ROOT not in [Path.cwd(), *Path.cwd().parents]
    assert not {"HF_HOME", "JAX_ENABLE_X64", "WANDB_MODE", "COLUMNS"} & set(os.environ)
    assert "device_count" not in os.environ["XLA_FLAGS"] and len(jax.devices()) == 4
    assert jnp.ones(3).dtype == jnp.float32  # without JAX_ENABLE_X64
    assert Path.home().name.startswith("lora_jax-tests-")
    assert os.listdir(Path.home() / ".cache") == ["lora_jax"]
    Path("runs").mkdir()  # the next test does not find it


@pytest.mark.filterwarnings("ignore")
def test_what_is_deprecated_fails_in_our_code_alone():
    def warn(module):
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module)

    warn("others.lora_jax")
    for module in ("lora_jax", "lora_jax.core.weight", "train.sft"):
        with pytest.raises(DeprecationWarning, match="old"):
            warn(module)


def test_an_empty_folder_each():
    assert os.listdir() == []


@pytest.mark.slow
def test_a_users_environment_and_folder_change_nothing(tmp_path):
    (tmp_path / "runs" / "sql").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    outer = {k: v for k, v in os.environ.items() if not k.startswith("LORA_JAX_TESTS_")}
    outer |= {**HOSTILE, "HOME": str(tmp_path / "home")}
    outer["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml")]
    command += ["-o", "addopts=--import-mode=importlib", f"{__file__}", "-k", "clean or each"]
    done = subprocess.run(command, cwd=tmp_path, env=outer, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


def test_processes_of_a_session_share_its_home():
    found = {"LORA_JAX_TESTS_HOME": "/there", "COLUMNS": "80"}
    assert isolate(found) == Path("/there") and "COLUMNS" not in found


def kept_programs(folder, worker, store="store"):
    home = folder / worker
    surroundings = {"LORA_JAX_TESTS_HOME": str(home), STORE: str(folder / store)}
    return KeptPrograms(surroundings, worker)


def test_programs_are_shared_by_links_once_a_process_shares_its_own(tmp_path):
    first, second = (kept_programs(tmp_path, worker) for worker in ("gw0", "gw1"))
    for programs, name in ((first, "one"), (second, "two")):
        (programs.open() / name).write_text(name)
    first.share()
    third = kept_programs(tmp_path, "gw2")
    assert os.listdir(third.open()) == ["one"], "the second has shared nothing"
    second.share()
    third.share()
    assert sorted(os.listdir(third.own)) == ["one", "two"], "a process finds others' programs"
    assert {p.name: p.read_text() for p in first.kept.iterdir()} == {"one": "one", "two": "two"}
    assert (first.kept / "one").samefile(third.own / "one")


def test_too_many_programs_make_room_and_other_files_stay(tmp_path):
    programs = kept_programs(tmp_path, "gw0")
    (programs.open() / "one").write_text("one")
    programs.share()
    (tmp_path / "store" / "others.txt").write_text("of the user")
    with (programs.kept / "large").open("wb") as file:
        file.truncate(MOST_BYTES)  # a hole: it takes no room
    assert os.listdir(kept_programs(tmp_path, "gw1").open()) == []
    assert (tmp_path / "store" / "others.txt").read_text() == "of the user"


def test_where_programs_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outer = {"HOME": "/h", "XDG_CACHE_HOME": "/c"}
    stores = {"": "/c/lora_jax/tests/programs", "near": str(tmp_path / "near"), "none": "none"}
    for setting, store in stores.items():
        environ = outer | {STORE: setting}
        shutil.rmtree(isolate(environ))
        assert environ[STORE] == store


FEATURES = """
import re

import jax
import jax.numpy as jnp
from jax.experimental.serialize_executable import serialize

payload = serialize(jax.jit(jnp.sin).lower(jnp.ones(64)).compile())[0]
print(*sorted({word.decode() for word in re.findall(rb"[+](?:avx|sse)[\\w.]*", payload)}))
"""


def features(flags):
    """Returns the instructions that a program of another process may use."""
    environ = os.environ | {"XLA_FLAGS": flags}
    command = [sys.executable, "-c", FEATURES]
    return subprocess.run(command, env=environ, capture_output=True, text=True).stdout.split()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="it has no such names")
def test_the_compiler_is_told_the_newest_instructions_of_a_cpu():
    assert "+avx" in features(xla_flags({})), "the control"
    older = features(xla_flags({ISA: "SSE4_2"}))
    assert "+sse4.2" in older and not any(name.startswith("+avx") for name in older)
    if ISA in os.environ:  # this session's
        assert f"--xla_cpu_max_isa={os.environ[ISA]}" in os.environ["XLA_FLAGS"]
    surroundings = {"LORA_JAX_TESTS_HOME": "h", STORE: "s"}
    folders = {KeptPrograms(surroundings | isa, "gw0").kept for isa in ({}, {ISA: "AVX2"})}
    assert len(folders) == 2, "programs of other instructions are kept apart"


def test_none_are_kept_where_the_user_wants_none(tmp_path):
    programs = KeptPrograms({"LORA_JAX_TESTS_HOME": str(tmp_path), STORE: "none"}, "gw0")
    assert programs.open() is None
    programs.share()
    assert os.listdir(tmp_path) == []
    assert "LORA_JAX_TESTS_PROGRAMS is none" in keep_single_device_programs(None)


def test_a_jax_without_the_name_keeps_nothing_and_says_so(tmp_path, monkeypatch):
    for name in ("compile_or_get_cached", "backend_compile_and_load"):
        with monkeypatch.context() as patch:
            patch.delattr(f"jax._src.compiler.{name}")
            line = keep_single_device_programs(tmp_path)
        assert f"no compiled programs are kept: this JAX has no jax._src.compiler.{name}" == line


def run_anew(name, x):
    """Runs a program of that name, which this process has not compiled yet."""

    def doubled(x):
        return 2.5 * x.sum()

    doubled.__name__ = name
    return jax.jit(doubled)(x)


def kept_as(name):
    """Returns the files of a program in this process's folder."""
    folder = jax.config.jax_compilation_cache_dir
    return list(Path(folder).glob(f"jit_{name}-*")) if folder else []


@pytest.fixture(scope="module")
def over_devices():
    """An array on one device and one over two, each run by a program before any test's fixture."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    arrays = {
        "for_one_device": array(np.ones(6, np.float32)),
        "for_two_devices": jax.device_put(np.ones(6, np.float32), sharding),
    }
    for name, x in arrays.items():
        for file in kept_as(name):  # by an earlier session
            file.unlink()
        run_anew(name, x)
    return arrays


def test_programs_for_one_device_alone_are_written_and_read(over_devices):
    if not jax.config.jax_compilation_cache_dir:
        pytest.skip(f"{STORE} is none")
    hits = []
    note = lambda event, **_: hits.append(event)  # noqa: E731
    jax.monitoring.register_event_listener(note)
    read, written = {}, {}
    for name, x in over_devices.items():
        before = hits.count("/jax/compilation_cache/cache_hits")
        assert float(run_anew(name, x)) == 15
        read[name] = hits.count("/jax/compilation_cache/cache_hits") - before
        written[name] = len(kept_as(name))
    assert read == {"for_one_device": 1, "for_two_devices": 0}
    assert written["for_one_device"] >= 1 and written["for_two_devices"] == 0
