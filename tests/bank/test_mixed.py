"""A batch whose examples have different adapters equals a run of each example by its own."""

import functools
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.bank import Bank, MixedWarning, choose, mixed
from lora_jax.bank import slots as slots_module
from tests.models import tiny, tiny_encoders
from tests.support import (
    MORE_PROGRAMS,
    PROGRAMS,
    assert_close,
    but_rarely,
    dots_of_size,
    draw,
    lorafied,
    over,
    with_random_factors,
)

# Not those whose rows depend on each other, by sizes of groups or ids that they hold themselves.
ALL = (*PROGRAMS, *MORE_PROGRAMS)
LEFT_OUT = ("experts, tokens sorted", "embedding looked up and tied", "several kernels over one x")
CASES = [p for p in ALL if p.name not in LEFT_OUT]
# A batch at once, if its examples can be followed; example by example; with copies of factors.
FORMS = ("at once", "one by one", "copies")
forms = pytest.mark.parametrize("form", FORMS)
NOT_FOLLOWED = "branches and loops"  # a condition on the whole batch
# Each program at once, and in one of the other forms: what these do, they do to any program.
PAIRS = [(p, form) for i, p in enumerate(CASES) for form in ("at once", FORMS[2 - i % 2])]


def in_form(form, monkeypatch, fn, **how):
    """Returns a function for mixed batches, which runs in the form that is asked for."""
    monkeypatch.setattr(slots_module, "WIDEST", 0 if form == "copies" else slots_module.WIDEST)
    return mixed(fn, one_by_one=form != "at once", **how)


def adapters(params: Any, rules: list[Any], **more: dict[str, Any]) -> dict[str, Any]:
    """Returns adapted trees by name, with random factors; `more` changes the rules of each."""
    made = {}
    for seed, (name, changes) in enumerate(more.items()):
        own = [lj.LoraRule(**{**rule, **changes}) for rule in rules]
        made[name] = with_random_factors(lj.lorafy(params, own), seed=seed + 3)
    return made


def banked(
    params: Any, rules: list[Any], trees: dict[str, Any], slots: int = 4, **how: Any
) -> Bank:
    bank = Bank(params, rules, slots=slots, **how)
    for name, tree in trees.items():
        bank.add(name, tree)
    return bank


@functools.cache
def compiled(fn: Any, adapted: bool) -> Any:
    return jax.jit(lj.adapt(fn) if adapted else fn)


def alone(fn: Any, trees: dict[str, Any], base: Any, name: str) -> Any:
    """Returns `fn` by one adapter, called with what follows the parameters."""
    is_base = name == "base"
    return functools.partial(compiled(fn, not is_base), base if is_base else trees[name])


SEEN = (  # the others show as much
    "mlp",
    "nested jit",
    "fused kernel taken apart",
    "einsum with heads",
    "stack walked by hand",
    "several kernels over one x",
    "branches and loops",
)


def name_and_form(case):
    return f"{case[0].name}-{case[1]}"


IN_OTHER_FORMS = {"scanned and rematerialised-one by one", "convolution-copies"}


@over(
    ("program", "form"),
    PAIRS,
    often=[
        *(name_and_form((program, "at once")) for program in CASES if program.name not in SEEN),
        *IN_OTHER_FORMS,
    ],
    called=name_and_form,
    rare={name_and_form(pair) for pair in PAIRS if pair[1] != "at once"} - IN_OTHER_FORMS,
)
def test_programs(program, form, monkeypatch):
    """Runs scans, loops, branches, tied tables, heads, experts and a convolution."""
    forward = jax.jit(in_form(form, monkeypatch, program.run))
    params, tree, _ = program.inputs()
    trees = {"one": tree, "other": with_random_factors(tree, seed=23)}
    bank = banked(params, list(program.rules), trees)
    names = ["other", "base", "one", "other"]
    x = np.asarray(draw(5, (4, *program.x[1:])))
    if program.name == "weight as the left operand":
        x = x[:, :1]  # it flattens its rows
    is_told = form == "at once" and program.name == NOT_FOLLOWED
    with (
        pytest.warns(MixedWarning, match="one example after another") if is_told else nullcontext()
    ):
        found = forward(bank.choose(names), x)
    expected = [
        alone(program.run, trees, params, name)(x[i : i + 1]) for i, name in enumerate(names)
    ]
    assert_close(found, np.concatenate(expected), 1e-5)
    plain = np.asarray(alone(program.run, trees, params, "base")(x[:1]))
    assert np.abs(expected[0] - plain).max() > 0.05


RULE = {"rank": 5, "alpha": 7.0}
KINDS = {
    "one": {"rank": 2, "alpha": 3.0, "targets": ["q_proj", "v_proj"]},
    "two": {"rank": 4, "scaling": "alpha/sqrt(rank)"},
    "three": {"targets": ["o_proj", "down_proj"], "layers": [1, 2]},
}
NAMES = ["two", "base", "three", "one", "two"]


@pytest.mark.slow
@pytest.mark.parametrize("case", but_rarely(["qwen3", "mixtral", "qwen3.5"], "qwen3"))
def test_decoders(case):
    """Logits and greedy answers, by a KV cache, of rows that are padded on either side."""
    model, params = tiny.decoder(case)
    mlp = [] if case == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    linear = [f"in_proj_{name}" for name in model.config.linear_projections]
    linear = [*linear, "out_proj"] if model.config.linear_layers else []
    rule = {**RULE, "targets": [*(f"{name}_proj" for name in "qkvo"), *mlp, *linear]}
    three = {"targets": ["o_proj", *mlp[2:]]}
    if linear:  # two layers a stack
        three = {"targets": ["in_proj_z", "out_proj", "down_proj"], "layers": [1]}
    kinds = KINDS | {"three": KINDS["three"] | three}
    trees = adapters(params, [rule], **kinds)
    bank = banked(params, [lj.LoraRule(**rule)], trees)
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 61, (5, 8)), np.ones((5, 8), bool)
    mask[0, :3] = mask[3, 6:] = False
    forward = mixed(model.apply, one_by_one=case == "mixtral")  # experts sort all tokens together
    call = {"max_new_tokens": 4}
    logits = jax.jit(forward)({"params": bank.choose(NAMES)}, ids, attention_mask=mask)
    said = models.generate(model, bank.choose(NAMES), ids, mask, apply=forward, **call)
    logits, run = np.asarray(logits), lj.adapt(model.apply)
    compiled = {apply: jax.jit(apply) for apply in (run, model.apply)}
    for i, name in enumerate(NAMES[:4]):
        tree, apply = (params, model.apply) if name == "base" else (trees[name], run)
        row = slice(i, i + 1)
        expected = compiled[apply]({"params": tree}, ids[row], attention_mask=mask[row])
        assert_close(logits[row], expected, 1e-5)
        if name == "two":
            alone = models.generate(model, tree, ids[row], mask[row], apply=apply, **call)
            np.testing.assert_array_equal(said[row], alone)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_an_encoder_with_heads_of_its_own(form, monkeypatch):
    """Each adapter's classifier trains in full; DoRA and a bias on B stand beside plain LoRA."""
    model, params = tiny_encoders.model("bert", "classification")
    head = lj.TrainRule(targets=["classifier"])
    two = [{"targets": ["query", "value"], **RULE}, {"targets": ["dense"], **RULE}]
    room = [{**two[0], "dora": True}, {**two[1], "bias_on_b": True}]
    changes: dict[str, list[dict[str, Any]]] = {
        "plain": [{**rule, "rank": 3} for rule in two],
        "variants": room,
        "some layers": [{**room[0], "layers": [1], "rank": 2}],
    }
    trees = {}
    for seed, (name, rules) in enumerate(changes.items()):
        own = [head, *(lj.LoraRule(**rule) for rule in rules)]
        trees[name] = with_random_factors(lorafied(params, own), seed=seed)
    bank = banked(params, [head, *(lj.LoraRule(**rule) for rule in room)], trees)
    names = ["variants", "plain", "base", "some layers", "variants"]
    ids = np.random.default_rng(1).integers(0, 61, (5, 9))

    def run(tree, ids):
        return model.apply({"params": tree}, ids)

    found = np.asarray(jax.jit(in_form(form, monkeypatch, run))(bank.choose(names), ids))
    for i, name in enumerate(names):
        one = alone(run, trees, params, name)(ids[i : i + 1])
        assert_close(found[i : i + 1], one, 1e-5)


def test_a_batch_of_one_example():
    """It is run as it is: nothing is mapped, nothing has to be followed; a scalar gets an axis."""
    program = PROGRAMS[0]
    params, tree, x = program.inputs()
    bank, x = banked(params, list(program.rules), {"one": tree}), np.asarray(x)

    def run(params, x):
        y = program.run(params, x)
        return y[jnp.argsort(x[:, 0, 0])], jnp.sum(y)

    found = jax.jit(mixed(run))(bank.choose(["one"]), x[:1])
    rows, total = compiled(run, True)(tree, x[:1])
    assert_close(found, (rows, np.asarray(total)[None]), 1e-6)
    with pytest.warns(MixedWarning, match="one example after another"):  # the control
        jax.eval_shape(mixed(run), bank.choose(["one", "base"]), x[:2])


@forms
def test_products_with_the_base_stay_one_for_all_examples(form, monkeypatch):
    program = PROGRAMS[0]
    params, tree, _ = program.inputs()
    bank = banked(params, list(program.rules), {"one": tree})
    x, names = draw(5, (4, 13, 5)), ["one", "base", "one", "base"]

    def products(fn, *args):
        return len(dots_of_size(jax.jit(fn).lower(*args).compile().as_text(), (4, 13, 7)))

    forward = in_form(form, monkeypatch, program.run)
    assert products(forward, bank.choose(names), x) == 2  # xW, and that of the factors

    def one_after_the_other(trees, x):  # the control
        rows = [lj.adapt(program.run)(one, row) for one, row in zip(trees, x, strict=True)]
        return jnp.stack(rows)

    rows = jax.jit(one_after_the_other).lower([tree] * 4, x).compile().as_text()
    assert len(dots_of_size(rows, (13, 7))) == 8


@over("form", FORMS, often=["at once"])
def test_gradients(form, monkeypatch):
    """The gradient of each slot's factors is that of its own examples; others' are zero."""
    program = PROGRAMS[1]
    params, tree, _ = program.inputs()
    trees = {"one": tree, "other": with_random_factors(tree, seed=23)}
    bank = banked(params, list(program.rules), trees, slots=3)
    x = np.asarray(draw(5, (4, 13, 5)))
    ids = bank.ids(["other", "one", "one", "base"])
    forward = in_form(form, monkeypatch, program.run)

    def loss(tree: Any) -> jax.Array:
        return jnp.sum(forward(choose(tree, ids), x) ** 3)

    found = slots_module.slots_of(jax.jit(jax.grad(loss, allow_int=True))(bank.tree))
    adapter, base = lj.split(tree)

    def own(adapter):
        return jnp.sum(lj.adapt(program.run)(lj.join(adapter, base), x[1:3]) ** 3)

    for path, parts in jax.jit(jax.grad(own))(adapter).items():
        axis = found[path].slot_axis
        for name in ("a", "b"):
            arrays = np.moveaxis(np.asarray(found[path].arrays[name]), axis, 0)
            assert_close(arrays[1], parts[name], 1e-5)
            assert not arrays[3].any() and np.abs(arrays[2]).max() > 0.01


def test_what_is_refused():
    params, tree, x = PROGRAMS[0].inputs()
    rules, run = list(PROGRAMS[0].rules), PROGRAMS[0].run
    bank, x = banked(params, rules, {"one": tree}, slots=2), np.asarray(x)
    choice = bank.choose(["one", "base", "one"])
    forward = mixed(run)
    with pytest.raises(TypeError, match=r"Pass bank\.choose\(names\)"):
        forward(params, x)
    with pytest.raises(ValueError, match="3 adapters are chosen, but an argument of shape"):
        forward(choice, x[:2])
    with pytest.raises(TypeError, match="in_axes has 1 entries, but there are 2 arguments"):
        mixed(run, in_axes=(0,))(choice, x)
    with pytest.raises(TypeError, match="kwarg_axes contains 'y'"):
        mixed(run, kwarg_axes={"y": 0})(choice, x)
    with pytest.raises(TypeError, match="Remove dropout_key"):
        forward(choice, x, dropout_key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"no axis 1 .* out_axes"):
        mixed(run, out_axes=1, one_by_one=True)(choice, x)
    with pytest.raises(ValueError, match="no slot 3. Its slots are 0 to 2"):
        bank.choose(np.array([0, 3]))
    with pytest.raises(ValueError, match=r"but has the shape \(1, 2\)"):
        bank.choose(np.array([[0, 1]]))
    with pytest.raises(TypeError, match=r"through\s+lora_jax\.bank\.mixed"):
        run(bank.tree, x)
