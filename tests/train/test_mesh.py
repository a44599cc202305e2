"""Meshes and processes: one device's losses and adapter, whatever the devices are."""

import functools
import json
import math
import socket
import time
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import models
from lora_jax.models.specs import AXES
from lora_jax.training.layout import Layout
from lora_jax.training.run.checkpoints import Checkpoints
from lora_jax.training.setup import Setup
from tests.support import THOROUGH, array, assert_close, thorough, with_random_factors
from tests.train.forks import Forked
from tests.train.test_classify import words, write_encoder
from tests.train.tiny import CHATML, write_jsonl, write_model
from train import classify, sft
from train.console.errors import UserError
from train.options.common import MeshAxis
from train.processes.mesh import make_mesh, parse_mesh
from train.run.log import read_metrics

RUNS = Path(__file__).with_name("mesh_runs.py")
DENSE = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
MIXTURE = {**DENSE, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {"dense": DENSE, "mixture": MIXTURE}
MESHES = {
    "dense": ["fsdp=2,sequence=2,tensor=2"],  # data=4 stands in other tests
    "mixture": ["expert=2,sequence=2,tensor=2"],
}
if THOROUGH:
    MESHES["dense"] += ["data=2,fsdp=2,tensor=2", "fsdp=8", "data=8", "tensor=2,fsdp=4"]
    MESHES["dense"] += ["sequence=4,data=2"]
    MESHES["mixture"] += ["expert=2,tensor=2,data=2", "expert=2,sequence=2,fsdp=2"]
    MESHES["mixture"] += ["expert=4,fsdp=2", "data=8", "fsdp=8", "fsdp=4,tensor=2"]
# Meshes whose devices stand for those of two slices, and the axis that goes between them.
SLICED: dict[str, list[tuple[str, str]]] = {"dense": [], "mixture": []}  # hosts are slices below
if THOROUGH:
    SLICED["dense"] += [("data=4,fsdp=2", "data"), ("fsdp=4,tensor=2", "fsdp")]
STEPS = 8
COLUMNS_AND_ROWS = ["--targets", "q_proj", "down_proj"]  # one kernel that is split each way


@pytest.fixture(autouse=True, scope="module")
def few_devices():
    """All that there are."""


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        (None, {}),
        ("data=2,fsdp=4", {"data": 2, "fsdp": 4}),
        ("tensor=2, fsdp=-1", {"tensor": 2, "fsdp": -1}),
    ],
)
def test_sizes_are_read(text, sizes):
    assert parse_mesh(text) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data", "Pass sizes such as data=2,fsdp=4"),
        ("rows=2", "with each of data, fsdp, expert, sequence, tensor"),
        ("data=2,data=2", "at most once"),
        ("data=0", "sizes such as"),
        ("data=-1,fsdp=-1", "Only one axis"),
        ("data=3", "needs 3 devices, but there are 4"),
        ("data=3,fsdp=-1", "needs 3 devices, but there are 4"),
    ],
)
def test_meshes_that_cannot_be(text, message):
    with pytest.raises(UserError, match=message):
        make_mesh(text, 8)


def test_a_batch_that_the_mesh_cannot_share_out():
    with pytest.raises(
        UserError, match=r"--batch-size 6 .*4 parts.*\(data 2 × fsdp 2 × expert 1\)"
    ):
        make_mesh("data=2,fsdp=2", 6)
    assert make_mesh("fsdp=2,tensor=2", 6).size == 4


def test_all_devices_are_used():
    def more_than_one(text, batch_size):
        return {axis: n for axis, n in make_mesh(text, batch_size).shape.items() if n > 1}

    assert more_than_one(None, 8) == {"fsdp": 4}
    assert more_than_one(None, 6) == {"fsdp": 2, "tensor": 2}
    assert more_than_one(None, 1) == {"tensor": 4}
    assert more_than_one("tensor=2,data=-1", 8) == {"tensor": 2, "data": 2}


@pytest.fixture
def two_slices(monkeypatch):
    """Every second of four devices stands for one of another slice."""
    monkeypatch.setattr("lora_jax.training.mesh.slice_of", lambda device: device.id % 2)


@pytest.mark.usefixtures("two_slices")
def test_several_slices_share_the_batch_by_default():
    def devices(text, batch_size, axis=None):
        mesh = make_mesh(text, batch_size, slice_axis=axis)
        sizes = {axis: n for axis, n in mesh.shape.items() if n > 1}
        return sizes, [device.id for device in mesh.devices.flat]

    assert devices(None, 8) == ({"data": 2, "fsdp": 2}, [0, 2, 1, 3])
    assert devices(None, 6) == ({"data": 2, "tensor": 2}, [0, 2, 1, 3])
    assert devices(None, 8, "fsdp") == ({"fsdp": 4}, [0, 2, 1, 3])
    assert devices(None, 1, "tensor") == ({"tensor": 4}, [0, 2, 1, 3])
    assert devices("data=2,fsdp=-1", 8) == ({"data": 2, "fsdp": 2}, [0, 2, 1, 3])
    assert devices("fsdp=2,tensor=-1", 8, "tensor") == ({"fsdp": 2, "tensor": 2}, [0, 1, 2, 3])
    with pytest.raises(UserError, match="data=2,fsdp=2, or --slice-axis fsdp, which sends more"):
        make_mesh("fsdp=4", 8)
    with pytest.raises(UserError, match=r"--batch-size 3 .* 2 parts .*\(data 2 ×"):
        make_mesh(None, 3)


def test_one_slice_has_no_axis_between():
    with pytest.raises(UserError, match="--slice-axis fsdp .* belong to one slice"):
        make_mesh("fsdp=4", 8, slice_axis="fsdp")
    assert typing.get_args(MeshAxis) == AXES


def test_a_mesh_takes_devices_in_the_order_given():
    backwards = jax.devices()[::-1]
    assert [*make_mesh("data=2,tensor=2", 8, backwards).devices.flat] == backwards


def inputs(folder, kind):
    """The options that all runs on a tiny model share."""
    model = write_model(folder / kind, **MODELS[kind])
    letters = ["ab", "hello", "more of it", "z" * 20]
    rows = [
        {"prompt": f"{i} {letters[i % 4]}?", "completion": letters[-1 - i % 4] * (1 + i % 2)}
        for i in range(40)
    ]
    options = ["--model", model, "--dataset", write_jsonl(folder / f"{kind}.jsonl", rows)]
    options += ["--batch-size", 8, "--rank", 3, "--alpha", 7, "--dropout", 0.1, "--steps", STEPS]
    # eps: Adam turns the rounding of gradients near its default of 1e-8 into whole steps.
    options += ["--lr", 5e-3, "--eps", 1e-6, "--save-every", 1000]
    options += ["--targets", "all-linear"] if kind == "mixture" else COLUMNS_AND_ROWS
    return [str(option) for option in options]


def start(shared, each, *, devices, processes=1, script="sft", last=()):
    """Processes that train with each list of options in turn.

    `last` are options that the last process alone has.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [str(word) for word in shared]
    for options in each:
        words += ["--", *map(str, options)]
    return [
        Forked(
            [RUNS, devices, f"{process}/{processes}", port, script, *words]
            + [*last] * (process == processes - 1),
            Path.cwd(),
        )
        for process in range(processes)
    ]


def run(shared, each, *, code=0, **options):
    """Trains with each list of options in turn, to the end: what each process said."""
    started = start(shared, each, **options)
    said = [process.communicate(timeout=600) for process in started]
    for process, (out, err) in zip(started, said, strict=True):
        assert process.returncode == code, f"{out[-2000:]}\n{err[-4000:]}"
    return said


def trained(shared, folder, steps=STEPS):
    """(the losses, the adapter) that a run left."""
    _, params = models.from_pretrained(shared[1])
    losses = [line["loss"] for line in read_metrics(folder)]
    assert len(losses) == steps
    return losses, lj.split(lj.load_adapter(folder / "adapter", params))[0]


def test_factors_are_gathered_for_work_and_what_trains_in_full_is_not():
    params = {"up": {"kernel": jnp.ones((8, 12))}, "head": {"kernel": jnp.ones((12, 4))}}
    rules = [lj.TrainRule(targets=["head"]), lj.LoraRule(targets=["up"], rank=3)]
    layout = Layout(make_mesh("fsdp=2,tensor=2", 4), [(".*/kernel", P("fsdp", "tensor"))])
    shardings = layout.step_shardings(lj.lorafy(params, rules))
    assert {name: tuple(s.spec) for name, s in shardings["up/kernel"].items()} == {
        "a": (None, None),
        "b": (None, "tensor"),
    }
    assert tuple(shardings["head/kernel"]["value"].spec) == ("fsdp", "tensor")


@pytest.mark.parametrize("mesh", ["expert=4", "expert=2,sequence=2", "fsdp=2,expert=2"])
def test_no_kernel_of_a_mixture_lies_whole_on_each_device(mesh):
    config = models.read_config(MIXTURE | {"max_position_embeddings": 64})
    layout = Layout.of(make_mesh(mesh, 4), config)
    for row in models.key_table(config):
        shape = row.stacked_shape
        part = layout.of_parameter(row.path, shape).shard_shape(shape)
        is_norm = "norm" in row.path
        assert math.prod(part) * (1 if is_norm else 4) == math.prod(shape), row.path


@pytest.mark.slow
def test_a_run_goes_on_under_another_mesh(tmp_path):
    shared = inputs(tmp_path, "dense")
    steps = shared.index("--steps")
    shared = [*shared[:steps], *shared[steps + 2 :], "--schedule", "constant"]
    shared += ["--warmup", "1"]

    def go_on(folder, mesh, n_steps, *options):
        args = ["--output", tmp_path / folder, "--mesh", mesh, "--steps", n_steps, *options]
        sft.main([*shared, *map(str, args)])
        return tmp_path / folder

    whole = go_on("whole", "data=4", 4)
    first = go_on("moved", "fsdp=2,tensor=2", 2)
    assert "mesh: fsdp=2,tensor=2" in (first / "config.yaml").read_text()
    moved = go_on("moved", "data=2,sequence=2", 4, "--resume")
    losses = [[line["loss"] for line in read_metrics(folder)] for folder in (whole, moved)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    _, params = models.from_pretrained(shared[1])
    ours, theirs = (
        lj.split(lj.load_adapter(folder / "adapter", params))[0] for folder in (moved, whole)
    )
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fsdp=2,tensor=2", "data=2,fsdp=2"),
        pytest.param(*("fsdp=2,tensor=2", "data=2,fsdp=2 on two slices"), marks=pytest.mark.slow),
        pytest.param("data=2,fsdp=2 on two slices", "fsdp=4", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_loads_bitwise_under_another_mesh(before, after, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    kernel = array(rng.normal(size=(2, 8, 12)), jnp.float32)
    params = with_random_factors(
        lj.lorafy({"up": {"kernel": kernel}}, [lj.LoraRule(targets=["up"], rank=3)])
    )
    table = [("up/kernel", P("fsdp", "tensor"))]

    def state_on(mesh, seed):
        mesh, _, slices = mesh.partition(" on ")
        with monkeypatch.context() as patched:
            if slices:
                patched.setattr("lora_jax.training.mesh.slice_of", lambda device: device.id % 2)
            layout = Layout(make_mesh(mesh, 4), table)
        assert layout.mesh.devices.flat[1].id == (2 if slices else 1)
        placed = layout.placed(params)
        adapter, _ = lj.split(placed)
        setup = Setup.make(layout, placed, optax.adam(1e-3), optax.constant_schedule(1e-3))
        state = setup.state(adapter, jax.random.key(seed))
        return state

    first = state_on(before, 3)
    _, moments = optax.adam(1e-3).update(first.adapter, first.opt_state)
    first = first._replace(opt_state=moments, step=jnp.int32(5))
    Checkpoints(tmp_path / "checkpoints", keep=1).save(first, {"data": "these"})
    like = state_on(after, 4)
    second, facts = Checkpoints(tmp_path / "checkpoints", keep=1).restore(like)
    assert facts == {"data": "these"} and int(second.step) == 5
    for one, other, where in zip(*map(jax.tree.leaves, (first, second, like)), strict=True):
        assert other.sharding.is_equivalent_to(where.sharding, other.ndim)
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = map(jax.random.key_data, (one, other))
        np.testing.assert_array_equal(one, other)
    b = second.adapter["up/kernel"]["b"]
    assert {shard.data.shape for shard in b.addressable_shards} == {(2, 3, 12)}


@pytest.fixture(scope="module")
def one_and_meshes(tmp_path_factory):
    """Returns the options and the folder of runs on one device, "one", and on meshes of eight."""

    @functools.cache
    def made(kind):
        folder = tmp_path_factory.mktemp(kind)
        shared = [*inputs(folder, kind), "--targets", "all-linear"]
        runs = [["order=0", "--output", folder / "one"]]
        runs += [
            ["order=0,1,2,3,4,5,6,7", "--mesh", m, "--output", folder / m] for m in MESHES[kind]
        ]
        runs += [
            ["order=0,1,2,3,4,5,6,7", "slices=2", "--mesh", mesh, "--slice-axis", axis]
            + ["--output", folder / f"{mesh} on slices"]
            for mesh, axis in SLICED[kind]
        ]
        run(shared, runs, devices=8)
        return shared, folder

    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_every_mesh_trains_as_one_device_does(kind, one_and_meshes):
    shared, folder = one_and_meshes(kind)
    losses, adapter = trained(shared, folder / "one")
    assert all(np.abs(parts["b"]).max() > 1e-2 for parts in adapter.values())
    for mesh in [*MESHES[kind], *(f"{mesh} on slices" for mesh, _ in SLICED[kind])]:
        ours = trained(shared, folder / mesh)
        np.testing.assert_allclose(ours[0], losses, rtol=1e-5, err_msg=mesh)
        assert_close(ours[1], adapter, 1e-5)


@pytest.mark.slow
def test_the_devices_may_stand_in_any_order(tmp_path, monkeypatch):
    shared = [*inputs(tmp_path, "dense"), "--mesh", "fsdp=2,tensor=2", "--lr", "3e-2"]
    draw = np.random.default_rng(0)
    drawn = 21 if THOROUGH else 1
    orders = [range(4), *(draw.permutation(4) for _ in range(drawn))]
    assert len({tuple(order) for order in orders}) >= 2
    for i, order in enumerate(orders):
        devices = [jax.devices()[number] for number in order]
        monkeypatch.setattr("train.processes.mesh.all_devices", lambda devices=devices: devices)
        sft.main([*shared, "--output", str(tmp_path / f"run{i}")])
    losses, adapter = trained(shared, tmp_path / "run0")
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.5, "B begins at zero, and learns"
    assert all(np.abs(parts["b"]).max() > 1e-2 for parts in adapter.values())
    differences = []
    for i, order in enumerate(orders[1:], start=1):
        ours = trained(shared, tmp_path / f"run{i}")
        np.testing.assert_allclose(ours[0], losses, rtol=1e-5, err_msg=str(order))
        assert_close(ours[1], adapter, 1e-5)
        differences.append(np.max(np.abs(np.subtract(ours[0], losses)) / losses))
    print(f"losses {losses[0]:.4f} to {losses[-1]:.4f}; largest difference {max(differences):.1e}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", pytest.param("mixture", marks=thorough)])
def test_two_processes_train_as_one_device_does(kind, one_and_meshes, tmp_path):
    shared, folder = one_and_meshes(kind)
    mesh = {"dense": "fsdp=4,tensor=2", "mixture": "expert=4,fsdp=2"}[kind]
    runs = [["--mesh", mesh, "--output", tmp_path / "two"]]
    runs += [["slices=hosts", "--output", tmp_path / "slices"]] * (kind == "dense")
    said = run(shared, runs, devices=4, processes=2)
    assert f"step {STEPS}/{STEPS}" in said[0][0] and "step" not in said[1][0]
    for _, made in zip(runs, ("two", "slices"), strict=False):
        for ours, theirs in zip(
            trained(shared, tmp_path / made), trained(shared, folder / "one"), strict=True
        ):
            assert_close(ours, theirs, 1e-5)


@pytest.mark.slow
def test_where_one_of_two_processes_is_killed_both_end_and_go_on_bitwise(tmp_path):
    steps = 30
    shared = [*inputs(tmp_path, "dense"), "--save-every", "3", "--steps", steps]
    whole, folder = (tmp_path / name for name in ("whole", "killed"))
    processes = start(shared, [["--output", folder]], devices=1, processes=2)
    while max([line["step"] for line in read_metrics(folder)], default=0) < 5:
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, ended[0].communicate()
        time.sleep(0.05)
    processes[0].kill()
    said = [process.communicate(timeout=60) for process in processes]
    assert all(process.returncode not in (0, None) for process in processes), (
        "no process goes on, or ends as if all were well"
    )
    lines = "".join(said[1]).splitlines()
    (ours,) = [line for line in lines if "process 0 of 2 ended without a message" in line]
    assert "--resume" in ours and "Traceback" not in said[1][1]
    assert read_metrics(folder)[-1]["step"] < steps
    # Now both in one process.
    runs = [["--output", folder, "--resume"], ["--output", whole]]
    ((out, _),) = run(shared, runs, devices=2)
    assert "training continues after step" in out
    (losses, adapter), theirs = trained(shared, folder, steps), trained(shared, whole, steps)
    assert losses == theirs[0]
    jax.tree.map(np.testing.assert_array_equal, adapter, theirs[1])


@pytest.mark.slow
def test_a_row_that_one_process_cannot_use_ends_both(tmp_path):
    refusing = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}"
    model = write_model(
        tmp_path / "model", f"{refusing}{{% endif %}}{{% endfor %}}{CHATML}", **DENSE
    )
    rows = [{"prompt": "ab", "completion": "no" if i == 3 else "yes"} for i in range(8)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    shared = ["--model", model, "--dataset", data, "--lr", 1e-3, "--steps", 2]
    said = run(shared, [["--output", tmp_path / "out"]], devices=2, processes=2, code=2)
    assert all("line 4: the model's chat template refuses the chat (no" in err for _, err in said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (["--dataset", "none.jsonl"], "process 1 of 2: --dataset none.jsonl does not exist"),
        (["--seed", 1], "processes of this run differ: process 1 has --seed 1, not 0. Start all"),
    ],
)
def test_processes_that_were_not_started_alike_end_at_once(last, expected, tmp_path):
    shared = inputs(tmp_path, "dense")
    said = run(shared, [["--output", tmp_path / "out"]], devices=2, processes=2, code=2, last=last)
    assert all(expected in err for _, err in said)


def check_scores(tmp_path, script, shared):
    """Two processes score what they trained as one does."""
    shared = [*shared, "--mesh", "fsdp=2,tensor=2"]
    folders = [tmp_path / name for name in ("one", "two")]
    script.main([str(word) for word in [*shared, "--output", folders[0]]])
    name = script.__name__.removeprefix("train.")
    run(shared, [["--output", folders[1]]], devices=2, processes=2, script=name)
    one, two = (json.loads((folder / "scores.json").read_text()) for folder in folders)
    assert one == two


@pytest.mark.slow
def test_two_processes_answer_as_one_does(tmp_path):
    model = write_model(tmp_path / "decoder", **DENSE)
    questions = ["--model", model, "--seq-len", 700, "--rows", 8, "--steps", 1, "--batch-size", 4]
    check_scores(tmp_path, sft, [*questions, "--eval-questions", 2, *COLUMNS_AND_ROWS])


@pytest.mark.slow
@thorough
def test_two_processes_classify_as_one_does(tmp_path):
    encoder = write_encoder(tmp_path / "encoder")
    texts = write_jsonl(tmp_path / "texts.jsonl", words(60))
    classes = ["--model", encoder, "--dataset", texts, "--text", "word", "--label", "grade"]
    classes += ["--seq-len", 16, "--batch-size", 8, "--steps", 3, "--eval-every", 3]
    check_scores(tmp_path, classify, classes)
