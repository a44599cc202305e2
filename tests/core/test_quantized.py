"""Bases in 8 and 4 bits: their numbers, by outside references; their trees; what a step holds."""

import dataclasses
import hashlib
import math
import re

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import quantized, sharding
from lora_jax.core.axes import AxisRoles
from lora_jax.quantized import FORMATS, Coded, Format, QuantRule, encode
from lora_jax.quantized.coded import _repeat, _repeat_by_tiles
from lora_jax.quantized.gguf import TYPES
from tests.core.coded import check_variant, coded_program, decoded, is_on
from tests.laws import test_laws as laws
from tests.support import (
    MORE_PROGRAMS,
    PROGRAMS,
    assert_close,
    assert_identical,
    draw,
    lorafied,
    over,
    thorough,
    with_random_factors,
)

# Blocks of four, so that axes of eight and twelve hold two and three of them.
SHORT = {name: dataclasses.replace(FORMATS[name], block=4) for name in ("nf4", "int8", "int4")}
SHORT["nf4-double"] = dataclasses.replace(FORMATS["nf4-double"], block=4)
OUR_PROGRAMS = {p.name: p for p in PROGRAMS + MORE_PROGRAMS}
STACK = dataclasses.replace(
    OUR_PROGRAMS["scanned and rematerialised"],
    params=lambda t: {
        "layers": {
            "up": {"kernel": draw(1, (3, 8, 12), t), "bias": draw(2, (3, 12), t)},
            "down": {"kernel": draw(3, (3, 12, 8), t)},
        }
    },
    x=(2, 13, 8),
)
HEADS = dataclasses.replace(
    OUR_PROGRAMS["einsum with heads"],
    params=lambda t: {
        "query": {"kernel": draw(1, (8, 3, 4), t)},
        "out": {"kernel": draw(2, (3, 4, 11), t)},
    },
    x=(2, 13, 8),
)


def by(format):
    return lambda leaf, roles: encode(leaf, format, roles)


@pytest.mark.slow
def test_factored_equals_merged(float64):
    quantised = coded_program(STACK, by(SHORT["nf4-double"]))
    assert is_on(quantised.inputs(jnp.float64)[1])
    laws.test_factored_equals_merged(quantised, None)


WITH_BLOCKS = [STACK, HEADS]
SHOWN = ("scanned and rematerialised", "experts, tokens sorted")  # the others: test_base.py's codes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "name"),
    [
        pytest.param(program, ("nf4", "int8")[i % 2], marks=[thorough] * (name not in SHOWN))
        for i, (name, program) in enumerate(OUR_PROGRAMS.items())
    ]
    + [(program, name) for program in WITH_BLOCKS for name in ("nf4", "int8")]
    + [pytest.param(program, "nf4-double", marks=thorough) for program in WITH_BLOCKS],
    ids=lambda case: getattr(case, "name", case),
)
def test_laws(program, name, float64):
    """Runs the laws; where sizes are primes, a block is a whole axis."""
    has_blocks = program in WITH_BLOCKS
    program = coded_program(program, by((SHORT if has_blocks else FORMATS)[name]))
    laws.test_factored_equals_merged(program, None)
    laws.test_inverses(program)
    laws.test_no_frozen_gradient(program)
    if "sorted" not in program.name:  # no vmap of ragged_dot
        laws.test_commutes_with_jit_and_vmap(program, None)
        laws.test_vmap_over_adapters(program, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "changes"),
    [
        pytest.param(STACK, {"dora": True, "dropout": 0.5}, id="stack-DoRA, dropout"),
        pytest.param(STACK, {"bias_on_b": True}, id="stack-bias on B"),
        pytest.param(STACK, {"init": lj.init.pissa}, id="stack-PiSSA"),
        pytest.param(STACK, {"xs": True}, id="stack-LoRA-XS"),
        pytest.param(STACK, {"vera": True}, id="stack-VeRA"),
        pytest.param(HEADS, {"dora": True}, id="heads-DoRA"),
        pytest.param(HEADS, {"init": lj.init.olora}, id="heads-OLoRA"),
        pytest.param(HEADS, {"freeze_a": True}, id="heads-LoRA-FA"),
        pytest.param(HEADS, {"vera": True}, id="heads-VeRA"),
    ],
)
def test_variants(program, changes, float64):
    """As over the arrays that the codes stand for: values, and gradients of the adapter."""
    program = coded_program(program, by(SHORT["nf4"]))
    check_variant(program, changes)


# Of bitsandbytes 0.50.2 on a CPU: quantize_4bit(w, blocksize=64, quant_type="nf4"), two codes in a
# byte, the first one in the high half; its absmax; and the SHA-256 of dequantize_4bit's fp32 bytes.
BNB_CODES = (
    "70c220b021e6dee80453f5bc819dd918cb5f35307ded5e11f9022f9f10d3bdb4e120d1663e3773e24309e0fa"
    "1463f5bb717cb604862c010d279507cd919dd705972d010d279507cc818cc604761bf0fb1463f4995f4883e1"
    "32f6ded5e110b1331c122f8e0fa168518deb3cffc3cee916972c01fa1442e2662e14309f0fb16850"
)
BNB_SCALES = [1.0, 0.9602278470993042, 0.03039747104048729, 0.030953332781791687]
BNB_VALUES = "251455068432341f565180514a4f32f4b476f533c64550aa79feb38485c5c4c5"


def test_nf4_is_that_of_bitsandbytes():
    i = np.arange(256)
    w = ((i * i * 7919 + i * 104729) % 20011 - 10005).astype(np.float32) / np.float32(10007)
    w = w.reshape(2, 128)  # [out, in]
    w[1] *= np.float32(0.03125)
    w[0, :3] = [0.0, -1.0, 0.5]
    ours = encode(w.T, "nf4")
    codes = (np.asarray(ours.arrays["codes"]).T.astype(np.int8) + 8).astype(np.uint8).reshape(-1, 2)
    assert bytes(codes[:, 0] << 4 | codes[:, 1]).hex() == BNB_CODES
    np.testing.assert_array_equal(np.asarray(ours.arrays["scales"]).T.ravel(), BNB_SCALES)
    values = np.ascontiguousarray(np.asarray(ours.as_array()).T)
    assert hashlib.sha256(values.tobytes()).hexdigest() == BNB_VALUES


def gguf_tensor(kind, shape):
    """The bytes of a tensor, drawn where gguf cannot quantise to its type."""
    rng, of = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quantize(rng.standard_normal(shape).astype(np.float32), of)
    except NotImplementedError:
        weights, size = gguf.GGML_QUANT_SIZES[of]
        raw = rng.integers(0, 256, (math.prod(shape) // weights, size), np.uint8)
        for at in {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]:
            factors = rng.standard_normal((len(raw), 1)).astype(np.float16)
            raw[:, at : at + 2] = factors.view(np.uint8)
        return raw.reshape(shape[0], -1)


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_of_gguf_files_are_read_bitwise(kind):
    raw = gguf_tensor(kind, (6, 512))
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    coded = quantized.from_gguf(raw, kind, (6, 512))
    np.testing.assert_array_equal(quantized.dequantize(coded), expected)
    turned = jax.tree.map(lambda array: np.stack([array.T, array[::-1].T]), coded)
    np.testing.assert_array_equal(quantized.dequantize(turned)[0], expected.T)
    np.testing.assert_array_equal(quantized.dequantize(turned)[1], expected[::-1].T)
    assert coded.nbytes < 0.63 * 2 * expected.size
    with pytest.raises(ValueError, match="does not have .* bytes"):
        quantized.from_gguf(raw[:5], kind, (6, 512))


@pytest.mark.parametrize(
    ("name", "error", "size"),
    [
        pytest.param("nf4", 0.093, 0.30, marks=pytest.mark.slow),
        ("nf4-double", 0.093, 0.265),
        ("int4", 0.109, 0.30),
    ]
    + [("int8", 0.007, 0.54)],
)
def test_errors_and_bytes(name, error, size):
    """Measures normal weights; bytes, as compiled and as reported, are shares of bf16's."""
    kernel = draw(1, (2, 1024, 384))
    params = {"layers": {"kernel": kernel.astype(jnp.bfloat16)}}
    base = quantized.quantize(params, name)
    assert 0.5 * error < quantized.error_of(encode(kernel, name), kernel) <= error
    found = quantized.report(base, of=params)
    assert (found.before, found.rows[0].format) == (2 * kernel.size, name)
    compiled = jax.jit(decoded).lower(base).compile().memory_analysis()
    assert 0.9 * found.after < compiled.argument_size_in_bytes <= size * 2 * kernel.size
    assert found.rows[0].error <= error and name in str(found)


def test_a_format_is_an_entry():
    """FP8 of E4M3, and MXFP4 with its powers of two, whose values lie on their own grids."""

    def power_of_two(absmax):
        return jnp.exp2(jnp.floor(jnp.log2(absmax)) - 2)

    fp8 = Format("fp8", jnp.float8_e4m3fn, block=128, top=448)
    grid = {"scale_of": power_of_two, "scale_dtype": jnp.float8_e8m0fnu, "top": 6}
    mxfp4 = Format("mxfp4", jnp.float4_e2m1fn, block=32, **grid)
    kernel = draw(1, (256, 96))
    for format, bound in ((fp8, 0.03), (mxfp4, 0.13)):
        coded = encode(kernel, format)
        assert 0.5 * bound < quantized.error_of(coded, kernel) < bound
        again = encode(coded.as_array(), format)
        assert_close(again.as_array(), coded.as_array(), 1e-6)


def scanned(params, x):
    def layer(x, kernels):
        return x + jnp.tanh(x @ kernels["up"]["kernel"]) @ kernels["down"]["kernel"], None

    return lax.scan(jax.checkpoint(layer), x, params["layers"])[0]


def largest_float(hlo):
    shapes = re.findall(r"= (?:f64|f32|f16|bf16)\[([\d,]*)\]", hlo)
    return max(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)


@pytest.mark.slow
@over("changes", [{}, {"dora": True}], often=["{}"])
def test_a_step_holds_one_kernel_at_most(changes):
    """No array of floats in the program of a gradient is larger; where W is formed first, some are.

    (Residuals, 6 × 5 × 128, are smaller than a kernel.)
    """
    params = {
        "layers": {
            "up": {"kernel": draw(1, (6, 128, 192))},
            "down": {"kernel": draw(2, (6, 192, 128))},
        }
    }
    base = quantized.quantize(params, "nf4")
    rule = lj.LoraRule(targets="all-linear", rank=2, **changes)
    adapter, base = lj.split(lorafied(base, [rule]))

    def compiled(prepare):
        def loss(adapter, base, x):
            return jnp.sum(lj.adapt(scanned, strict=True)(prepare(lj.join(adapter, base)), x))

        return jax.jit(jax.grad(loss)).lower(adapter, base, draw(3, (5, 128))).compile().as_text()

    assert largest_float(compiled(lambda tree: tree)) == 128 * 192
    if not changes:  # the control
        assert largest_float(compiled(quantized.dequantize)) >= 6 * 128 * 192


def test_scales_by_whole_tiles_are_the_scales():
    """A TPU's form of what other platforms spread at once."""
    scales = draw(2, (5, 3, 7))
    for axis in (1, 2):
        assert_identical(_repeat_by_tiles(scales, axis, 32), _repeat(scales, axis, 32))


@pytest.mark.parametrize("is_ragged", [True, False])
def test_the_barrier_before_the_kernel_that_is_formed_again(is_ragged):
    """It stands before scales alone: a TPU would copy codes for it."""
    base = {"w": encode(draw(1, (6, 64, 24)), "int8")}
    sizes = jnp.full(6, 50)

    def loss(x, base):
        def product(params, x):
            return lax.ragged_dot(x, params["w"], sizes) if is_ragged else x @ params["w"][0]

        return jnp.sum(jnp.sin(lj.adapt(product)(base, x)))

    text = jax.jit(jax.grad(loss)).lower(draw(2, (300, 64)), base).as_text()
    types = " ".join(re.findall(r"optimization_barrier .* : (.*)", text))
    assert re.search(r"\D1x24xf32>", types) and "xi8>" not in types, types


def model(dtype=jnp.float32):
    """A tree with one leaf of each kind."""
    return {
        "embed_tokens": {"embedding": draw(1, (96, 64), dtype)},
        "layers": {
            "q_proj": {"kernel": draw(2, (2, 64, 128), dtype), "bias": draw(3, (2, 128), dtype)},
            "mlp": {"kernel": draw(4, (2, 128, 64), dtype)},
            "gate": {"kernel": draw(5, (2, 64, 8), dtype)},
            "norm": {"scale": draw(6, (2, 64), dtype)},
            "odd": {"kernel": draw(7, (2, 262, 64), dtype)},
        },
        "lm_head": {"kernel": draw(8, (64, 96), dtype)},
    }


def formats(tree):
    rows = quantized.report(tree).rows
    return {row.path: row.format for row in rows if row.format}


def test_selection():
    params = model()
    with pytest.warns(
        quantized.QuantizeWarning, match="'layers/odd/kernel'.*cannot be divided into blocks"
    ):
        base = quantized.quantize(params, "nf4")
    both = {"layers/q_proj/kernel": "nf4", "layers/mlp/kernel": "nf4"}
    assert formats(base) == both
    assert base["layers"]["norm"]["scale"] is params["layers"]["norm"]["scale"]

    keep = ["layers/odd"]
    assert formats(quantized.quantize(params, "int8", keep=[*keep, "mlp"])) == {
        "layers/q_proj/kernel": "int8"
    }
    rules = [
        QuantRule(targets=["mlp"], format="int8"),
        QuantRule(format="nf4"),
        QuantRule(targets=["embedding"], format="int4"),
    ]
    mixed = quantized.quantize(params, rules=rules, keep=keep)
    assert formats(mixed) == both | {"layers/mlp/kernel": "int8", "embed_tokens/embedding": "int4"}
    assert mixed["embed_tokens"]["embedding"].blocks == (1, 64)  # rows of a table are read whole
    some = quantized.quantize(params, "nf4", keep=[*keep, "mlp"])
    assert formats(quantized.quantize(some, "int8", keep=keep)) == both | {
        "layers/mlp/kernel": "int8"
    }
    with pytest.raises(ValueError, match="selects no leaf.*are already quantized"):
        quantized.quantize(mixed, "int8", keep=keep)

    for missing in ("q_prj", [*keep, "q_prj"]):  # a pattern, and a name beside another
        with pytest.raises(ValueError, match=r"keep='q_prj' names no leaf.*\n  layers/q_proj/"):
            quantized.quantize(params, keep=missing)
    quantized.quantize(params, keep=lj.rules.AnyOf([*keep, "q_prj"]))
    with pytest.raises(ValueError, match=r"QuantRule\(.*'nowhere'.*selects no leaf"):
        quantized.quantize(params, rules=[QuantRule(targets=["nowhere"])])
    with pytest.raises(ValueError, match="format='nf3' is unknown. Choose one of 'int8'"):
        quantized.quantize(params, "nf3")
    adapted = lj.lorafy(params, [lj.LoraRule(targets=["mlp"])])
    with pytest.raises(ValueError, match="already adapted.*strip"):
        quantized.quantize(adapted)


@pytest.mark.slow
def test_leaves_of_every_kind():
    """NumPy's, abstract ones, tracers, and arrays on a mesh give the same codes."""
    params, keep = model(), ["layers/odd"]
    base = quantized.quantize(params, "nf4-double", keep=keep)
    abstract = quantized.quantize(jax.eval_shape(model), "nf4-double", keep=keep)
    assert jax.tree.structure(abstract) == jax.tree.structure(base)
    pairs = zip(jax.tree.leaves(abstract), jax.tree.leaves(base), strict=True)
    assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)
    host = quantized.quantize(jax.tree.map(np.asarray, params), "nf4-double", keep=keep)
    assert_identical(host, base)
    traced = jax.jit(lambda p: quantized.quantize(p, "nf4-double", keep=keep))(params)
    assert_close(quantized.dequantize(traced), quantized.dequantize(base), 1e-6)
    plan = quantized.plan(jax.eval_shape(model), "nf4-double", keep=keep)
    assert_identical(
        encode(params["layers"]["mlp"]["kernel"], plan["layers/mlp/kernel"]),
        base["layers"]["mlp"]["kernel"],
    )

    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind,) * 2)
        table = [(".*/mlp/kernel", P("tensor", "data")), (".*/q_proj/kernel", P("data", "tensor"))]
        spread = quantized.quantize(sharding.place(params, table, mesh), "nf4-double", keep=keep)
        assert_identical(spread, base)
        where = jax.tree.map(lambda x: x.sharding, spread["layers"])
        expected = sharding.shardings(base, table, mesh)["layers"]
        assert where["mlp"]["kernel"].arrays == expected["mlp"]["kernel"].arrays
        scales = spread["layers"]["mlp"]["kernel"].arrays["scales"]
        assert scales.sharding.spec == P(None, "tensor", "data")  # two blocks, one for each part
        plain = quantized.dequantize(spread)["layers"]["mlp"]["kernel"]
        assert plain.sharding == NamedSharding(mesh, P(None, "tensor", "data"))


def test_donated_leaves_are_gone():
    params = model()
    quantized.quantize(params, "int8", keep=["layers/odd"], donate=True)
    assert params["layers"]["mlp"]["kernel"].is_deleted()
    assert not params["lm_head"]["kernel"].is_deleted()


def test_merged_into_codes_again():
    """Merging forms arrays; codes of them lose what is smaller than their step, and say so."""
    params = model()
    base = quantized.quantize(params, "nf4", keep=["layers/odd"])
    tree = with_random_factors(lorafied(base, [lj.LoraRule(targets=["mlp"], rank=2)]))
    merged = lj.merge(tree)
    kernel, mlp = merged["layers"]["mlp"]["kernel"], base["layers"]["mlp"]["kernel"]
    delta = tree["layers"]["mlp"]["kernel"].factored().delta(jnp.float32)
    assert_close(kernel, mlp.as_array() + delta, 1e-6)
    assert merged["layers"]["q_proj"]["kernel"] is base["layers"]["q_proj"]["kernel"]
    again, errors = quantized.requantize(merged, like=tree)
    assert formats(again) == formats(base)
    assert errors.keys() == {"layers/mlp/kernel"}
    assert 0.05 < errors["layers/mlp/kernel"] < 0.12
    same, errors = quantized.requantize(quantized.dequantize(base), like=tree)
    assert_identical(same, base)
    assert max(errors.values()) < 1e-6
    with pytest.raises(ValueError, match="the two trees differ at"):
        quantized.requantize({"a": kernel}, like=tree)


@pytest.mark.slow
def test_adapters_know_their_codes(tmp_path):
    """A file of an adapter goes onto the same codes, and onto no others."""
    params = model()
    base = quantized.quantize(params, "nf4", keep=["layers/odd"])
    tree = with_random_factors(lorafied(base, [lj.LoraRule(targets=["mlp"], rank=2)]))
    lj.save_adapter(tmp_path / "adapter", tree)
    assert_identical(lj.load_adapter(tmp_path / "adapter", base), tree)
    assert_identical(lj.swap(lj.lorafy(base, [lj.LoraRule(targets=["mlp"], rank=2)]), tree), tree)
    assert lj.count_params(tree)[1] == lj.count_params(params)[1] + lj.count_params(tree)[0]
    kernel = base["layers"]["q_proj"]["kernel"]
    codes = kernel.arrays["codes"].at[1, 2, 3].set(kernel.arrays["codes"][1, 2, 3] ^ 1)
    base["layers"]["q_proj"]["kernel"] = dataclasses.replace(
        kernel, arrays=kernel.arrays | {"codes": codes}
    )
    with pytest.raises(lj.AdapterError, match="another base.*q_proj/kernel"):
        lj.load_adapter(tmp_path / "adapter", base)


def test_rows_of_a_table_in_codes_train(float64):
    """A tied table in codes: looked up, multiplied by, some rows trained, or adapted."""
    program = OUR_PROGRAMS["embedding looked up and tied"]
    table = encode(draw(1, (11, 5)), SHORT["int8"], AxisRoles((-1,), (-2,)))
    x = draw(9, (2, 4, 5))
    tree = {"embed": {"embedding": table}}
    adapter, base = lj.split(lj.lorafy(tree, [lj.TrainRule(targets=["embed"], rows=[3, 7])]))
    adapter = jax.device_get(adapter)
    tree = lj.join(jax.tree.map(lambda v: jnp.asarray(v + np.cos(7 * v)), adapter), base)

    @jax.jit
    def answers(tree, x):
        plain = program.run(decoded(lj.strip(tree)), x)
        return laws.adapted(program)(tree, x), program.run(lj.merge(tree), x), plain

    ours, expected, plain = jax.device_get(answers(tree, x))
    assert_close(ours, expected, 1e-5)
    assert np.abs(ours - plain).max() > 1e-2


@pytest.mark.parametrize(
    ("spec", "block"),
    [(P("tensor"), 4), (P("tensor"), 8), (P(None, "tensor"), 4)],
    ids=["four blocks", "two blocks", "columns"],
)
def test_in_shard_map(spec, block, float64):
    """Each device has its blocks; where these do not come out even, W is formed before."""
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    x = draw(9, (13, 16), jnp.float64)

    def run(params, x):
        def part(w, x):
            whole = lax.all_gather(w, "tensor", axis=0 if spec[0] else 1, tiled=True)
            return x @ whole

        local = jax.shard_map(part, mesh=mesh, in_specs=(spec, P()), out_specs=P(), check_vma=False)
        return local(params["kernel"], x)

    format = dataclasses.replace(FORMATS["nf4"], block=block)
    params = {"kernel": encode(draw(1, (16, 20), jnp.float64), format)}
    rule = lj.LoraRule(targets=["kernel"], rank=2, alpha=3.0, dtype=jnp.float64)
    tree = with_random_factors(lorafied(params, [rule]))
    ours = jax.jit(lj.adapt(run, strict=True))(tree, x)
    assert_close(ours, np.asarray(x) @ np.asarray(lj.merge(tree)["kernel"]), 1e-9)


def nested():
    """Codes whose scales are codes, as files of bitsandbytes bring them."""
    format = dataclasses.replace(FORMATS["nf4-nested"], scale_table=tuple(np.linspace(-1, 2, 256)))
    arrays = encode(draw(1, (128, 24)), "nf4").arrays
    arrays |= {"scales": jnp.arange(48, dtype=jnp.uint8).reshape(2, 24)}
    arrays |= {"scale_steps": jnp.abs(draw(2, (1, 24))), "scale_mean": jnp.full((1, 1), 0.3)}
    return Coded(arrays, format, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("coded", [lambda: encode(draw(1, (128, 24)), "nf4"), nested])
def test_exported(coded):
    params = {"kernel": coded()}
    tree = with_random_factors(lorafied(params, [lj.LoraRule(targets=["kernel"], rank=2)]))
    x = draw(9, (13, 128))
    forward = jax.jit(lj.adapt(lambda p, x: x @ p["kernel"]))
    again = export.deserialize(export.export(forward)(tree, x).serialize())
    assert_close(again.call(tree, x), forward(tree, x), 1e-6)
    own = Format("own", jnp.int8, top=100)
    with pytest.raises(ValueError, match="cannot write Format"):
        export.export(forward)({"kernel": encode(draw(1, (128, 24)), own)}, x).serialize()
