"""Tests find the same surroundings wherever they run, and keep compiled programs whole."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests.surroundings import KEEP, MOST_BYTES, ROOT, KeptPrograms, isolate

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


def kept_programs(folder, worker):
    home = folder / worker
    surroundings = {"LORA_JAX_TESTS_HOME": str(home), KEEP: "1"}
    return KeptPrograms(surroundings | {"LORA_JAX_TESTS_CACHE": str(folder / "cache")}, worker)


def test_programs_are_kept_where_a_session_ends_and_shared_by_links(tmp_path):
    first, second = (kept_programs(tmp_path, worker) for worker in ("gw0", "gw1"))
    for programs, name in ((first, "one"), (second, "two")):
        (programs.open() / name).write_text(name)
    first.close()
    third = kept_programs(tmp_path, "gw2")
    assert os.listdir(third.open()) == ["one"], "the second has not ended"
    second.close()
    third.close()
    assert {p.name: p.read_text() for p in first.kept.iterdir()} == {"one": "one", "two": "two"}
    assert (first.kept / "one").samefile(third.own / "one")


def test_too_many_programs_make_room(tmp_path):
    programs = kept_programs(tmp_path, "gw0")
    (programs.open() / "one").write_text("one")
    programs.close()
    with (programs.kept / "large").open("wb") as file:
        file.truncate(MOST_BYTES)  # a hole: it takes no room
    assert os.listdir(kept_programs(tmp_path, "gw1").open()) == []


def test_none_are_kept_unless_the_user_wants_it(tmp_path):
    surroundings = {"LORA_JAX_TESTS_HOME": "h", "LORA_JAX_TESTS_CACHE": str(tmp_path)}
    programs = KeptPrograms(surroundings, "gw0")
    assert programs.open() is None
    programs.close()
    assert os.listdir(tmp_path) == []
