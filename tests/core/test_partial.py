"""Codes of FP8, with blocks that the edge of an axis cuts: numbers, moves, meshes and files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import export, lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import quantized, sharding
from lora_jax.quantized import FORMATS, Coded
from lora_jax.quantized.coded import host_array
from tests.core.coded import coded_program
from tests.core.test_quantized import HEADS, STACK
from tests.hf.shipped import e4m3, spread
from tests.laws import test_laws as laws
from tests.support import assert_close, assert_identical, draw, lorafied, with_random_factors

SMALL = dataclasses.replace(FORMATS["fp8"], block=5)  # of axes of 8, 12 and 16, the last is cut


def fp8(shape, format=SMALL, dtype=jnp.float32, seed=0):
    """A weight with a scale for each block of its last two axes."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2, shape) << 7 | rng.integers(0, 65, shape)
    scales = (*shape[:-2], *(-(-n // format.block) for n in shape[-2:]))
    values = rng.uniform(0.1, 1, scales).astype(np.float32)
    arrays = {"codes": jnp.asarray(codes.astype(np.uint8)), "scales": jnp.asarray(values)}
    return Coded(arrays, format, jnp.dtype(dtype))


@pytest.mark.parametrize("shape", [(576, 300), (1000, 256), (256, 1000), (128, 130), (90, 60)])
def test_partial_blocks_are_bitwise_right(shape):
    """Makes every code, NaN too, with scales of all magnitudes; 1,000 rows have eight blocks."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, shape, np.uint8)
    rows, columns = (-(-n // 128) for n in shape)
    scales = np.exp2(rng.uniform(-126, 110, (rows, columns))).astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        want = e4m3(codes) * spread(scales, shape, 128, 128)
    coded = Coded({"codes": codes, "scales": scales}, FORMATS["fp8"], np.float32)
    assert np.isnan(want).any() and (np.abs(want) < np.finfo(np.float32).tiny).any()
    np.testing.assert_array_equal(host_array(coded), want)
    flushed = np.where(np.abs(want) < np.finfo(np.float32).tiny, 0, want)
    np.testing.assert_array_equal(jax.jit(lambda coded: coded.as_array())(coded), flushed)
    assert coded.blocks == tuple(min(n, 128) for n in shape)


def test_powers_of_two_of_every_byte():
    every = np.arange(256, dtype=np.uint8)[:, None]
    codes = np.full((256, 32), 2, np.int8).astype(jnp.int4)  # 1.0
    coded = Coded({"codes": codes, "scales": every}, FORMATS["mxfp4"], np.float32)
    exact = np.where(every == 255, np.nan, np.exp2(every % 255 - 127.0))
    want = np.broadcast_to(exact, (256, 32)).astype(np.float32)
    np.testing.assert_array_equal(host_array(coded), want)
    got = jax.jit(lambda coded: coded.as_array())(coded)
    np.testing.assert_array_equal(np.asarray(got)[1:], want[1:])


@pytest.mark.slow
@pytest.mark.parametrize("program", [STACK, HEADS], ids=lambda program: program.name)
def test_laws(program, float64):
    program = coded_program(program, lambda leaf, roles: fp8(leaf.shape, dtype=leaf.dtype))
    laws.test_factored_equals_merged(program, None)
    laws.test_inverses(program)
    laws.test_no_frozen_gradient(program)
    laws.test_commutes_with_jit_and_vmap(program, None)
    laws.test_vmap_over_adapters(program, None)


@pytest.mark.parametrize("block", [4, 5, 8])
def test_in_shard_map(block, float64):
    """Each device has its blocks; where the last is cut, or they do not come out even, W."""
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    x = draw(9, (13, 16), jnp.float64)

    def run(params, x):
        def part(w, x):
            return x @ lax.all_gather(w, "tensor", axis=0, tiled=True)

        specs = (P("tensor"), P())
        local = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
        return local(params["kernel"], x)

    format = dataclasses.replace(SMALL, block=block)
    kernel = fp8((16, 20), format, jnp.float64)
    rule = lj.LoraRule(targets=["kernel"], rank=2, alpha=3.0, dtype=jnp.float64)
    tree = with_random_factors(lorafied({"kernel": kernel}, [rule]))
    ours = jax.jit(lj.adapt(run, strict=True))(tree, x)
    assert_close(ours, np.asarray(x) @ np.asarray(lj.merge(tree)["kernel"]), 1e-9)


def test_on_a_mesh():
    """Codes are sharded; scales too where blocks are whole, and replicated where one is cut."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    table = [(".*", P("x", "y"))]
    tree = {"cut": fp8((3, 16, 12)), "whole": fp8((3, 20, 10))}
    placed = sharding.place(tree, table, mesh)
    where = jax.tree.map(lambda array: array.sharding.spec, placed)
    assert where["cut"].arrays["codes"] == where["whole"].arrays["codes"] == P(None, "x", "y")
    assert where["cut"].arrays["scales"] == P(None, None, None)
    assert where["whole"].arrays["scales"] == P(None, "x", "y")
    assert_identical(quantized.dequantize(placed), quantized.dequantize(tree))


@pytest.mark.slow
def test_stored_and_exported(tmp_path):
    tree = with_random_factors(
        lorafied({"kernel": fp8((128, 24))}, [lj.LoraRule(targets=["kernel"], rank=2)])
    )
    x = draw(9, (13, 128))
    forward = jax.jit(lj.adapt(lambda p, x: x @ p["kernel"]))
    again = export.deserialize(export.export(forward)(tree, x).serialize())
    assert_close(again.call(tree, x), forward(tree, x), 1e-6)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", tree)
        checkpointer.wait_until_finished()
        assert_identical(checkpointer.restore(tmp_path / "state", tree), tree)
    lj.save_adapter(tmp_path / "adapter", tree)
    assert_identical(lj.load_adapter(tmp_path / "adapter", lj.strip(tree)), tree)
    text = str(quantized.report(lj.strip(tree)))
    assert "fp8" in text and f"{128 * 24 + 4 * 26 * 5:,}" in text


def test_what_is_only_read():
    with pytest.raises(ValueError, match="Choose one of"):
        quantized.encode(draw(1, (128, 24)), "fp8")
    blocks_of_64 = dataclasses.replace(FORMATS["fp8"], block=64)  # which no file would read again
    for format in (*(FORMATS[name] for name in ("fp8", "mxfp4", "nvfp4")), blocks_of_64):
        with pytest.raises(ValueError, match="can be read from files, but"):
            quantized.encode(draw(1, (128, 24)), format)
