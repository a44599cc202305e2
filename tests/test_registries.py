"""Every entry of a registry has its row in the table of its law: a test's list of cases."""

import ast
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


class Law(NamedTuple):
    """A registry, and where its law has a row for each entry.

    Attributes:
      entries: returns the names of the registry.
      tables: the files of tests, each with the names of its tables; () for the whole file.
    """

    entries: Callable[[], Iterable[str]]
    tables: dict[str, tuple[str, ...]]


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


# The test that proves each task through its script.
TASK_TESTS = {
    "train.tasks.sql:TASK": "train/tasks/test_evaluate.py",
    "train.tasks.sql:PAIRS": "train/test_preferences.py",
    "train.tasks.sql:REWARDS": "train/test_reward_runs.py",
    "train.tasks.sql:DISTILLATION": "train/test_rollouts.py",
    "train.tasks.vader:TASK": "train/tasks/test_sentiment.py",
    "train.tasks.arithmetic:TASK": "train/tasks/test_sums.py",
    "train.tasks.stream:TASK": "train/test_stream.py",
    "train.tasks.chats:TASK": "train/test_sft_data.py",
    "train.tasks.labelled:TASK": "train/test_classify.py",
    "train.tasks.images:TASK": "train/test_classify_images.py",
    "train.tasks.reward_model:TASK": "train/test_reward_model.py",
    "train.tasks.pairs:TASK": "train/test_preferences.py",
    "train.tasks.prompts:TASK": "train/test_reward_runs.py",
    "train.tasks.distillation:TASK": "train/test_rollouts.py",
}
ROUTE_TESTS = (
    *("bodies.json", "client.py", "test_openai.py", "test_page.py", "test_tinker_bodies.py"),
    *("test_tinker_routes.py", "test_access.py", "test_load.py", "process.py"),
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
            "models/tiny_encoders.py": ("ENCODERS", "GPT2S"),
            "models/tiny_vision.py": ("CASES",),
            "models/test_parity_smolvlm.py": ("FIELDS",),
            "peft_adapters/models.py": ("FAMILIES",),
        },
    ),
    "layouts of stored codes": Law(lambda: METHODS, {"hf/shipped.py": ()}),
    "routes of the server": Law(
        routes,
        {f"train/serve/{name}": () for name in ROUTE_TESTS},
    ),
    "trackers": Law(
        lambda: TRACKERS, {"train/run/test_reporters.py": (), "train/run/test_log.py": ()}
    ),
    "tasks": Law(tasks, {"test_registries.py": ("TASK_TESTS",)}),
    "rewards": Law(
        lambda: OURS,
        {
            "train/rewards/test_rewards.py": (),
            "train/rewards/test_sql_reward.py": (),
            "train/environments/test_arithmetic.py": (),
        },
    ),
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
    inside = [inner for node in nodes for inner in ast.walk(node)]
    found = {x.value for x in inside if isinstance(x, ast.Constant) and isinstance(x.value, str)}
    found |= {x.arg for x in inside if isinstance(x, ast.keyword) and x.arg is not None}
    pieces = (
        [getattr(v, "value", "") for v in x.values] for x in inside if isinstance(x, ast.JoinedStr)
    )
    return found | {"".join(p if isinstance(p, str) else "1" for p in each) for each in pieces}


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
    rows = set().union(*(texts(path, tables) for path, tables in law.tables.items()))
    assert len(list(law.entries())) > 1
    assert without_row(law.entries(), rows) == []


@pytest.mark.parametrize("name", LAWS)
def test_the_judge_misses_an_entry_without_a_row(name):
    law = LAWS[name]
    rows = set().union(*(texts(path, tables) for path, tables in law.tables.items()))
    assert without_row([*law.entries(), "new_entry"], rows) == ["new_entry"]


def test_the_tests_of_tasks_are_there():
    assert all((ROOT / "tests" / path).is_file() for path in TASK_TESTS.values())
