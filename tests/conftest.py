"""Settings for all tests: surroundings of their own, four devices, no silent promotion."""

import gc
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

gc.disable()  # until all is imported: little of it is garbage, and XLA looks at its own each time
sys.dont_write_bytecode = False

from tests.selection import selects_none  # noqa: E402
from tests.surroundings import (  # noqa: E402
    KeptPrograms,
    end,
    hide_torch,
    isolate,
    keep_single_device_programs,
    remember_parsers,
    share_contexts,
)

HOME = isolate(os.environ)  # before JAX reads its environment

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
PROGRAMS = KeptPrograms(os.environ, WORKER)
MOST_COMPILED = 400
OURS = r"error::DeprecationWarning:(lora_jax|train)\b"
WITHOUT_SELECTED = pytest.StashKey[list[Path]]()  # files of which -m selects no test
COMPILED = []  # an entry for each program since they were last dropped
# Files that take from half a minute to minutes in CI, the longest first.
LONGEST = (
    *("train/test_mesh.py", "train/plan/test_plan_tpu.py", "train/test_rollouts.py"),
    *("foreign/test_foreign.py", "train/serve/test_recipes.py", "train/compare/test_compare.py"),
    *("train/compare/test_rewards.py", "train/launch/test_launch.py", "train/test_live_runs.py"),
    *("train/test_killed.py", "train/plan/test_plan_measured.py", "train/test_preferences.py"),
    *("train/live/test_turn_processes.py", "bank/test_together_models.py"),
    *("train/serve/test_load.py", "train/test_trl_runs.py", "training/test_digits.py"),
    *("train/test_quantized_images.py", "train/test_sft_qwen_vl.py"),
    *("train/serve/test_kills.py", "train/compare/test_subspaces.py", "train/test_sft.py"),
    *("train/run/test_cache.py", "train/test_endings.py", "test_docs.py"),
    *("train/serve/engine/test_engine_torch.py", "train/test_progress.py"),
)
share_contexts()
remember_parsers()
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # their folder is in the key
folder = PROGRAMS.open()
WITHOUT_STORE = keep_single_device_programs(folder)
if WITHOUT_STORE is None:
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def note_compiled(event, seconds, **facts):
    """Counts the programs that are compiled, or taken from an earlier session."""
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(facts.get("fun_name"))


jax.monitoring.register_event_duration_secs_listener(note_compiled)


def pytest_configure(config):
    config.stash[WITHOUT_SELECTED] = []
    config.pluginmanager.register(SameOrder())
    if "not parity" in config.getoption("-m"):
        hide_torch()


def do_nothing():
    """Takes the place of a function of torch."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Begins each test, and the fixtures that it is the first to use, in an empty folder.

    Torch draws the same numbers in each test. Torch's accelerator has nothing to release: a test
    before this one may have imported torchax, whose device is one without an allocator, and
    accelerate's trainers raise an error there.
    """
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)  # PEFT draws A; else its values depend on the tests before
        torch.accelerator.empty_cache = do_nothing
    with tempfile.TemporaryDirectory(dir=HOME, prefix="here-") as here:
        os.chdir(here)
        try:
            return (yield)
        finally:
            os.chdir(HOME)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def standard_promotion(strict_promotion):
    """Optax raises a float to an integer's power, and multiplies by Python's numbers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def compiles_anew():
    """Takes no program from earlier sessions: for tests that count or read compilations."""
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
    kept = [getattr(jax.config, name) for name in names]

    def use(values):
        compilation_cache.reset_cache()  # JAX looks at the settings once
        for name, value in zip(names, values, strict=True):
            jax.config.update(name, value)

    use([False, None])
    yield
    use(kept)


@pytest.fixture
def compiled():
    """Returns a function: the names of the programs that were compiled since the test began."""
    start = len(COMPILED)
    return lambda: COMPILED[start:]


@pytest.fixture(autouse=True, scope="module")
def same_cache():
    """Refuses a file whose tests leave JAX's cache of programs other than they found it.

    Later files of the same process would compile all of their programs anew.
    """
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    after = {name: getattr(jax.config, name) for name in names}
    assert after == before, "a test of this file changed JAX's settings and left them so"


@pytest.fixture(autouse=True, scope="module")
def no_kept_programs(same_cache):
    """Scripts do not see that the tests keep programs: they neither say so nor find a conflict."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.processes.cache._setting", {"enable_compilation_cache": False}.get)
        yield


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Shares the programs that a file compiled, and drops them once there are many.

    The more of them live, the longer each new one takes to lower and to compile: a third longer
    after some thousand. Each also maps about nine pieces of memory, of which Linux grants a process
    65,530; the compiler that gets no more crashes.
    """
    n_compiled = len(COMPILED)
    yield
    if len(COMPILED) > n_compiled:
        PROGRAMS.share()
    if len(COMPILED) >= MOST_COMPILED:
        COMPILED.clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def tpu_compiler(monkeypatch, request):
    """Has the TPU's compiler, or skips the test: it ends the process at a flag that is not its own.

    By then this process's CPU compiler has read its flags.
    """
    assert request.node.get_closest_marker("tpu_compiler"), "mark it, so that CI runs it"
    pytest.importorskip("libtpu")
    jax.devices("cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)


@pytest.fixture
def float64():
    """Equalities of algebra are tested in double precision."""
    with jax.enable_x64(True):
        yield


class SameOrder:
    """Has all workers see the tests in one order, before pytest groups those of shared fixtures."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: str(item.path))


def pytest_collection_modifyitems(session, items):
    """Has workers begin with what takes longest, so that none waits for another's last file.

    And has whatever of ours is deprecated fail, also where a test ignores others' warnings: of all
    marks, pytest applies the session's last.
    """
    session.add_marker(pytest.mark.filterwarnings(OURS))
    if WORKER != "main":
        tests = Counter(item.path for item in items)
        place = {str(Path(__file__).parent / name): i for i, name in enumerate(LONGEST)}

        def key(item):
            path = str(item.path)
            return place.get(path, len(LONGEST)), -tests[item.path], path

        items.sort(key=key)


@pytest.hookimpl(tryfirst=True)
def pytest_ignore_collect(collection_path, config):
    """Leaves out files in which `-m` selects no test, so that they are not imported.

    pytest does not ask about a file that the command names, but about those beside it.
    """
    marks = config.getoption("-m")
    if not marks or not collection_path.match("test_*.py"):
        return None
    paths = [config.invocation_params.dir / arg.partition("::")[0] for arg in config.args]
    if any(map(collection_path.is_relative_to, paths)) and selects_none(marks, collection_path):
        config.stash[WITHOUT_SELECTED].append(collection_path)
        return True
    return None


def pytest_report_header():
    """Says where compiled programs are kept, or why they are not."""
    return WITHOUT_STORE or f"compiled programs of one device: {PROGRAMS.kept}"


def pytest_report_collectionfinish(config):
    """Says how many files were left out, and with -v which ones."""
    names = [str(path.relative_to(config.rootpath)) for path in config.stash[WITHOUT_SELECTED]]
    if not names:
        return None
    listed = f": {' '.join(names)}" if config.get_verbosity() > 0 else " (-v lists them)"
    return f"not imported, since -m selects none of their tests: {len(names)} files{listed}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Refuses a file that compiles when it is imported: each worker imports each file."""
    before = len(COMPILED)
    report = yield
    if isinstance(collector, pytest.Module) and len(COMPILED) > before and report.passed:
        report.outcome = "failed"
        report.longrepr = (
            f"{collector.path} compiles at its import: {sorted(set(COMPILED[before:]))}. Each "
            "worker would wait for it. Make arrays by tests.support.array, the rest in a fixture."
        )
    return report


class Backwards(pytest.Dir):
    """A folder whose files are imported from the last to the first."""

    def collect(self):
        return reversed([*super().collect()])


def pytest_collect_directory(path, parent):
    """Has every other worker begin at the other end: a file's asserts are rewritten once."""
    if WORKER[-1] in "13579":
        return Backwards.from_parent(parent, path=path)
    return None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection():
    """Spares the garbage collector what was imported, which stays."""
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)  # tracing makes many objects, few garbage in circles


def pytest_sessionfinish():
    """Keeps what was compiled and fetched; the session's first process ends last."""
    PROGRAMS.share()
    if WORKER == "main":
        end(os.environ)
