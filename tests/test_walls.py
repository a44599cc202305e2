"""The house's walls: imports go downward, and rooms know what is theirs to know."""

import ast
import functools
import itertools
import re
from pathlib import Path

import pytest

from tests.sources import statements

ROOT = Path(__file__).parents[1]

# The rooms from the ground up: each imports those above it in this list, never below. A room is a
# folder, or a file that stands beside the folders.
LIBRARY = """
    folders buckets init core variants rules adapt select sharding lorafy quantized optim saving
    subspace hf models peft torch __init__ training cases bank __main__
""".split()
SCRIPTS = """
    console __init__ processes reporters adapters environments options data settings run
    predict rewards tools live tasks plan generate export stages finetune script sft classify dpo
    distill prior grpo rollouts compare findings serve launch doctor check command
""".split()
ORDER = [*(f"lora_jax.{room}" for room in LIBRARY), *(f"train.{room}" for room in SCRIPTS)]
TRAINERS = ("sft", "classify", "dpo", "grpo", "distill")
# Folders whose files go downward, but whose sub-folders stand in each other's way, and why.
TOGETHER = {"lora_jax.adapt": "rules recurse into jaxprs, and the walk over these takes the rules"}
# Imported inside functions: dear to import, or not there without an extra.
LATE = {
    *(
        "PIL",
        "datasets",
        "diffusers",
        "google",
        "gguf",
        "huggingface_hub",
        "jinja2",
        "llguidance",
        "matplotlib",
        "mlflow",
        "orbax",
        "packaging",
    ),
    *(
        "pyarrow",
        "pydoc_data",
        "requests",
        "rich",
        "sklearn",
        "tensorboardX",
        "tokenizers",
        "trackio",
        "transformers",
    ),
    *("wandb", "jax.experimental"),
}
# JAX's insides, which move between releases, and the one file that imports some of them.
INSIDES = ("jax._src", "jax.extend", "jax.interpreters", "jax.lib", "jaxlib")
IMPORTER = "lora_jax.core.extend"
# A text without a match names none of them, and need not be parsed.
MAY_NAME_INSIDES = re.compile(
    r"\bjax\s*\.\s*(_src|extend|interpreters|lib)\b|\bjaxlib\b|\bfrom\s+[.\w]*jax\s+import\b"
)
# Looks at the file system, as names of modules, functions and methods.
LOOKS = {
    *("os", "pathlib", "glob", "shutil", "tempfile", "open", "exists", "is_file", "is_dir"),
    *("read_text", "read_bytes", "iterdir", "rglob", "stat", "expanduser", "resolve"),
}


parse = functools.cache(ast.parse)  # two judges read each file


def is_late(module):
    """Returns True if functions may import a module: it, or a package that it is in, is named."""
    parts = module.split(".")
    return any(".".join(parts[:n]) in LATE for n in range(1, len(parts) + 1))


def read(*folders):
    """Returns the source of each module, by its name; a package's face ends in `.__init__`."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p.read_text() for p in paths}


def imports(name, source, modules):
    """Returns the modules that one imports, but for those for type checkers alone."""
    nodes = [*statements(parse(source))]
    typing = [n for n in nodes if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    skipped = {id(inner) for one in typing for part in one.body for inner in statements(part)}
    asked = set()
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            asked |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            inside = {f"{base}.{alias.name}" for alias in node.names}
            known = {one for one in inside if one in modules or f"{one}.__init__" in modules}
            asked |= known | ({base} if inside - known else set())
    found = {one if one in modules else f"{one}.__init__" for one in asked}
    return {one for one in found if one in modules and one != name}


def graph_of(sources):
    """Returns the modules that each module imports."""
    return {name: imports(name, source, sources) for name, source in sources.items()}


def circles(graph):
    """Returns a circle of a graph as a list of its nodes; [] for none."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        path.append(node)
        found = next(filter(None, map(visit, sorted(graph.get(node, ())))), [])
        path.pop()
        done.add(node)
        return found

    return next(filter(None, map(visit, sorted(graph))), [])


def broken_walls(graph, order):
    """Returns the imports that go upward, and the rooms that have no place in the order."""
    rank = {room: at for at, room in enumerate(order)}

    def room(name):
        return ".".join(name.split(".")[:2])

    unknown = sorted({room(name) for name in graph} - set(rank))
    return [f"{one}: give it a place in the order" for one in unknown] + [
        f"{name} imports {other}, which stands above it"
        for name, others in graph.items()
        for other in sorted(others)
        if not unknown and rank[room(other)] > rank[room(name)]
    ]


def folder_circles(graph):
    """Returns the circles among the files and folders of each folder, by its name."""
    inside = {}
    for name, others in graph.items():
        for other in others:
            pairs = itertools.zip_longest(name.split("."), other.split("."))
            at = next(i for i, (a, b) in enumerate(pairs) if a != b)
            here, there = name.split("."), other.split(".")
            steps = inside.setdefault(".".join(here[:at]), {})
            steps.setdefault(here[at], set()).add(there[at])
    return {folder: found for folder, steps in inside.items() if (found := circles(steps))}


def late_imports(sources):
    """Returns the imports inside functions, but for those of `LATE`."""
    found = set()
    for name, source in sources.items():
        for function in statements(parse(source)):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in statements(function):
                if isinstance(node, ast.Import):
                    asked = {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    asked = {"." * node.level + (node.module or "")}
                else:
                    continue
                found |= {f"{name}: {one}" for one in asked if not is_late(one)}
    return sorted(found)


def looks_at_files(sources):
    """Returns the names by which modules look at the file system."""
    found = set()
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                called = node.func
                asked = [
                    called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                ]
            elif isinstance(node, ast.Import | ast.ImportFrom):
                asked = [getattr(node, "module", None) or "", *(one.name for one in node.names)]
            else:
                continue
            found |= {f"{name}: {one}" for one in asked if one.split(".")[0] in LOOKS}
    return sorted(found)


def is_chain_of_two(node):
    """Returns True for `a.b`, with which each longer chain of names begins."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)


def insides_of_jax(sources):
    """Returns the names of JAX's insides that modules import or reach through `jax`."""
    found = set()
    told = {name: text for name, text in sources.items() if MAY_NAME_INSIDES.search(text)}
    for name, source in told.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                asked = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                asked = [f"{node.module}.{alias.name}" for alias in node.names if not node.level]
            else:
                asked = [ast.unparse(node)] if is_chain_of_two(node) else []
            found |= {
                f"{name}: {inside}"
                for inside in INSIDES
                if any(f"{one}.".startswith(f"{inside}.") for one in asked)
            }
    return sorted(found)


def names_in(sources, names):
    """Returns where code has one of these texts, but as the default of --dataset."""
    found = []
    for name, source in sources.items():
        tree = ast.parse(source)
        default = [
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DEFAULT_TASK"
            for inner in ast.walk(node)
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in names and node not in default:
                found.append(f"{name}:{node.lineno}: {node.value}")
    return found


def reachable(graph, name):
    """Returns all modules that a module imports, with those that these import."""
    seen, waiting = set(), [name]
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            waiting += graph[one]
    return seen


@pytest.fixture(scope="module")
def sources():
    yield read("lora_jax", "train")
    parse.cache_clear()


@pytest.fixture(scope="module")
def graph(sources):
    return graph_of(sources)


def test_rooms_import_those_below_them(graph):
    assert broken_walls(graph, ORDER) == []
    assert sorted({".".join(name.split(".")[:2]) for name in graph}) == sorted(ORDER), (
        "all are there"
    )


def test_no_files_import_each_other_in_a_circle(graph):
    assert circles(graph) == []


def test_no_folders_import_each_other_in_a_circle(graph):
    assert folder_circles(graph).keys() == TOGETHER.keys(), folder_circles(graph)


def test_only_dear_and_optional_packages_are_imported_late(sources):
    assert late_imports(sources) == []


def test_one_file_imports_the_insides_of_jax(sources):
    asked = insides_of_jax(sources | read("tests"))
    # Its version, before JAX is imported; and two functions that are wrapped for the tests' speed.
    own = {"tests.surroundings: jaxlib", "tests.surroundings: jax._src"}
    others = [one for one in asked if one not in own and not one.startswith(f"{IMPORTER}: ")]
    assert f"{IMPORTER}: jax.extend" in asked and others == [], f"import them from {IMPORTER}"


def test_options_look_at_no_file_and_name_no_task(sources):
    from train.settings.tasks import NAMED

    names = {name for tasks in NAMED.values() for name in tasks}
    options = {name: text for name, text in sources.items() if name.startswith("train.options.")}
    assert looks_at_files(options) == []
    nameless = {f"train.{script}" for script in (*TRAINERS, "script", "finetune")}
    plan = {name: text for name, text in sources.items() if name.startswith("train.plan.")}
    scripts = {
        name: text
        for name, text in sources.items()
        if name in nameless or name.startswith("train.stages.")
    }
    assert names_in(options | plan | scripts, names) == []
    del plan["train.plan.tasks"]  # has a row for each script that can be planned
    assert names_in(plan, {"sft", "dpo", "grpo"}) == []


@pytest.mark.parametrize("script", TRAINERS)
def test_trainers_need_neither_comparisons_nor_findings(script, graph):
    rooms = {".".join(name.split(".")[:2]) for name in reachable(graph, f"train.{script}")}
    assert "train.run" in rooms
    assert rooms.isdisjoint({"train.compare", "train.findings", "train.serve"})


def test_the_judge_sees_broken_walls():
    """A file that imports upward, circles of files and folders, and what options must not do."""
    broken = {
        "train.a.__init__": "",
        "train.a.one": "from train.b import two\nimport train.b.two",
        "train.b.__init__": "",
        "train.b.two": "def f():\n    from ..a import one\n    import os, gguf",
        "train.c": "from train.b.two import f\n\nname = 'sql'\nDEFAULT_TASK = 'sql'",
        "train.d": "import pathlib\nif TYPE_CHECKING:\n    import train.c",
    }
    graph = graph_of(broken)
    assert graph["train.a.one"] == {"train.b.two"} and graph["train.b.two"] == {"train.a.one"}
    assert graph["train.c"] == {"train.b.two"} and graph["train.d"] == set()
    assert broken_walls(graph, ["train.a", "train.b", "train.c", "train.d"]) == [
        "train.a.one imports train.b.two, which stands above it"
    ]
    assert broken_walls(graph, ["train.b", "train.a", "train.c"]) == [
        "train.d: give it a place in the order"
    ]
    assert {*circles(graph)} == {"train.a.one", "train.b.two"}
    assert {*folder_circles(graph)} == {"train"}
    assert late_imports(broken) == ["train.b.two: ..a", "train.b.two: os"]
    assert looks_at_files({"train.d": "open('x')\nPath(y).exists()\nfrom pathlib import Path"}) == [
        "train.d: exists",
        "train.d: open",
        "train.d: pathlib",
    ]
    inside = {
        "train.e": "import jax\ndef f():\n    from jax import extend\n    jax.interpreters.mlir",
        "train.f": "from jax._src.core import eval_jaxpr\nfrom .jax import lib\nimport jaxlib.mlir",
        "train.g": "import jax.extension\nfrom jax.experimental import pallas",
    }
    assert insides_of_jax(inside) == [
        "train.e: jax.extend",
        "train.e: jax.interpreters",
        "train.f: jax._src",
        "train.f: jaxlib",
    ]
    assert names_in(broken, {"sql"}) == ["train.c:3: sql"]
    assert reachable(graph, "train.c") == {"train.c", "train.b.two", "train.a.one"}
