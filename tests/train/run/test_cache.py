"""The scripts keep compiled programs for later runs: options, settings of JAX, later hits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.support import THOROUGH
from tests.surroundings import WITHOUT_TORCH
from tests.train.tiny import write_model, write_rows
from train import sft
from train.console.errors import UserError
from train.export import __main__ as export
from train.generate import __main__ as generate
from train.processes.cache import keep_compiled
from train.run.log import read_metrics

ROOT = Path(__file__).parents[3]
SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
)
# A process that tells how many programs it took from the cache; even small ones are kept.
COUNTING = """
import jax, json, sys
hits = []
event = "/jax/compilation_cache/cache_hits"
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name == event else 0)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
{run}
print(json.dumps(len(hits)))
"""


@pytest.fixture(scope="module")
def no_kept_programs():
    """Scripts see JAX's settings, as for users."""


@pytest.fixture
def home(tmp_path, monkeypatch, compiles_anew):
    """The user's cache folder, with JAX's settings as they are in a new process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_enable_compilation_cache", True)
    yield tmp_path / "caches"
    for name, value in before.items():
        jax.config.update(name, value)


def process(run, *args, **env):
    """(the hits, what a fresh process printed), of a program that is counted."""
    env = {name: str(value) for name, value in env.items()}
    done = subprocess.run(
        [sys.executable, "-c", COUNTING.format(run=run), *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "true", **env}
        | {"PYTHONPATH": WITHOUT_TORCH},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def files(folder):
    return {path.name for path in folder.glob("*-cache")}


def test_the_default_is_the_users_cache_folder_and_it_is_bounded(home):
    assert keep_compiled(None) == f"Compiled programs are cached in {home}/lora_jax/jax"
    assert jax.config.jax_compilation_cache_dir == f"{home}/lora_jax/jax"
    assert 2**30 <= jax.config.jax_compilation_cache_max_size <= 2**34
    assert (home / "lora_jax" / "jax").is_dir()
    assert keep_compiled(None) == f"Compiled programs are cached in {home}/lora_jax/jax"


def test_a_folder_of_ones_own(home, tmp_path):
    folder = tmp_path / "mine"
    assert keep_compiled(str(folder)) == f"Compiled programs are cached in {folder}"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_compilation_cache_max_size == -1, "it may hold what others put there"
    assert not home.exists()


def test_off_keeps_nothing(home):
    assert keep_compiled("off") is None
    assert jax.config.jax_compilation_cache_dir is None and not home.exists()


def test_a_folder_that_cannot_be_written_is_a_warning(home, tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"
    said = keep_compiled(str(folder))
    assert said is not None and said.startswith(
        f"warning: Compiled programs are not cached, because {folder} cannot be written (Not a "
        "directory)"
    )
    assert jax.config.jax_compilation_cache_dir is None


def test_what_jax_was_told_comes_first(home, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    assert keep_compiled(None) == f"Compiled programs are cached in {tmp_path}/theirs"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
    assert jax.config.jax_compilation_cache_max_size == -1 and not home.exists()
    for asked in ("off", str(tmp_path / "mine")):
        with pytest.raises(
            UserError, match=r"JAX_COMPILATION_CACHE_DIR.*theirs.*Remove one of the two"
        ):
            keep_compiled(asked)


def test_where_jax_was_told_to_keep_nothing(home, tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    assert keep_compiled(None) is None and keep_compiled("off") is None and not home.exists()
    with pytest.raises(UserError, match="JAX_ENABLE_COMPILATION_CACHE"):
        keep_compiled(str(tmp_path / "mine"))


def test_many_processes_keep_programs_only_where_they_are_told_to(home, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    said = keep_compiled(None)
    assert said is not None and "--compilation-cache" in said
    assert jax.config.jax_compilation_cache_dir is None and not home.exists()
    keep_compiled(str(tmp_path / "shared"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "shared")


def test_programs_of_several_cpu_devices_are_not_kept(home, tmp_path, monkeypatch):
    monkeypatch.setattr("train.processes.cache.all_devices", lambda: jax.devices()[:2])
    assert keep_compiled("off") is None
    assert "several CPU devices" in (keep_compiled(None) or "")
    with pytest.raises(UserError, match=r"--compilation-cache mine: .*Remove the option"):
        keep_compiled("mine")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    keep_compiled(None)
    double = jax.jit(lambda x: x * 2)
    double(jax.numpy.ones(3)).block_until_ready()
    assert not home.exists() and not (tmp_path / "theirs").exists()
    monkeypatch.setattr("train.processes.cache.all_devices", lambda: jax.devices()[:1])
    keep_compiled(None)
    double(jax.numpy.ones(5)).block_until_ready()
    assert files(tmp_path / "theirs")


@pytest.mark.parametrize("script", [sft, export, generate])
def test_the_scripts_have_the_option(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert "--compilation-cache" in capsys.readouterr().out


SMALL = (
    "from train.processes.cache import keep_compiled;"
    "print(keep_compiled(None));"
    "jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((5, 5)))"
)


@pytest.mark.slow
def test_a_later_process_takes_programs_from_the_cache(tmp_path):
    folder = tmp_path / "lora_jax" / "jax"
    first, said = process(SMALL, XDG_CACHE_HOME=tmp_path)
    kept = files(folder)
    assert first == 0 and kept and f"Compiled programs are cached in {folder}" in said
    again, _ = process(SMALL, XDG_CACHE_HOME=tmp_path)
    assert again > 0 and files(folder) == kept
    (path,) = folder.glob("jit__lambda*-cache")  # half of a program, as a kill may leave it
    path.write_bytes(path.read_bytes()[:-100])
    damaged, said = process(SMALL, XDG_CACHE_HOME=tmp_path)
    assert damaged == again - 1 and "Error reading persistent compilation cache" in said


@pytest.mark.slow
def test_processes_share_the_folder(tmp_path):
    run = COUNTING.format(run=SMALL.replace("jax.jit(", "[jax.jit(").replace("5, 5", "n, n"))
    run = run.replace("((n, n)))", "((n, n))) for n in range(2, 14)]")
    env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true", "XDG_CACHE_HOME": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", run],
            cwd=ROOT,
            env={**env, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for one in started:
        _, err = one.communicate(timeout=300)
        assert one.returncode == 0 and "cache" not in err, err[-3000:]
    folder = tmp_path / "lora_jax" / "jax"
    assert len(list(folder.glob("jit__lambda*-cache"))) == 12
    assert len(list(folder.glob("*-cache"))) == len(list(folder.glob("*-atime")))


@pytest.mark.slow
def test_a_second_run_of_a_script_compiles_nothing_again_and_loses_nothing(tmp_path):
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    options = ["--model", model, "--dataset", rows, "--batch-size", 4, "--rank", 2, "--steps", 3]
    train = "from train.sft import main; main(sys.argv[1:])"
    folder = tmp_path / "caches" / "lora_jax" / "jax"

    def trained(name, *more):
        out = tmp_path / name
        hits, said = process(
            train, *options, "--output", out, *more, XDG_CACHE_HOME=tmp_path / "caches"
        )
        losses = [line["loss"] for line in read_metrics(out)]
        report = json.loads((out / "report.json").read_text())
        return hits, said, losses, report["compiled_bytes"]

    first, second = trained("first"), trained("second")
    assert first[1].count(f"Compiled programs are cached in {folder}") == 1
    step = [name for name in files(folder) if name.startswith("jit_step")]
    assert len(step) == 1, files(folder)
    assert second[0] > first[0] and second[2:] == first[2:]

    if not THOROUGH:
        return
    kept = files(folder)
    off = trained("off", "--compilation-cache", "off")
    assert off[0] == 0 and files(folder) == kept and "compiled programs" not in off[1]
    assert off[2:] == first[2:]
    ask = "from train.generate.__main__ import main; main(sys.argv[1:])"
    args = ["--adapter", tmp_path / "first" / "adapter", "--max-new-tokens", 5, "--prompt", "1"]
    answers = [process(ask, *args, XDG_CACHE_HOME=tmp_path / "caches") for _ in range(2)]
    assert answers[1][0] > answers[0][0]
