"""Plans of functions that users wrote: `train.plan.function`, and `lora-jax plan --function`."""

import dataclasses
import functools
import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from train import plan
from train.console.errors import UserError
from train.plan.__main__ import main
from train.plan.clock.groups import ADAPTER, ATTENTION, BASE
from train.plan.compile import compile_largest
from train.plan.machines import find_machine
from train.plan.user_function import mesh_of

S = jax.ShapeDtypeStruct
D, F, LAYERS, ROWS, RANK = 64, 96, 3, 24, 5

STEP = """
import jax, jax.numpy as jnp
S = jax.ShapeDtypeStruct
def step(w, x):
    return w + x.T @ x
def make_step():
    return step, (S((6, 6), jnp.float32), S((9, 6), jnp.float32)), {"donate": (0,)}
def make_on_mesh(mesh):
    from jax.sharding import PartitionSpec as P
    shardings = (P("rows"), P())
    return step, (S((6, 6), jnp.float32), S((9, 6), jnp.float32)), {"shardings": shardings}
def make_large(rows=18):
    return step, (S((6, 6), jnp.float32), S((rows, 6), jnp.float32))
def make_number():
    return 3
def make_typo():
    return step, (S((6, 6), jnp.float32),), {"donated": 0}
def make_mismatch():
    return step, (S((6, 7), jnp.float32), S((9, 6), jnp.float32))
def make_fault():
    return 1 / 0
"""


def layers(params, x):
    @jax.checkpoint
    def layer(x, weights):
        return jnp.tanh(x @ weights["up"]["kernel"]) @ weights["down"]["kernel"], None

    return jax.lax.scan(layer, x, params)[0]


def step_of_lora() -> tuple[Any, tuple[Any, ...]]:
    """A gradient step of an adapter, with its arguments as shapes."""
    params = {
        "up": {"kernel": S((LAYERS, D, F), jnp.bfloat16)},
        "down": {"kernel": S((LAYERS, F, D), jnp.bfloat16)},
    }
    tree = lj.lorafy(params, [lj.LoraRule(targets="all-linear", rank=RANK)])
    forward = lj.adapt(layers, strict=True)

    def step(adapter, base, x):
        loss = lambda a: jnp.mean(forward(lj.join(a, base), x).astype(jnp.float32) ** 2)  # noqa: E731
        gradient = jax.grad(loss)(adapter)
        return jax.tree.map(lambda p, g: p - 0.1 * g, adapter, gradient)

    return step, (*lj.split(tree), S((ROWS, D), jnp.bfloat16))


def flops_by_hand() -> int:
    """The FLOPs of the step: both products of each layer, and those with A and B."""
    base = 2 * ROWS * D * F
    factors = 2 * ROWS * RANK * (D + F)  # xA and (xA)B
    forward = 2 * base + 2 * factors
    # The result of a layer is not needed again: of its last product xA alone is.
    recomputed = base + factors + 2 * ROWS * RANK * F
    backward = 2 * base + 4 * factors  # of the base, the gradient of x alone
    return LAYERS * (forward + recomputed + backward)


def test_memory_and_flops_equal_sums_by_hand():
    step, args = step_of_lora()
    made = plan.function(step, *args, topology="cpu:1", donate=0)
    n_base = LAYERS * 2 * D * F
    n_adapter = LAYERS * 2 * RANK * (D + F)
    n_scales = 2 * LAYERS
    arguments = 2 * n_base + 4 * n_adapter + 4 * n_scales + 2 * ROWS * D
    assert made.memory["arguments"] == arguments
    assert made.memory["outputs"] <= 64  # the new adapter takes the place of the old one
    assert made.fits and made.refused is None and made.failed is None
    assert made.work.traced == made.work.per_step == flops_by_hand()
    assert made.unused_donations == {}
    json.dumps(made.as_json())


def test_a_mesh_shards_what_the_specs_say():
    step, args = step_of_lora()
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    of_base = lj.sharding.shardings(args[1], [(".*kernel", P("fsdp", None))], mesh)
    made = plan.function(
        step,
        *args,
        topology="cpu:2",
        mesh={"fsdp": 2},
        shardings=(None, of_base, P("fsdp")),
        out_shardings=P(),
    )
    alone = plan.function(step, *args, topology="cpu:1")
    n_base = LAYERS * 2 * D * F
    halved = n_base + ROWS * D  # bytes of half the base and half the rows, in bf16
    assert alone.memory["arguments"] - made.memory["arguments"] == halved
    assert made.work.sent is not None and sum(made.work.sent.values()) > 0
    assert made.mesh == {"fsdp": 2}


def attend(params, x, *, scanned: bool, scoped: bool):
    """Layers of attention: four products with kernels, and those of queries, keys and values."""

    def multiply_heads(q, k, v):
        if scoped:
            scores = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
            return jnp.einsum("bhts,bshd->bthd", scores, v)
        q, k, v = (jnp.swapaxes(array, 1, 2) for array in (q, k, v))
        scores = jax.nn.softmax(q @ jnp.swapaxes(k, 2, 3))
        return jnp.swapaxes(scores @ v, 1, 2)

    @jax.checkpoint
    def layer(x, weights):
        normed = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True))
        q, k, v = (normed @ weights[name]["kernel"] for name in "qkv")
        rows, tokens, width = x.shape
        q, k, v = (array.reshape(rows, tokens, 4, width // 4) for array in (q, k, v))
        mixed = multiply_heads(q, k, v).reshape(x.shape)
        return x + mixed @ weights["o"]["kernel"], None

    if scanned:
        return jax.lax.scan(layer, x, params)[0]
    for index in range(LAYERS):
        x, _ = layer(x, jax.tree.map(lambda stack: stack[index], params))  # noqa: B023
    return x


def attention_flops(trains: str, scanned: bool, scoped: bool, topology: str) -> tuple[int, int]:
    """FLOPs of products of activations, and of all others, in a gradient step."""
    is_tpu = topology.startswith("v5e")
    rows, tokens, width = (2, 256, 384) if is_tpu else (2, 20, 48)
    kernel = S((LAYERS, width, width), jnp.float32)
    params = {name: {"kernel": kernel} for name in "qkvo"}
    model = functools.partial(attend, scanned=scanned, scoped=scoped)
    if trains == "kernels":
        args = (params,)
        forward = model
    else:
        args = lj.split(lj.lorafy(params, [lj.LoraRule(targets="all-linear", rank=RANK)]))
        adapted = lj.adapt(model, strict=True)
        forward = lambda adapter, base, x: adapted(lj.join(adapter, base), x)  # noqa: E731

    def lora(*args):  # named as the scope of A and B
        return jax.grad(lambda trained: jnp.mean(forward(trained, *args[1:]) ** 2))(args[0])

    made = plan.function(lora, *args, S((rows, tokens, width), jnp.float32), topology=topology)
    assert made.clock is not None
    flops = dict.fromkeys((ATTENTION, ADAPTER, BASE), 0)
    for group in made.clock.groups:
        if group.flops:
            flops[group.group] += group.flops
    assert sum(flops.values()) == made.work.per_step
    n_products = 2 + 2 + 4  # forward, computed again, and gradients of both operands
    product_flops = 2 * rows * tokens * tokens * width
    # Without a loop, the last layer need not compute its last product again.
    n_omitted = (n_products * LAYERS * product_flops - flops[ATTENTION]) / product_flops
    if is_tpu:  # A fusion of several products belongs to the group of the largest.
        assert n_omitted in range(n_products * LAYERS)
    else:
        assert n_omitted == 0 if scanned else n_omitted in (0, 1)
    return flops[ADAPTER], flops[BASE] // (2 * rows * tokens * width * width * LAYERS)


@pytest.mark.parametrize("scoped", [True, False])
@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize(
    "topology", ["cpu:1", pytest.param("v5e:1", marks=pytest.mark.tpu_compiler)]
)
def test_products_of_two_activations_are_attention(topology, scanned, scoped):
    """In code without scopes of its own. Gradients of kernels are no attention."""
    factors, base = attention_flops("factors", scanned, scoped, topology)
    assert factors and base > 4
    no_factors, base_with_gradients = attention_flops("kernels", scanned, scoped, topology)
    assert not no_factors and base_with_gradients > base
    assert base_with_gradients == base + 4 or topology != "cpu:1"


def test_a_donation_that_no_output_can_replace_is_named():
    fn = lambda state, x: ((state["m"].astype(jnp.bfloat16), state["n"] + 1), x)  # noqa: E731
    state = {"m": S((8, 8), jnp.float32), "n": S((4,), jnp.float32)}
    made = plan.function(fn, state, S((3,), jnp.int32), topology="cpu:1", donate=0)
    assert made.unused_donations == {"0/0/m": 8 * 8 * 4}
    unread = lambda x, nothing, unread: x + 1  # noqa: E731
    arrays = (S((3,), jnp.float32), None, S((5,), jnp.float32))
    assert plan.function(unread, *arrays, topology="cpu:1", donate=(0, 2)).unused_donations == {}


def test_a_function_that_does_not_fit_lists_its_largest_arrays(monkeypatch):
    def fn(x):
        large = jnp.outer(x, x)
        return jnp.sort(large, axis=0) @ x

    monkeypatch.setattr("train.plan.machines.os.sysconf", lambda _: 100)  # 10,000 bytes
    made = plan.function(fn, S((1000,), jnp.float32), topology="cpu:1")
    assert not made.fits
    largest = made.largest_arrays[0]
    assert largest.n_bytes == 4 * 1000 * 1000 and "test_user_function.py" in largest.line
    assert len(made.largest_arrays) <= 8


def test_a_mesh_of_the_devices_keeps_their_order():
    machine = find_machine("cpu:4")
    devices = np.array(machine.devices)[[0, 1, 3, 2]].reshape(4)
    mesh = jax.sharding.Mesh(devices, ("data",))
    assert list(mesh_of(mesh, machine).devices) == list(devices)
    assert list(mesh_of({"data": 4}, machine).devices) == list(machine.devices)


def test_recomputed_products_and_callbacks():
    fn = lambda x: jax.pure_callback(lambda x: x, S((3,), jnp.float32), x)  # noqa: E731
    made = plan.function(fn, S((3,), jnp.float32), topology="cpu:1")
    assert any("calls Python on the host (pure_callback)" in note for note in made.notes)


def test_a_loop_of_unknown_length():
    """Without products it counts once, as a rejection sampler's; with products nothing is known."""
    sampler = lambda key: jax.random.gamma(key, jnp.ones(4))  # noqa: E731
    key = jax.eval_shape(lambda: jax.random.key(0))

    def fn(key, x):
        return (x @ x) * sampler(key)

    made = plan.function(fn, key, S((4, 4), jnp.float32), topology="cpu:1")
    assert made.work.source == "hlo" and made.work.per_step == 2 * 4**3
    assert any("count once" in note for note in made.notes)

    def powers(x):
        return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ x, x)

    made = plan.function(powers, S((4, 4), jnp.float32), topology="cpu:1")
    assert made.work.source == "jaxpr" and any("does not say how often" in n for n in made.notes)


def test_static_arguments_and_functions_under_jit():
    fn = lambda x, power: x**power  # noqa: E731
    plan.function(fn, S((3,), jnp.float32), 2, topology="cpu:1", static=1)
    plan.function(jax.jit(fn, static_argnums=1), S((3,), jnp.float32), 2, topology="cpu:1")
    with pytest.raises(UserError, match="donate cannot be given for a function under jax.jit"):
        plan.function(jax.jit(fn), S((3,), jnp.float32), 2, topology="cpu:1", donate=0)


def test_shardings_of_arguments_count_where_no_others_are_given():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    halved = S((8, 6), jnp.float32, sharding=NamedSharding(mesh, P("d")))
    for fn in (jnp.sin, jax.jit(jnp.sin), lambda x: jnp.sin(x)):
        made = plan.function(fn, halved, topology="cpu:2", mesh={"d": 2})
        assert made.memory["arguments"] == 4 * 8 * 6 // 2
    with pytest.raises(UserError, match="Every device would do all of the work"):
        plan.function(jax.jit(jnp.sin), S((8, 6), jnp.float32), topology="cpu:2", mesh={"d": 2})
    elsewhere = NamedSharding(jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,)), P("d"))
    with pytest.raises(UserError, match="belongs to other devices"):
        plan.function(
            jnp.sin, S((8, 6), jnp.float32, sharding=elsewhere), topology="cpu:2", mesh={"d": -1}
        )


def two_devices() -> Any:
    return jax.make_mesh((2,), ("other",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": "cpu:2"}, "no mesh is given"),
        ({"topology": "cpu:2", "mesh": {"fsdp": 2}}, "no shardings are given"),
        ({"topology": "cpu:2", "mesh": {"fsdp": 3}}, "has 3 devices, but cpu:2 has 2"),
        ({"topology": "v9:1"}, "names no known machine"),
        ({"topology": "cpu:1", "shardings": (P(), P())}, "has 2 entries.*1 argument"),
        (
            {"topology": "cpu:1", "shardings": (lambda: NamedSharding(two_devices(), P()),)},
            "belongs to other devices",
        ),
    ],
)
def test_bad_input_has_one_message(options, message):
    if "shardings" in options:
        options["shardings"] = tuple(
            entry if isinstance(entry, PartitionSpec) else entry() for entry in options["shardings"]
        )
    with pytest.raises(UserError, match=message):
        plan.function(lambda x: x + 1, S((4, 4), jnp.float32), **options)


def test_a_function_that_cannot_be_traced():
    def fn(x):
        return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match="fn cannot be traced.*TracerBoolConversionError"):
        plan.function(fn, S((3,), jnp.float32), topology="cpu:1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Checked:
    """A class that accepts shapes and traced arrays alone, as classes with checked types do."""

    x: Any

    def __post_init__(self):
        if type(self.x).__name__ == "ArgInfo":
            raise TypeError("x must be an array.")


def test_arguments_whose_class_checks_types():
    with pytest.raises(UserError, match="cannot be lowered: TypeError: x must.*switch the check"):
        plan.function(lambda arg: arg.x + 1, Checked(S((3,), jnp.float32)), topology="cpu:1")


def test_the_command_prints_tables_and_json(tmp_path, capsys):
    file = tmp_path / "step.py"
    file.write_text(STEP)
    main(["--function", f"{file}:make_step", "--topology", "cpu:1"])
    shown = capsys.readouterr().out
    assert "step on cpu:1 (one device)" in shown and "Memory per device" in shown
    main(["--function", f"{file}:make_large", "--json"])
    assert json.loads(capsys.readouterr().out)["work"]["traced"] == 2 * math.prod((6, 18, 6))
    main([f"--function={file}:make_on_mesh", "--topology", "cpu:2", "--mesh", "rows=2", "--json"])
    fields = json.loads(capsys.readouterr().out)
    assert fields["mesh"] == {"rows": 2} and fields["topology"] == "cpu:2"
    assert fields["memory"]["arguments"] == 4 * (3 * 6 + 9 * 6)
    assert fields["work"]["traced"] == 2 * math.prod((6, 9, 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{file}:make_number"], "returned int. It must return"),
        (["{file}:make_typo"], "'donated': 0.* as options. It must return"),
        (["{file}:absent"], "has no function absent"),
        (["{file}"], "must be a file and a name"),
        (["nowhere.py:make_step"], "nowhere.py does not exist"),
        (["{file}:make_mismatch"], "cannot be traced with these arguments"),
        (["{file}:make_step", "--mesh", "rows"], "--mesh rows is not a mesh"),
        (["{file}:make_fault"], "make_fault failed in line 21 with ZeroDivisionError"),
        (["{file}:make_step", "--mesh", "rows=3"], "has 3 devices"),
    ],
)
def test_bad_input_of_the_command(arguments, message, tmp_path, capsys):
    file = tmp_path / "step.py"
    file.write_text(STEP)
    words = [word.format(file=file) for word in arguments]
    with pytest.raises(SystemExit) as ended:
        main(["--function", *words])
    assert ended.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error


class Lowered:
    """A program whose compilations end as they are told: an error, or the program's temporaries."""

    def __init__(self, *ends):
        self.ends = list(ends)

    def compile(self, compiler_options):
        end = self.ends.pop(0)
        if isinstance(end, str):
            raise jax.errors.JaxRuntimeError(end)
        return type("Compiled", (), {"memory_analysis": lambda _: None, "end": end})()


def test_a_failure_of_one_way_to_compile_does_not_count_where_another_works():
    ways = [{}, {"xla_gpu_enable_triton_gemm": False}]
    assert compile_largest(Lowered("Couldn't find output tile sizes", 7), ways).end == 7
    assert compile_largest(Lowered(5, "Couldn't find output tile sizes"), ways).end == 5
    with pytest.raises(jax.errors.JaxRuntimeError, match="second"):
        compile_largest(Lowered("first", "second"), ways)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compile_largest(Lowered("RESOURCE_EXHAUSTED: Out of memory", 5), ways)


@pytest.mark.parametrize(
    ("topology", "mesh"),
    [
        pytest.param("v5e:1", None, marks=pytest.mark.tpu_compiler),
        pytest.param("v5e:2x2", {"fsdp": 4}, marks=pytest.mark.tpu_compiler),
        pytest.param("rtx4090:1", None, marks=pytest.mark.gpu_compiler),
    ],
)
def test_accelerators_that_are_not_here(topology, mesh):
    step, args = step_of_lora()
    shardings = None if mesh is None else (None, None, P("fsdp"))
    made = plan.function(step, *args, topology=topology, mesh=mesh, shardings=shardings, donate=0)
    n_devices = 1 if mesh is None else mesh["fsdp"]
    assert made.fits and made.work.traced == flops_by_hand()
    assert made.work.per_step == pytest.approx(flops_by_hand(), rel=0.01)
    is_timed = made.clock is not None and made.clock.seconds is not None
    assert is_timed == topology.startswith("v5e")
    # TPUs pad the last two axes of an array.
    n_base = LAYERS * 2 * D * F
    assert made.memory["arguments"] >= 2 * n_base + 2 * ROWS * D // n_devices
    assert bool(made.work.sent and sum(made.work.sent.values())) == (mesh is not None)
