"""The engine knows no HTTP, the routes know no JAX, and rooms import those below them alone."""

import ast
from pathlib import Path

import pytest

import train.serve

FOLDER = Path(train.serve.__file__).parent
OF_HTTP = {"starlette", "uvicorn", "google", "zstandard", "sqlite3"}
OF_ARRAYS = {"jax", "flax", "optax"}


def imported(path):
    """The names of all modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize(
    ("room", "outside", "inside"),
    [
        ("engine", OF_HTTP, "train.serve.routes"),
        ("routes", OF_ARRAYS, "train.serve.engine"),
    ],
)
def test_a_room_does_not_know_the_other(room, outside, inside):
    files = [*(FOLDER / room).rglob("*.py")]
    names = {name for path in files for name in imported(path)}
    assert len(files) > 5 and "train.serve.protocol.requests" in names
    assert not [name for name in names if name.split(".")[0] in outside or name.startswith(inside)]


# The rooms, from the ground up, and the others that each imports.
ROOMS = {
    "protocol": set(),
    "storage": {"protocol"},
    "tenants": {"protocol", "storage"},
    "engine": {"protocol"},
    "routes": {"protocol", "storage", "tenants"},
}


def test_each_folder_is_a_room():
    folders = {path.parent.name for path in FOLDER.glob("*/__init__.py")}
    assert folders == ROOMS.keys()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_the_rooms_below(room):
    names = {name for path in (FOLDER / room).rglob("*.py") for name in imported(path)}
    own = {name.split(".")[2] for name in names if name.startswith("train.serve.")}
    assert own - {room} <= ROOMS[room]
