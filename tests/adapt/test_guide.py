"""The code of the guides in lora_jax/adapt/guides runs, and prints what its comments say.

A block ``python`` begins a program, ``python continued`` goes on with it; one that says ``foreign``
needs that extra. A block that says ``openpi`` needs a checkout of openpi, and is only compiled.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from tests.support import assert_close, dots_of_size, with_random_factors

GUIDES = Path(lj.__file__).parent / "adapt" / "guides"
BLOCKS = re.compile(r"^```python(.*?)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def programs():
    """The programs by the title of their guide: (what the first block says, its blocks)."""
    found = {}
    for path in GUIDES.glob("*.md"):
        text = path.read_text()
        title = text.partition("\n")[0].removeprefix("# ")
        for says, code in BLOCKS.findall(text):
            if "openpi" in says:
                compile(code, title, "exec")
            elif "continued" in says:
                found[title][-1][1].append(code)
            else:
                found.setdefault(title, []).append((says.split(), [code]))
    return found


PROGRAMS = programs()


def run(title, capsys, monkeypatch, folder):
    """Runs a guide's programs; the names that the last one leaves."""
    monkeypatch.chdir(folder)
    for _, blocks in PROGRAMS[title]:
        names = {}
        for code in blocks:
            with jax.numpy_dtype_promotion("standard"):
                exec(compile(code, title, "exec"), names)
            printed = capsys.readouterr().out.splitlines()
            expected = re.findall(r"print\(.*\)(?:  |\n *)# (.*)", code)
            assert len(expected) == code.count("print("), "each print says what it prints"
            assert list(dict.fromkeys(printed)) == list(dict.fromkeys(expected))
    return names


@pytest.fixture
def ran(request, capsys, monkeypatch, tmp_path):
    return run(request.param, capsys, monkeypatch, tmp_path)


def section(title):
    says = PROGRAMS[title][-1][0]
    habits = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries
    marks = [pytest.mark.slow, pytest.mark.foreign, habits] if "foreign" in says else []
    if title == "An NNX module":  # it trains
        marks = [pytest.mark.slow]
    return pytest.param(title, marks=marks, id=title)


def of(title):
    return pytest.mark.parametrize("ran", [section(title)], indirect=True)


TITLES = (
    "An NNX module",
    "An Equinox module",
    "A Haiku function",
    "A mesh with explicit axes",
    "A Keras model",
    "A neural ODE",
    "A Pallas kernel with its derivative",
    "Kernels stored out, in",
)


def test_each_guide_with_code_is_run():
    assert set(PROGRAMS) == set(TITLES)


@of("An NNX module")
def test_an_nnx_module(ran):
    assert float(ran["value"]) < 1.0
    start = ran["nnx"].split(ran["Model"](ran["nnx"].Rngs(0)), ran["nnx"].Param, ...)[2]
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), ran["rest"], start)
    assert all(jax.tree.leaves(moved)), "the statistics are those of the steps"


@of("An Equinox module")
def test_an_equinox_module(ran):
    moved = ran["merged"].layers[0].weight - ran["model"].layers[0].weight
    assert float(jnp.abs(moved).max()) > 1e-3, "what was learned is in it"


@of("A Haiku function")
def test_a_haiku_function(ran):
    assert lj.is_node(ran["tree"]["head"]["w"]), "by its name"


@of("A mesh with explicit axes")
def test_a_mesh_with_explicit_axes(ran):
    assert ran["placed"]["up"]["kernel"].b.sharding.spec[1] == "tensor"
    assert set(ran["mesh"].axis_types) == {jax.sharding.AxisType.Auto}


@of("A Keras model")
def test_a_keras_model(ran, tmp_path):
    assert (tmp_path / "tuned.keras").exists() and (tmp_path / "adapter").is_dir()
    kernel = ran["model"].trainable_variables[0].value
    assert float(jnp.abs(kernel - ran["trainable"][0]).max()) > 1e-3, "what was learned is in it"


@of("A neural ODE")
def test_a_neural_ode(ran):
    base, y0, field = ran["base"], ran["y0"], ran["field"]
    odeint, times = ran["odeint"], ran["times"]
    adapter, _ = lj.split(with_random_factors(lj.join(ran["adapter"], base)))

    def merged(adapter, base):
        params = lj.merge(lj.join(adapter, base))
        return odeint(lambda y, t, params: field(params, y), y0, times, params)[-1]

    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda adapter, run=run: jnp.sum(run(adapter, base) ** 2)))
        for run in (ran["factored_odeint"], merged)
    )
    assert_close(ours(adapter), theirs(adapter), 1e-4)  # each solves to 1e-6 by its own steps

    how = {"adjoint": ran["diffrax"].BacksolveAdjoint()}

    def refused(adapter):
        tree = lj.join(adapter, base)
        return jnp.sum(ran["solve"](lambda t, y, args: lj.adapt(field)(tree, y), None, **how))

    with pytest.raises(Exception, match="closed-over value"):
        jax.grad(refused)(adapter)


@pytest.mark.slow
@of("A Pallas kernel with its derivative")
def test_a_pallas_kernel(ran):
    tree = with_random_factors(ran["tree"])
    adapter, base = lj.split(tree)
    x = ran["x"]

    def gradients(run):
        return jax.jit(jax.grad(lambda adapter: jnp.sum(jnp.sin(run(lj.join(adapter, base), x)))))

    ours = gradients(ran["forward"])
    theirs = gradients(lambda tree, x: ran["model"](lj.merge(tree), x))
    assert_close(ours(adapter), theirs(adapter), 1e-5)
    shape = tree["dense"]["kernel"].shape
    assert dots_of_size(theirs.lower(adapter).compile().as_text(), shape), "the check sees it"
    assert not dots_of_size(ours.lower(adapter).compile().as_text(), shape)


@of("Kernels stored out, in")
@pytest.mark.filterwarnings("ignore::lora_jax.RoleWarning")  # the wrong one is told of
@pytest.mark.slow
def test_kernels_that_lie_out_in(ran):
    for tree in (ran["looked"], lj.lorafy(ran["params"], [ran["wrong"]])):
        tree = with_random_factors(tree)
        ours = lj.adapt(ran["linear"], strict=True)(tree, ran["x"])
        assert_close(ours, ran["linear"](lj.merge(tree), ran["x"]), 1e-5)
