"""Leaves that a rule selects, and the errors of rules that select none."""

import copy
import pickle
import types

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax import peft
from lora_jax.variants import variants_of


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


TREE = {
    "model": {
        "embed_tokens": {"embedding": shaped(31, 5)},
        "layers": {
            "self_attn": {
                "q_proj": {"kernel": shaped(3, 5, 7), "bias": shaped(3, 7)},
                "v_proj": {"kernel": shaped(3, 5, 11)},
                "q_norm": {"scale": shaped(3, 7)},
            },
            "mlp": {"up_proj": {"kernel": shaped(3, 5, 13)}},
        },
    },
    "lm_head": {"kernel": shaped(5, 31)},
}
Q = "model/layers/self_attn/q_proj/kernel"
V = "model/layers/self_attn/v_proj/kernel"
UP = "model/layers/mlp/up_proj/kernel"
NUMBERED = {f"layers_{i}": {"dense": {"kernel": shaped(5, 7)}} for i in range(3)}


def selected(rules, tree=TREE):
    return set(lj.split(lj.lorafy(tree, rules))[0])


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (["q_proj"], (), {Q}),
        (["q_proj", "v_proj"], (), {Q, V}),
        (["self_attn/q_proj"], (), {Q}),
        (["self_attn"], (), {Q, V}),
        (["self_attn"], ["v_proj"], {Q}),
        ("all-linear", (), {Q, V, UP}),
        ("all-linear", r".*/mlp/.*", {Q, V}),
        (r".*(q|v)_proj/kernel", (), {Q, V}),
        (r".*q_proj.*", (), {Q}),
        (["lm_head"], (), {"lm_head/kernel"}),
        (["embed_tokens"], (), {"model/embed_tokens/embedding"}),
    ],
)
def test_targets(targets, exclude, expected):
    assert selected([lj.LoraRule(targets=targets, exclude=exclude)]) == expected


@pytest.mark.filterwarnings("ignore::lora_jax.LeftOutWarning")
def test_all_linear_in_the_heads_of_masked_language_models():
    """As PEFT does: the layer before the output, not the output."""
    kernel = {"kernel": shaped(5, 7)}
    tree = {
        "lm_head": {"dense": kernel, "decoder": kernel},
        "cls": {"predictions": {"transform": {"dense": kernel}, "decoder": kernel}},
        "classifier": {"dense": kernel, "out_proj": kernel},
    }
    expected = {"lm_head/dense/kernel", "cls/predictions/transform/dense/kernel"}
    assert selected([lj.LoraRule(targets="all-linear")], tree) == expected


@pytest.mark.parametrize("name", ["proj", "q_pro", "_proj", "q_proj/bias"])
def test_a_name_is_a_run_of_whole_segments(name):
    with pytest.raises(ValueError, match="selects no leaf"):
        selected([lj.LoraRule(targets=[name])])


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["bias"], {"model/layers/self_attn/q_proj/bias"}),
        (["lm_head"], {"lm_head/kernel"}),
        (r".*norm/scale", {"model/layers/self_attn/q_norm/scale"}),
    ],
)
def test_train_rule(targets, expected):
    assert selected([lj.TrainRule(targets=targets)]) == expected


def test_a_train_rule_takes_every_leaf():
    tree = lj.lorafy(TREE, [lj.TrainRule(targets=".*")])
    assert lj.count_params(tree) == (lj.count_params(TREE)[1],) * 2


def test_the_first_rule_wins():
    tree = lj.lorafy(
        TREE, [lj.LoraRule(targets=["q_proj"], rank=2), lj.LoraRule(targets="all-linear", rank=3)]
    )
    attention = tree["model"]["layers"]["self_attn"]
    assert attention["q_proj"]["kernel"].ranks == (2,)
    assert attention["v_proj"]["kernel"].ranks == (3,)


def test_layers_of_a_stack_and_of_numbered_modules():
    tree = lj.lorafy(
        TREE,
        [
            lj.LoraRule(targets=["q_proj"], layers=[2], rank=2, alpha=3),
            lj.LoraRule(targets=["q_proj"], layers=[0], rank=4, alpha=3),
        ],
    )
    assert tree["model"]["layers"]["self_attn"]["q_proj"]["kernel"].ranks == (4, 0, 2)
    rules = [lj.LoraRule(targets=["dense"], layers=[0, 2])]
    assert selected(rules, NUMBERED) == {"layers_0/dense/kernel", "layers_2/dense/kernel"}


def test_linen_automatic_names_count_no_layers():
    tree = {"ScanBlock_0": {"Dense_0": {"kernel": shaped(3, 5, 7)}}}
    adapted = lj.lorafy(tree, [lj.LoraRule(targets=["Dense_0"], layers=[1], rank=2)])
    assert adapted["ScanBlock_0"]["Dense_0"]["kernel"].ranks == (0, 2, 0)


@pytest.mark.parametrize(
    ("rules", "tree", "message"),
    [
        (
            [lj.LoraRule(targets=["q_prj"])],
            TREE,
            r"LoraRule\(targets=\['q_prj'\]\) selects.*most similar.*\n +model.*q_proj/kernel",
        ),
        ([lj.LoraRule(targets=["q_norm"])], TREE, r"q_norm/scale.*not a kernel. Use a TrainRule"),
        (
            [lj.LoraRule(targets=["q_proj"]), lj.LoraRule(targets=["q_proj"], rank=3)],
            TREE,
            "earlier rule selects",
        ),
        ([lj.LoraRule(targets=["q_proj"], exclude=["q_proj"])], TREE, "exclude= contains"),
        ([lj.LoraRule(targets=["q_proj"], layers=[7])], TREE, "layer"),
        ([lj.LoraRule(targets=["q_proj"], layers=[1, 7])], TREE, "layer 7"),
        ([lj.LoraRule(targets=["dense"], layers=[7])], NUMBERED, "none of the layers"),
        ([lj.LoraRule(targets=["fc"])], {"fc": {"weight": shaped(5, 7)}}, "in_axes=…, out_axes=…"),
        (
            [lj.LoraRule(targets=["fc"], in_axes=[0], out_axes=[2])],
            {"fc": {"weight": shaped(5, 7)}},
            "Axis 2 does not exist",
        ),
        ([], TREE, "rules is empty"),
        ([lj.LoraRule(targets=["x"])], {}, "no leaves"),
        (
            [
                lj.LoraRule(targets=["q_proj"], layers=[0], dropout=0.5),
                lj.LoraRule(targets=["q_proj"]),
            ],
            TREE,
            "may only differ in rank and alpha",
        ),
    ],
)
def test_errors_say_what_was_found(rules, tree, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        lj.lorafy(tree, rules)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            lj.LoraRule(targets=["q_proj", "v_prj"]),
            r"targets=\['q_proj', 'v_prj'\]\).*target 'v_prj' selects no leaf.*v_proj/kernel",
        ),
        (lj.LoraRule(targets=["q_proj", "q_norm"]), "'q_norm'.*not a kernel. Use a TrainRule"),
        (lj.TrainRule(targets=["lm_head", "norms"]), "target 'norms' selects no leaf"),
        (lj.LoraRule(targets=["all-linear", "experts"]), "target 'experts' selects no leaf"),
    ],
)
def test_each_name_of_a_list_selects_something(rule, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        selected([rule])


def test_a_name_that_another_rule_or_exclude_leaves_nothing_is_no_mistake():
    names = ["q_proj", "lm_head"]
    assert selected([lj.LoraRule(targets=names, exclude=["lm_head"])]) == {Q}
    assert selected([lj.TrainRule(targets=["lm_head"]), lj.LoraRule(targets=names)]) == {
        Q,
        "lm_head/kernel",
    }


def test_lists_of_peft_may_hold_other_models_names():
    config = {"r": 2, "target_modules": ["q_proj", "query"], "modules_to_save": ["lm_head", "cls"]}
    assert selected(peft.rules(config)) == {Q, "lm_head/kernel"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lj.LoraRule(targets=["q"], r=8), "no field 'r'. Write rank="),
        (lambda: lj.LoraRule(targets=["q"], lora_alpha=8), "'lora_alpha'. Write alpha="),
        (lambda: lj.LoraRule(targets=["q"], lora_dropout=0.1), "Write dropout="),
        (lambda: lj.LoraRule(target_modules=["q"]), r"Write targets=\["),
        (lambda: lj.LoraRule(targets=["q"], use_rslora=True), r"scaling='alpha/sqrt\(rank\)'"),
        (lambda: lj.LoraRule(targets=["q"], use_dora=True), "Write dora=True"),
        (
            lambda: lj.LoraRule(targets=["q"], rnak=8),
            "no field 'rnak'. The most similar field is rank.$",
        ),
        (
            lambda: lj.LoraRule(targets=["q"], foo=1),
            "no field 'foo'. The most similar field is [a-z_]+.$",
        ),
        (
            lambda: lj.TrainRule(targets=["q"], row=[1]),
            "no field 'row'. The most similar field is rows.$",
        ),
        (lambda: lj.LoraRule(["q"]), r"keyword arguments only. Write LoraRule\(targets=\['q'\]"),
        (lambda: lj.TrainRule(modules_to_save=["q"]), r"Write targets=\["),
        (
            lambda: lj.lorafy(TREE, lj.LoraRule(targets=["q_proj"], rank=2)),
            r"rules must be a list. Write \[LoraRule\(targets=\['q_proj'\], rank=2\)\]",
        ),
        (
            lambda: lj.lorafy(TREE, "q_proj"),
            r"rules must be a list, such as \[LoraRule.*not 'q_proj'",
        ),
        (
            lambda: lj.lorafy(TREE, types.SimpleNamespace(peft_type="LORA")),
            r"lora_jax.peft.rules\(config\)",
        ),
        (
            lambda: lj.lorafy(TREE, [lj.LoraRule(targets=["q_proj"])], key=0),
            r"key=0 is not a PRNG key. Write jax.random.key\(0\)",
        ),
    ],
)
def test_common_mistakes_are_told_what_to_write(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_rules_may_be_any_iterable():
    names = ("q_proj", "v_proj")
    rules = [lj.LoraRule(targets=[name]) for name in names]
    for given in ((rule for rule in rules), tuple(rules), dict.fromkeys(rules).keys()):
        assert selected(given) == {Q, V}
    with pytest.raises(TypeError, match="A rule must be a LoraRule or a TrainRule, not 'q_proj'"):
        selected(name for name in names)
    with pytest.raises(ValueError, match="rules is empty. Give at least one"):
        selected(iter(()))


@pytest.mark.parametrize(
    ("targets", "names"),
    [("q_proj", ["q_proj"]), ("q_proj,v_proj", ["q_proj", "v_proj"]), ("q_proj|mlp",) * 2],
)
def test_a_string_of_names_is_told_to_be_a_list(targets, names):
    names = names.split("|") if isinstance(names, str) else names
    with pytest.raises(ValueError) as caught:
        selected([lj.LoraRule(targets=targets)])
    assert (
        f"pattern for whole paths (re.fullmatch), and names belong in a list. Write targets={names}"
        in (str(caught.value))
    )


BARE = [shaped(5, 7), shaped(7, 3)]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (BARE, r"no leaf is named kernel or w.*trace=\(fn, params, x\).*'0'\n +'1'"),
        (tuple(BARE), r"trace=\(fn, params, x\).*'0'"),
        (BARE[0], r"trace=\(fn, params, x\)"),
        ({"fc": {"weight": shaped(7, 5), "bias": shaped(7)}}, r"trace=\(fn, .*'fc/weight'"),
        (
            {"lm_head": {"kernel": shaped(5, 7)}},
            "By their names, all kernels are embeddings or heads.*lm_head",
        ),
        ({"norm": {"scale": shaped(7)}}, "No leaf is a floating-point array with two axes or more"),
    ],
)
def test_all_linear_tells_of_trace_where_names_tell_nothing(tree, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        lj.lorafy(tree, [lj.LoraRule(targets="all-linear")])


SIDE = {
    "lin": {"a": shaped(5, 3), "b": shaped(3, 7)},
    "stack": {"w": shaped(2, 5, 7), "b": shaped(2, 7), "scale": shaped(2, 7)},
    "wide": {"v": shaped(5, 7), "b": shaped(1, 7)},
    "other": {"scale": shaped(5, 7)},
}


def test_a_kernel_that_has_the_name_of_a_bias_is_taken_where_its_axes_are_said():
    axes = {"in_axes": [-2], "out_axes": [-1], "rank": 2}
    assert selected([lj.LoraRule(targets=".*", **axes)], SIDE) == {
        "lin/a",
        "lin/b",
        "stack/w",
        "wide/v",
    }
    assert selected([lj.LoraRule(targets=["other/scale"], **axes)], SIDE) == {"other/scale"}
    with pytest.raises(ValueError, match=r"(?s)'lin/b' is a bias.*targets=\['b'\], in_axes=…"):
        selected([lj.LoraRule(targets=r"lin/b", rank=2)], SIDE)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"targets": []}, "targets is empty"),
        ({"targets": "("}, "not a regular expression"),
        ({"targets": [""]}, "non-empty string"),
        ({"rank": 0}, "at least 1"),
        ({"rank": 2.0}, "integer"),
        ({"alpha": -1.0}, "positive"),
        ({"alpha": float("nan")}, "positive"),
        ({"dropout": 1.0}, "probability"),
        ({"scaling": "alpha"}, "alpha/rank"),
        ({"dtype": jnp.int32}, "floating-point"),
        ({"in_axes": [0]}, "both in_axes and out_axes"),
    ],
)
def test_a_rule_refuses_nonsense(field, message):
    with pytest.raises(ValueError, match=message):
        lj.LoraRule(**({"targets": ["q"]} | field))


@pytest.mark.parametrize(
    ("rule", "scale"),
    [
        (lj.LoraRule(targets=["q"], rank=4, alpha=6.0), 1.5),
        (lj.LoraRule(targets=["q"], rank=4, alpha=6.0, scaling="alpha/sqrt(rank)"), 3.0),
        (lj.LoraRule(targets=["q"], rank=4), 1.0),
    ],
)
def test_scale(rule, scale):
    assert rule.scale == scale


def test_rules_are_values():
    rule = lj.LoraRule(targets=["q", "v"], rank=4, dora=True)
    assert pickle.loads(pickle.dumps(rule)) == copy.deepcopy(rule) == rule
    a, b = (lj.LoraRule(targets=["q", "v"], layers=[1]) for _ in range(2))
    assert a == b and hash(a) == hash(b)


def test_an_adapted_weight_tells_its_variant():
    """By which files say it: PEFT would read DoRA's as plain LoRA, and compute something else."""
    kernel = {"q_proj": {"kernel": jax.ShapeDtypeStruct((6, 6), jnp.float32)}}
    named = {"dora": "DoRA", "xs": "LoRA-XS", "vera": "VeRA", "tinylora": "TinyLoRA"}
    for option, name in named.items():
        tree = lj.lorafy(kernel, [lj.LoraRule(targets=["q_proj"], rank=2, **{option: True})])
        assert [variant.name for variant in variants_of(tree["q_proj"]["kernel"])] == [name]
    plain = lj.lorafy(kernel, [lj.LoraRule(targets=["q_proj"], rank=2)])
    assert variants_of(plain["q_proj"]["kernel"]) == []
