"""A token of decoding over codes, by the TPU's compiler (extra `tpu`); no chip measured it."""

import math
import re

import pytest

from lora_jax.core import few_rows
from tests.train.plan.test_slices_tpu import KERNELS, OF_8B
from tests.train.plan.tiny_plans import asked, write
from train.plan import __main__ as plan
from train.plan import token as planned

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
    texts, read = [], planned.hlo_of
    monkeypatch.setattr(planned, "hlo_of", lambda *of: texts.append(read(*of)) or texts[-1])

    def planned_token(codes):
        words = ("--topology", "v5e:1x1", "--seq-len", 256, "--dtype", "bfloat16")
        words += ("--quantize", codes, "--targets", "all-linear", "--decode-rows", ROWS)
        options = asked(write(tmp_path, OF_8B), *words)
        job, _ = plan.make_job(options.plan)
        made = planned.plan_token(job, plan.variants(options)[0], ROWS)
        print(codes, made.seconds, made.floor_seconds)
        return made, kernels_written(texts[-1])

    return planned_token


@pytest.mark.parametrize(("codes", "most"), [("int8", 2.5), ("nf4", 8)])
def test_a_token_reads_codes_and_writes_no_kernel(token, codes, most):
    made, written = token(codes)
    assert made.floor_seconds <= made.seconds <= most * made.floor_seconds and not written


def test_many_rows_write_kernels(token, monkeypatch):
    """The control: the form of many rows, with few."""
    monkeypatch.setattr(few_rows, "FEW", 0)
    made, written = token("int8")
    assert made.seconds > 8 * made.floor_seconds and written
