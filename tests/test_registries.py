"""Every entry of a registry has its row in the table of its law: a test's list of cases."""

import ast
import functools
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest

from lora_jax.hf.stored.methods import METHODS
from lora_jax.models.families import FAMILIES
from lora_jax.training.losses import ONLINE, PREFERENCES, TOKEN_LOSSES
from lora_jax.variants import VARIANTS
from tests.test_walls import ROOT
from train.reporters.registry import TRACKERS
from train.rewards.find import OURS
from train.settings.tasks import NAMED, OWN_ROWS
from train.tasks.tool_use import OURS as ENVIRONMENTS

DRY_RUN = "train/test_dry_run.py"


class Law(NamedTuple):
    """A registry, and where its law has a row for each entry.

    Attributes:
      entries: returns the names of the registry.
      tables: the files of tests, each with the names of its tables; () for the whole file.
      test: the one test that runs all entries; its rows are in all that it reaches.
    """

    entries: Callable[[], Iterable[str]]
    tables: dict[str, tuple[str, ...]] = {}
    test: str | None = None

    def rows(self) -> set[str]:
        """Returns the texts that may be rows."""
        found = {text for path, tables in self.tables.items() for text in texts(path, tables)}
        return found | (reached(self.test) if self.test else set())


def routes() -> set[str]:
    """Returns the paths that the server answers, as its code states them: "sessions/{session}"."""
    found = set()
    for path in (ROOT / "train/serve/routes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Tuple) and len(node.elts) == 3:
                first, method, _ = node.elts
                is_route = isinstance(method, ast.Constant) and method.value in ("GET", "POST")
                if is_route and isinstance(first, ast.Constant):
                    found.add(first.value)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Route":
                if isinstance(node.args[0], ast.Constant):
                    found.add(node.args[0].value)
            elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "posts":
                assert isinstance(node.value, ast.Dict)
                found |= {ast.literal_eval(key) for key in node.value.keys if key is not None}
    return found


def tasks() -> set[str]:
    """Returns the tasks that the scripts find, named and on rows of a user's own."""
    source = (ROOT / "train/settings/tasks.py").read_text()
    own = {name for name in re.findall(r"train\.tasks\.\w+:\w+", source)}
    assert OWN_ROWS.keys() == NAMED.keys()
    return own | {task for named in NAMED.values() for task in named.values()}


# The tasks on a user's own rows, by their scripts.
OWN_TASKS = {
    "train.sft": ("train.tasks.stream:TASK", "train.tasks.chats:TASK"),
    "train.classify": tuple(
        f"train.tasks.{name}:TASK" for name in ("labelled", "images", "reward_model")
    ),
    "train.dpo": ("train.tasks.pairs:TASK",),
    "train.grpo": ("train.tasks.prompts:TASK",),
    "train.distill": ("train.tasks.distillation:TASK",),
}
# The test that runs each task through its script, and what it gives the script to choose the task.
TASK_TESTS = {
    "train.tasks.sql:TASK": ("train/test_sft.py::test_the_default_task_on_a_tiny_model",),
    "train.tasks.sql:PAIRS": (f"{DRY_RUN}::test_a_named_task_is_read_by_its_script", "sql"),
    "train.tasks.sql:REWARDS": (f"{DRY_RUN}::test_a_named_task_is_read_by_its_script", "sql"),
    "train.tasks.sql:DISTILLATION": (f"{DRY_RUN}::test_a_named_task_is_read_by_its_script", "sql"),
    "train.tasks.arithmetic:TASK": (
        f"{DRY_RUN}::test_a_named_task_is_read_by_its_script",
        "arithmetic",
    ),
    "train.tasks.guess:TASK": (f"{DRY_RUN}::test_a_game_is_shown_before_it_trains", "guess"),
    "train.tasks.vader:TASK": (f"{DRY_RUN}::test_classes_have_a_dry_run_too",),
    "train.tasks.stream:TASK": (
        "train/test_stream.py::test_a_streamed_run_goes_on_bitwise_in_the_middle_of_the_data",
        "--stream",
    ),
    "train.tasks.chats:TASK": ("train/test_sft.py::test_a_run_leaves_all_that_it_should",),
    "train.tasks.labelled:TASK": ("train/test_classify.py::test_a_run_leaves_all_that_it_should",),
    "train.tasks.images:TASK": ("train/test_classify_images.py::test_a_run_on_a_folder", "photos"),
    "train.tasks.reward_model:TASK": (
        "train/test_reward_model.py::test_a_saved_run_rewards_as_its_own_evaluation_says",
        "--labels",
        "pairs",
    ),
    "train.tasks.pairs:TASK": ("train/test_preferences.py::test_separable_pairs_are_learned",),
    "train.tasks.prompts:TASK": ("train/test_rollouts.py::test_a_reward_rises",),
    "train.tasks.distillation:TASK": (
        "train/test_rollouts.py::test_a_student_comes_closer_to_its_teacher",
        "--teacher",
    ),
}
# The test that sends each tracker a run.
TRACKER_TESTS = {
    "tensorboard": "train/run/test_log.py::test_lines_and_events_are_the_same_steps",
    "mlflow": "train/run/test_reporters.py::test_mlflow_has_every_step_once",
    "trackio": "train/run/test_reporters.py::test_trackio_has_every_step_once",
    "wandb": "train/run/test_reporters.py::test_wandb_takes_a_run_offline",
}
LAYOUTS_TEST = "hf/test_save_codes.py::test_each_layout_is_written_as_it_was_shipped"
ROUTE_TESTS = (
    *("bodies.json", "client.py", "test_openai.py", "test_page.py", "test_tinker_bodies.py"),
    *("test_tinker_routes.py", "test_access.py", "test_load.py", "test_limits.py", "process.py"),
)
LAWS = {
    "variants": Law(
        # The biases of `bias_on_b` are shifts, which tests of linear uses have.
        lambda: [v.option for v in VARIANTS if v.option != "bias_on_b"],
        {"core/test_variants.py": ("VARIANTS",)},
    ),
    "losses of tokens": Law(lambda: TOKEN_LOSSES, {"training/test_losses_named.py": ("FORMULAS",)}),
    "losses of pairs": Law(lambda: PREFERENCES, {"training/test_preference_losses.py": ()}),
    "losses of rollouts": Law(
        lambda: ONLINE,
        {
            "training/test_preference_losses.py": ("ROLLOUTS",),
            "training/test_trl.py": ("ROLLOUTS",),
        },
    ),
    "families of models": Law(
        lambda: FAMILIES,
        {
            "models/tiny.py": ("CASES",),
            "models/tiny_stacks.py": ("CASES",),
            "models/tiny_encoders.py": ("ENCODERS", "GPT2S"),
            "models/tiny_vision.py": ("CASES",),
            "models/test_parity_smolvlm.py": ("FIELDS",),
            "models/test_parity_qwen_vl.py": ("CLASSES",),
            "models/test_published.py": ("PUBLISHED",),
            "peft_adapters/models.py": ("FAMILIES",),
        },
    ),
    "layouts of stored codes": Law(lambda: METHODS, test=LAYOUTS_TEST),
    "routes of the server": Law(routes, {f"train/serve/{name}": () for name in ROUTE_TESTS}),
    "trackers": Law(lambda: TRACKERS, {"test_registries.py": ("TRACKER_TESTS",)}),
    "tasks": Law(tasks, {"test_registries.py": ("TASK_TESTS",)}),
    "rewards": Law(
        lambda: OURS,
        {
            "train/rewards/test_rewards.py": (),
            "train/rewards/test_sql_reward.py": (),
            "train/environments/test_arithmetic.py": (),
        },
    ),
    "environments": Law(lambda: ENVIRONMENTS, {"train/environments/test_sessions.py": ()}),
}


def texts(path: str, tables: tuple[str, ...]) -> set[str]:
    """Returns the texts and the names of arguments in tables of a file of tests."""
    source = (ROOT / "tests" / path).read_text()
    if path.endswith(".json"):
        return {*re.findall(r'"([^"\n]*)"', source)}
    tree = ast.parse(source)
    nodes: list[ast.AST] = [tree]
    if tables:
        targets = {
            ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target): node
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
        }
        nodes = [targets[name] for name in tables]
    return {text for node in nodes for text in texts_in(node)}


def texts_in(node: ast.AST) -> set[str]:
    """Returns the texts and the names of arguments in a piece of code."""
    inside = [*ast.walk(node)]
    found = {x.value for x in inside if isinstance(x, ast.Constant) and isinstance(x.value, str)}
    found |= {x.arg for x in inside if isinstance(x, ast.keyword) and x.arg is not None}
    pieces = (
        [getattr(v, "value", "") for v in x.values] for x in inside if isinstance(x, ast.JoinedStr)
    )
    return found | {"".join(p if isinstance(p, str) else "1" for p in each) for each in pieces}


class TestFile:
    """Definitions and imports at the top of a file of tests, by their names."""

    __test__ = False

    def __init__(self, path: str) -> None:
        self.definitions: dict[str, ast.AST] = {}
        self.imports: dict[str, str] = {}
        for node in ast.parse((ROOT / "tests" / path).read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in (name for each in targets for name in ast.walk(each)):
                    if isinstance(target, ast.Name):
                        self.definitions[target.id] = node
            elif isinstance(node, ast.Import | ast.ImportFrom):
                before = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                self.imports |= {x.asname or x.name: before + x.name for x in node.names}


read_file = functools.cache(TestFile)


def reached(test: str) -> set[str]:
    """Returns the texts in a test and in all of the tests' code that it uses, by names.

    Modules and functions of the project that these import are among them: "train.sft.main".
    """
    path, _, name = test.partition("::")
    assert name.startswith("test_") and name in read_file(path).definitions, f"no test {test}"
    left, seen, found = [(path, name)], set[tuple[str, str]](), set[str]()
    while left:
        path, name = left.pop()
        file = read_file(path)
        if (path, name) in seen or name not in file.definitions:
            continue
        seen.add((path, name))
        node = file.definitions[name]
        found |= texts_in(node)
        for inner in ast.walk(node):
            used = ast.unparse(inner) if isinstance(inner, ast.Name | ast.Attribute) else ""
            used = inner.arg if isinstance(inner, ast.arg) else used  # a fixture
            first, _, rest = used.partition(".")
            whole = ".".join(filter(None, (file.imports.get(first), rest)))
            module, _, last = whole.rpartition(".")
            if first not in file.imports:
                left.append((path, first))
            elif (ROOT / f"{module.replace('.', '/')}.py").is_file() and module[:6] == "tests.":
                left.append((f"{module.removeprefix('tests.').replace('.', '/')}.py", last))
            else:
                found.add(whole)
    return found


def without_row(entries: Iterable[str], rows: set[str]) -> list[str]:
    """Returns the entries of a registry without a row; `{name}` stands for a part of a path."""
    # A path may be a part of a test's text, with the address before it and a query behind.
    paths = "\n".join(row for row in rows if "\n" not in row)
    return [
        entry
        for entry in entries
        if entry not in rows
        and not (
            re.search(r"[/_]", entry) and re.search(rf"(?m)(^|/){_pattern(entry)}([?/]|$)", paths)
        )
    ]


def _pattern(path: str) -> str:
    parts = re.split(r"\{[^}]*\}", path.removeprefix("/v1").strip("/"))
    return r"[^/\n]+".join(map(re.escape, parts))


@pytest.mark.parametrize("name", LAWS)
def test_each_entry_has_its_row(name):
    law = LAWS[name]
    assert len(list(law.entries())) > 1
    assert without_row(law.entries(), law.rows()) == []


@pytest.mark.parametrize("name", LAWS)
def test_the_judge_misses_an_entry_without_a_row(name):
    law = LAWS[name]
    assert without_row([*law.entries(), "new_entry"], law.rows()) == ["new_entry"]


def runs(test: str, *words: str) -> bool:
    """Returns True if a test gives words to a script or a module: "train.sft" and "--stream"."""
    found = reached(test)
    return all(any(re.search(rf"(^|\W){re.escape(w)}\b", text) for text in found) for w in words)


@pytest.mark.parametrize("task", TASK_TESTS)
def test_the_test_of_a_task_runs_its_script(task):
    scripts = {name for name, tasks in NAMED.items() if task in tasks.values()}
    scripts |= {name for name, tasks in OWN_TASKS.items() if task in tasks}
    (script,) = scripts
    test, *words = TASK_TESTS[task]
    assert runs(test, script, *words)


@pytest.mark.parametrize("tracker", TRACKER_TESTS)
def test_the_test_of_a_tracker_reports_to_it(tracker):
    assert runs(TRACKER_TESTS[tracker], tracker)


def test_the_judge_follows_what_a_test_uses_and_nothing_else():
    test = TASK_TESTS["train.tasks.distillation:TASK"][0]
    assert runs(test, "train.distill", "--teacher", "--max-new-tokens")
    assert not runs(test, "train.dpo") and not runs(test, "--many")
    with pytest.raises(AssertionError, match="no test"):
        reached("train/test_rollouts.py::test_that_is_not_there")
