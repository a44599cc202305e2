"""Gives a test session surroundings of its own: an environment, a home, folders, kept programs.

It is imported before JAX, which reads its environment once.
"""

import hashlib
import os
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Mapping, MutableMapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import jaxlib

ROOT = Path(__file__).parent.parent
# PYTHONPATH of processes that find the checkout, and no torch.
WITHOUT_TORCH = os.pathsep.join([str(ROOT / "tests" / "without_torch"), str(ROOT)])
# Set by the first process of a session, for those that it starts.
_HOME, _CACHE = "LORA_JAX_TESTS_HOME", "LORA_JAX_TESTS_CACHE"
# The folder of compiled programs that are kept between sessions; "none" keeps none.
STORE = "LORA_JAX_TESTS_PROGRAMS"
ISA = "LORA_JAX_TESTS_ISA"  # such as AVX2: as on a CPU without newer instructions
MOST_BYTES = 2**30  # of kept programs; a session that finds more of them begins anew
_PROGRAMS = "programs-"  # begins the names of the store's folders: one for each CPU and JAX
# Settings of the libraries that lora_jax stands on, of trackers, and of terminals.
_FOREIGN = (
    "JAX_", "XLA_", "TF_", "LIBTPU_", "TPU_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_",
    "TOKENIZERS_", "WANDB_", "MLFLOW_", "TRACKIO_", "KERAS_", "MPL", "XDG_", "COLUMNS", "LINES",
    "NO_COLOR", "FORCE_COLOR", "PYTHONPATH", "PYTHONHASHSEED", "PYTEST_ADDOPTS",
    "PYTHONDONTWRITEBYTECODE",
)  # fmt: skip


def xla_flags(environ: Mapping[str, str]) -> str:
    """Returns flags by which compiling takes half the time: nobody runs these programs for long.

    Newer jaxlibs have no older emitters of fusions, and end the process at a flag that they do not
    know. `ISA` in the environment names the CPU's newest instructions that programs may use.
    """
    flags = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    if tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    if isa := environ.get(ISA):
        flags.append(f"--xla_cpu_max_isa={isa}")
    return " ".join(flags)


def share_contexts() -> None:
    """Has JAX lower ten programs in one context of MLIR, as it does by itself from 0.11 on.

    A context takes 3 ms to make: a twelfth of the fast suite.
    """
    if tuple(map(int, jaxlib.__version__.split(".")[:2])) >= (0, 11):
        return
    from jax._src.interpreters import mlir

    make, made = mlir.make_ir_context, threading.local()

    def context() -> Any:
        uses = getattr(made, "uses", 0)
        if uses % 10 == 0:  # what a context interns, it keeps
            made.context = make()
        made.uses = uses + 1
        return made.context

    mlir.make_ir_context = context


def remember_parsers() -> None:
    """Has tyro describe the same options once in a process: it takes 40 ms, a tenth of the tests.

    A description depends on the options' type and default values alone. Where tyro lacks a name
    that is used here, each command line has its own.
    """
    try:
        from tyro import _parsers
    except ImportError:
        return
    specification = getattr(_parsers, "ParserSpecification", None)
    describe = getattr(specification, "from_callable_or_type", None)
    if describe is None:
        return
    descriptions: dict[Any, Any] = {}

    def remembered(options: Any, *args: Any, **settings: Any) -> Any:
        if args or settings.get("parent_classes"):  # of a part of the options
            return describe(options, *args, **settings)
        key = (options, repr(sorted(settings.items())))
        if key not in descriptions:
            # The settings stay too: the key may have addresses of them.
            descriptions[key] = describe(options, **settings), settings
        return descriptions[key][0]

    specification.from_callable_or_type = staticmethod(remembered)


def keep_single_device_programs(folder: Path | None) -> str | None:
    """Has JAX's cache in a folder hold the programs for one device of a CPU alone.

    A step over several devices that comes from a cache may wait for itself, until XLA's CPU
    collectives end the process. The choice is made where JAX's compiling is told its devices, so
    that it does not matter what compiles a program. Another folder's cache is as JAX makes it.

    Returns:
      None, or why no program is kept: there is no folder, or JAX lacks a name that is used here.
    """
    if folder is None:
        return f"no compiled programs are kept: {STORE} is none"
    import jax
    from jax._src import compiler

    names = ("compile_or_get_cached", "backend_compile_and_load")
    if missing := [name for name in names if not hasattr(compiler, name)]:
        return f"no compiled programs are kept: this JAX has no jax._src.compiler.{missing[0]}"
    cached = compiler.compile_or_get_cached

    def compile_or_get_cached(
        backend: Any,
        computation: Any,
        devices: Any,
        compile_options: Any,
        host_callbacks: Any,
        executable_devices: Any,
        *profiler: Any,
    ) -> Any:
        is_kept = devices.size == 1 and backend.platform == "cpu"
        if is_kept or jax.config.jax_compilation_cache_dir != str(folder):
            arguments = (compile_options, host_callbacks, executable_devices, *profiler)
            return cached(backend, computation, devices, *arguments)
        return compiler.backend_compile_and_load(
            backend, computation, executable_devices, compile_options, host_callbacks
        )

    compiler.compile_or_get_cached = compile_or_get_cached
    return None


def _store(setting: str | None, cache: Path) -> str:
    """Returns the folder of kept programs: the user's, or one in the user's cache folder."""
    if setting == "none":
        return setting
    return str(Path(setting).absolute() if setting else cache / "tests" / "programs")


def isolate(environ: MutableMapping[str, str]) -> Path:
    """Replaces what a user's environment says by what all tests share; returns the session's home.

    Processes that the session starts, workers among them, find the same home.
    """
    if _HOME in environ:
        for name in ("COLUMNS", "LINES"):  # readline sets them for what its process starts
            environ.pop(name, None)
        return Path(environ[_HOME])
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_jax"
    pip = Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "pip" / "pip.conf"
    for name in [name for name in environ if name.startswith(_FOREIGN)]:
        del environ[name]
    home = Path(tempfile.mkdtemp(prefix="lora_jax-tests-"))
    (home / ".cache" / "lora_jax").mkdir(parents=True)
    for file in cache.glob("*"):  # of packages: each is checked against its SHA-256
        if file.is_file():
            (home / ".cache" / "lora_jax" / file.name).symlink_to(file)
    if pip.exists():
        environ.setdefault("PIP_CONFIG_FILE", str(pip))  # which index a package comes from
    environ.update(
        {
            _HOME: str(home),
            _CACHE: str(cache),
            STORE: _store(environ.get(STORE), cache),
            "HOME": str(home),
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # of processes that tests start
            "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",  # lowering takes a fifth less
            "MPLCONFIGDIR": str(cache / "tests" / "matplotlib"),  # its list of fonts
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": xla_flags(environ),
        }
    )
    return home


def end(environ: MutableMapping[str, str]) -> None:
    """Removes the session's home; packages that it fetched are kept in the user's cache folder."""
    home, cache = Path(environ[_HOME]), Path(environ[_CACHE])
    for file in (home / ".cache" / "lora_jax").glob("*"):
        if file.is_file() and not file.is_symlink():
            try:
                cache.mkdir(parents=True, exist_ok=True)
                _link(file, cache)
            except OSError:
                pass
    shutil.rmtree(home, ignore_errors=True)


def _fingerprint(environ: Mapping[str, str]) -> str:
    """Returns a name for what programs depend on beside what JAX itself makes a key of."""
    cpu = platform.processor() + platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu += "".join(sorted({x for x in info.read_text().splitlines() if x[:5] == "flags"}))
    text = "\n".join([sys.version, jaxlib.__version__, xla_flags(environ), cpu])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _AllButTorch(PathFinder):
    @classmethod
    def find_spec(cls, name: str, *args: Any) -> ModuleSpec | None:
        return None if name == "torch" else super().find_spec(name, *args)


def hide_torch() -> None:
    """Has this process find no torch, which others import where it is there: it takes seconds."""
    sys.meta_path[sys.meta_path.index(PathFinder)] = _AllButTorch


class KeptPrograms:
    """Compiled programs that outlive a session, in a store of their own.

    JAX does not write a program's file in one piece, so that no two processes may share a folder:
    each has its own, of links to all that is kept. Processes exchange programs between two files.
    """

    def __init__(self, environ: MutableMapping[str, str], worker: str) -> None:
        """Reads where programs are kept; nowhere, if the user wants none."""
        store = environ[STORE]
        self.kept = None if store == "none" else Path(store) / (_PROGRAMS + _fingerprint(environ))
        self.own = Path(environ[_HOME]) / "programs" / worker

    def open(self) -> Path | None:
        """Returns this process's folder for JAX's compilation cache, or None."""
        if self.kept is None:
            return None
        self.own.mkdir(parents=True, exist_ok=True)
        try:
            self.kept.mkdir(parents=True, exist_ok=True)
            folders = [*self.kept.parent.glob(f"{_PROGRAMS}*")]  # the store may be a user's folder
            if sum(map(_size, folders)) > MOST_BYTES:
                for folder in folders:
                    shutil.rmtree(folder, ignore_errors=True)
            for program in self.kept.glob("*"):
                _link(program, self.own)
        except OSError:  # a user without write access, or without room: programs are made anew
            pass
        return self.own

    def share(self) -> None:
        """Exchanges programs with the store, in which other processes find them from then on.

        It is called between two files of tests, while this process writes no program.
        """
        if self.kept is None:
            return
        try:
            self.kept.mkdir(parents=True, exist_ok=True)
            own_names, kept_names = set(os.listdir(self.own)), set(os.listdir(self.kept))
            for name in own_names - kept_names:
                _link(self.own / name, self.kept)
            for name in kept_names - own_names:
                _link(self.kept / name, self.own)
        except OSError:
            pass


def _link(file: Path, folder: Path) -> None:
    """Puts a file into another folder too: by a link where it can, whole or not at all."""
    there = folder / file.name
    if there.exists():
        return
    try:
        os.link(file, there)
    except FileExistsError:
        pass
    except OSError:  # another file system
        part = folder / f".{file.name}.{os.getpid()}"
        shutil.copyfile(file, part)
        part.replace(there)


def _size(folder: Path) -> int:
    """Returns the bytes of the files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
