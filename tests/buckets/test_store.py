"""Tests of folders in a bucket, beside an emulator of Google's store that fails in each way."""

import json
import socket
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from lora_jax.buckets import copies, store
from lora_jax.buckets.store import BucketError, ObjectChanged, bucket_path
from lora_jax.hf.hub import find_config
from tests.buckets.store_proxy import bucket_store, use
from tests.train.forks import Forked
from tests.train.scripts import fails
from tests.train.tiny import CHATML, write_model, write_rows
from train import sft
from train.adapters.template import read_template

pytestmark = [
    pytest.mark.buckets,
    # Of Google's client.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def running():
    with bucket_store() as both:
        yield both


@pytest.fixture
def proxy(running, monkeypatch, tmp_path):
    """An empty bucket, and an empty cache of copies."""
    proxy, variables = running
    use(variables, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield proxy
    proxy.latency, proxy.failing = 0.0, lambda number, method, path: None
    proxy.seen = lambda method, path: None
    for name in proxy.objects():
        proxy.delete(name)


def place(name):
    return bucket_path(f"gs://bucket/{name}")


def test_objects_are_listed_read_and_written(proxy, tmp_path):
    first = store.write_object(place("a/x"), b"one", store.ABSENT)
    second = store.write_object(place("a/deep/y"), b"two")
    listed = store.list_objects(place("a"))
    assert {name: (f.generation, f.size) for name, f in listed.items()} == {
        "x": (first, 3),
        "deep/y": (second, 3),
    }
    assert store.read_object(place("a/x")) == (b"one", first)
    assert store.read_object(place("a/none")) is None and store.find_object(place("a")) is None
    store.download(place("a/x"), first, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"one"
    assert not store.delete_object(place("a/x"), first + 1) and store.find_object(place("a/x"))
    assert store.delete_object(place("a/x"), first) and not store.delete_object(place("a/x"))


def test_a_generation_that_is_another_is_noticed(proxy, tmp_path):
    first = store.write_object(place("x"), b"one")
    second = store.write_object(place("x"), b"two", first)
    for generation in (first, store.ABSENT):
        with pytest.raises(ObjectChanged):
            store.write_object(place("x"), b"three", generation)
    with pytest.raises(ObjectChanged):
        store.download(place("x"), first, tmp_path / "x")
    assert proxy.objects() == {"x": b"two"} and second != first


@pytest.mark.parametrize("how", ["503", "cut", "lost"])
def test_errors_that_pass_are_tried_again(proxy, tmp_path, how):
    proxy.failing = lambda number, method, path: how if number % 3 else None
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    content = {"a.json": b"{}", "deep/b.bin": bytes(range(256)) * 1000}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    copies.upload_folder(folder, place("kept"))
    copy = copies.path_to_read("gs://bucket/kept")
    assert {name: (copy / name).read_bytes() for name in copies.files_in(copy)} == content
    assert {*proxy.objects()} == {"kept/a.json", "kept/deep/b.bin"}


def test_a_folder_that_is_being_written_is_not_there(proxy, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / name).write_text("old")
    copies.upload_folder(folder, place("run/kept"))
    proxy.put("run/config.yaml", b"x: 1")
    for name in ("a", "b", "d"):
        (folder / name).write_text("new")
    (folder / "c").unlink()

    # At each moment of a replacement, a reader has all of it or nothing.
    states = []

    def looks(method, path):
        proxy.seen = lambda method, path: None
        try:
            copy = copies.path_to_read("gs://bucket/run/kept")
            states.append({name: (copy / name).read_text() for name in copies.files_in(copy)})
        except BucketError as error:
            states.append(str(error))
        whole = {*copies.list_finished_objects(place("run"))}
        assert ("kept/a" in whole) == isinstance(states[-1], dict) and "config.yaml" in whole
        proxy.seen = watch

    def watch(method, path):
        if method in ("POST", "DELETE"):
            looks(method, path)

    proxy.seen = watch
    copies.upload_folder(folder, place("run/kept"))
    proxy.seen = lambda method, path: None
    copy = copies.path_to_read("gs://bucket/run/kept")
    last = {name: (copy / name).read_text() for name in copies.files_in(copy)}
    assert last == {"a": "new", "b": "new", "d": "new"}
    old = {"a": "old", "b": "old", "c": "old"}
    assert states[0] == old and all("is incomplete" in state for state in states[1:])
    assert len(states) >= 4


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(proxy, tmp_path):
    for name in ("a", "b"):
        proxy.put(f"kept/{name}", b"old")
    replaced = []

    def replace(method, path):
        if "alt=media" in path and not replaced:
            replaced.append(path)
            for name in ("a", "b"):
                proxy.put(f"kept/{name}", b"new")

    proxy.seen = replace
    copy = copies.path_to_read("gs://bucket/kept")
    assert replaced and {(copy / name).read_bytes() for name in ("a", "b")} == {b"new"}


def test_copies_are_made_once_for_each_state(proxy):
    proxy.put("kept/a", b"old")
    first = copies.path_to_read("gs://bucket/kept")
    before = len(proxy.requests)
    assert copies.path_to_read("gs://bucket/kept") == first and len(proxy.requests) == before + 1
    proxy.put("kept/a", b"new")
    second = copies.path_to_read("gs://bucket/kept")
    assert (first / "a").read_bytes() == b"old" and (second / "a").read_bytes() == b"new"
    assert copies.replace_copy_paths(f"see {second}/a") == "see gs://bucket/kept/a"
    assert copies.bucket_address_of(second / "a") == place("kept/a")


def test_what_a_writer_leaves_alone_stays(proxy):
    for name in ("kept/weights.bin", "kept/card.md", "file.bin"):
        proxy.put(name, b"content")
    with copies.path_to_write("gs://bucket/kept") as folder:
        assert (folder / "weights.bin").is_file() and (folder / "card.md").read_text() == "content"
    with copies.path_to_write("gs://bucket/file.bin") as file:
        assert file.is_file()
    assert {*proxy.objects().values()} == {b"content"}
    with copies.path_to_write("gs://bucket/kept") as folder:
        (folder / "new").write_text("more")
        (folder / "card.md").unlink()
    kept = {"kept/weights.bin": b"content", "kept/new": b"more"}
    assert proxy.objects() == kept | {"file.bin": b"content"}


def test_a_writer_that_fails_tells_those_that_wait_for_it(proxy, monkeypatch):
    told = []

    def gather(failed):
        told.append(bool(failed))
        return np.array([failed, False])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    with pytest.raises(OSError, match="disk"), copies.path_to_write("gs://bucket/new", by_all=True):
        raise OSError("the disk is full")
    assert told == [False, True]


def test_an_adapters_template_is_named_by_its_address(proxy, tmp_path):
    """So that a run goes on on another machine, whose copies lie elsewhere."""
    proxy.put("peft/adapter_config.json", b'{"peft_type": "LORA"}')
    proxy.put("peft/chat_template.jinja", CHATML.encode())
    line = ["--init-adapter", "gs://bucket/peft", "--model", "owner/name", "--output", tmp_path]
    template = sft.parse([*map(str, line), "--dataset", "rows.jsonl"]).data.chat_template
    assert template == "gs://bucket/peft/chat_template.jinja" and read_template(template) == CHATML


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/out"])
def test_objects_that_no_file_can_be_are_refused(monkeypatch, name):
    """The emulator takes no such names, which the store does."""
    objects = [
        SimpleNamespace(name=f"kept/{n}", generation=1, size=1, crc32c="") for n in ("a", name)
    ]
    client = SimpleNamespace(list_blobs=lambda *args, **options: objects)
    monkeypatch.setattr(store, "_client", lambda: client)
    with pytest.raises(BucketError, match=f"an object '{name}'.*outside the folder"):
        copies.path_to_read("gs://bucket/kept")
    del objects[1]
    assert store.list_objects(place("kept")).keys() == {"a"}


def test_problems_are_named_with_a_remedy(proxy):
    with pytest.raises(BucketError, match="gs://bucket/none: there is no such object or folder"):
        copies.path_to_read("gs://bucket/none")
    with pytest.raises(BucketError, match="there is no bucket other"):
        copies.path_to_read("gs://other/x")
    with pytest.raises(models.ModelNotFound, match="gs://bucket/none: there is no such"):
        models.from_pretrained("gs://bucket/none")


def test_missing_credentials_are_named_with_the_address(proxy, monkeypatch, tmp_path, capsys):
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # asks no metadata server
    store._client.cache_clear()
    rows = write_rows(tmp_path / "rows.jsonl")
    line = ["--model", write_model(tmp_path / "model"), "--dataset", rows]
    try:
        said = fails(capsys, sft.main, *line, "--output", "gs://bucket/run")
    finally:
        store._client.cache_clear()
    assert said.startswith("--output gs://bucket/run/run.lock: there are no credentials for Google")


def test_adapters_and_models_of_the_library_lie_in_buckets(proxy, tmp_path):
    params = {"dense": {"kernel": jnp.ones((4, 3))}}
    tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    lj.save_adapter("gs://bucket/a", tree, about={"model": "owner/name"})
    assert lj.adapter_info("gs://bucket/a") == {"model": "owner/name"}
    loaded = lj.load_adapter("gs://bucket/a", params)
    assert (loaded["dense"]["kernel"].a == tree["dense"]["kernel"].a).all()
    with pytest.raises(ValueError, match="^gs://bucket/a already exists"):
        lj.save_adapter("gs://bucket/a", tree)
    lj.save_adapter("gs://bucket/a", tree, overwrite=True)
    assert lj.adapter_info("gs://bucket/a") == {}

    fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    model = models.GPT2(models.read_config(fields | {"n_positions": 16}))
    params = model.init(jax.random.key(0), jnp.array([[1, 2, 3]]))["params"]
    models.save_pretrained("gs://bucket/model", model, params)
    _, read = models.from_pretrained("gs://bucket/model")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), read, params))
    with pytest.raises(FileExistsError, match="^gs://bucket/model already exists"):
        models.save_pretrained("gs://bucket/model", model, params)
    before = len(proxy.requests)
    assert json.loads(find_config("gs://bucket/model").read_text())["n_embd"] == 8
    assert sum("alt=media" in path for _, path in proxy.requests[before:]) == 1  # no weights

    tree = lj.lorafy(params, [lj.LoraRule(targets=["c_attn"], rank=2)])
    lp.save("gs://bucket/peft", model, tree)
    assert lp.load("gs://bucket/peft", model, params).keys() == tree.keys()
    assert {*proxy.objects("peft/")} >= {"peft/adapter_config.json"}


# Of two processes, the second comes late, and reads at once what both have written.
_BOTH = """
import sys, time
import jax, jax.numpy as jnp
process = int(sys.argv[1])
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, process)
import lora_jax as lj
from lora_jax.buckets import copies, store
tree = lj.lorafy({"dense": {"kernel": jnp.ones((4, 3))}}, [lj.LoraRule(targets=["dense"], rank=2)])
time.sleep(process)
lj.save_adapter("gs://bucket/both", tree, about={"model": "first"})
print(lj.adapter_info("gs://bucket/both"))
lj.save_adapter("gs://bucket/both", tree, about={"model": "second"}, overwrite=True)
print(lj.adapter_info("gs://bucket/both"))

def refuses(*_):
    raise store.BucketError("no room")

copies.upload_folder = refuses
try:
    lj.save_adapter("gs://bucket/refused", tree)
except store.BucketError as error:
    print(error)
"""


def test_of_two_processes_none_goes_on_before_the_adapter_is_there(running, proxy, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    proxy.latency = 0.1
    around = [running[1] | {"XDG_CACHE_HOME": str(tmp_path / f"cache-{n}")} for n in range(2)]
    pair = [Forked(["-c", _BOTH, n, port], tmp_path, around[n]) for n in range(2)]
    texts = [process.communicate() for process in pair]
    assert not any(process.returncode for process in pair), texts
    told = [out for out, _ in texts]
    there = "{'model': 'first'}\n{'model': 'second'}\n"
    told_by_second = (
        "Process 0 could not read or write gs://bucket/refused. See the message of that process."
    )
    assert told[0].endswith(f"{there}no room\n") and told[1].endswith(f"{there}{told_by_second}\n")
