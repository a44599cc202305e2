"""A token of decoding over codes, by the TPU's compiler (extra `tpu`); no chip measured it."""

import math
import re

import pytest

from lora_jax.core import few_rows
from lora_jax.quantized import rows as kernels
from tests.train.plan.test_slices_tpu import KERNELS, OF_8B
from tests.train.plan.tiny_plans import asked, write
from train.plan import __main__ as plan
from train.plan import token as planned
from train.plan.clock.groups import BASE

pytestmark = [pytest.mark.tpu_compiler, pytest.mark.usefixtures("tpu_compiler")]
ROWS = 8
_WRITTEN = re.compile(r"\s+(?:ROOT )?%\S+ = \(?(?:f32|bf16)\[([\d,]+)\]")


def kernels_written(text):
    """The sizes of the floats that a schedule writes, if they are as many as a kernel has."""
    sizes = {math.prod(shape) for shape in KERNELS.values()}
    lines = (line for line in text.splitlines() if '"estimated_cycles"' in line)
    made = [math.prod(map(int, m[1].split(","))) for line in lines if (m := _WRITTEN.match(line))]
    return [size for size in made if size in sizes]


@pytest.fixture
def token(tmp_path, monkeypatch):
    """Plans a token of two layers on one chip: (the plan, the kernels that it writes)."""
    texts, read = [], planned.optimized_hlo_of
    monkeypatch.setattr(
        planned, "optimized_hlo_of", lambda *of: texts.append(read(*of)) or texts[-1]
    )

    def planned_token(codes):
        words = ("--topology", "v5e:1x1", "--seq-len", 256, "--dtype", "bfloat16")
        words += ("--quantize", codes, "--targets", "all-linear", "--decode-rows", ROWS)
        options = asked(write(tmp_path, OF_8B), *words)
        job, _ = plan.make_job(options.plan)
        made = planned.plan_token(job, plan.variants_to_plan(options)[0], ROWS)
        print(codes, made.seconds, made.floor_seconds)
        return made, kernels_written(texts[-1])

    return planned_token


def bytes_by_codes(made, bits):
    """The bytes that products with the base read and write, over those of codes and scales."""
    codes = 2 * sum(map(math.prod, KERNELS.values())) * (bits / 8 + 4 / 64)
    return sum(group.bytes for group in made.clock.groups if group.group == BASE) / codes


@pytest.mark.parametrize(("codes", "bits", "most"), [("int8", 8, 1.6), ("nf4", 4, 4.5)])
def test_a_token_reads_codes_and_writes_no_kernel(token, codes, bits, most):
    made, written = token(codes)
    assert made.floor_seconds <= made.seconds <= most * made.floor_seconds and not written
    assert made.clock.kernels > 0 and 1 <= bytes_by_codes(made, bits) < 1.05


def test_more_rows_have_xlas_form(token, monkeypatch):
    """The control: no kernel, which reads and writes more; but it writes no kernel's floats."""
    monkeypatch.setattr(kernels, "MAX_KERNEL_ROWS", ROWS - 1)
    made, written = token("int8")
    assert 1.6 * made.floor_seconds < made.seconds <= 2 * made.floor_seconds and not written
    assert made.clock.kernels == 0 and bytes_by_codes(made, 8) > 1.3


def test_many_rows_write_kernels(token, monkeypatch):
    """The control: the form of many rows, with few."""
    monkeypatch.setattr(few_rows, "MAX_FEW_ROWS", 0)
    made, written = token("int8")
    assert made.seconds > 2.2 * made.floor_seconds and written
