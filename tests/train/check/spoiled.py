"""A child of a check whose groups hang, crash and fail: `train.check.child` with other rows."""

import os
import sys
import time

import jax

from lora_jax.models.layers.kernels.splash import Splash
from train.check import child
from train.check.rows import CheckRow, attention_rows
from train.check.table import FAILS, HOLDS, RowResult

SECONDS = 60.0  # of a row that hangs


class Scaled(Splash):
    """The kernel, interpreted; on the second device, its results are a tenth too large."""

    def compute(self, inputs):
        out = super().compute(inputs)
        factor = jax.numpy.asarray([1.0, 1.1], out.dtype)[jax.lax.axis_index("device")]
        return factor * out


def hang():
    time.sleep(SECONDS)


def crash():
    sys.stderr.write("a kernel wrote to memory that is not its own\n")
    sys.stderr.flush()
    os.abort()


def leave():
    sys.exit(3)


def refuse():
    raise RuntimeError("the compiler refuses\nand says more")


def holding(name):
    return CheckRow(name, lambda: RowResult(name, HOLDS, "error 0"))


def rows(_):
    wrong = RowResult("product: b", FAILS, "error 1")
    return [
        holding("product: a"),
        CheckRow("product: hangs", hang),
        CheckRow("product: b", lambda: wrong),
        CheckRow("attention: crashes", crash),
        CheckRow("experts: leaves", leave),
        CheckRow("experts: raises", refuse),
        holding("product: last"),
    ]


def main():
    jax.config.update("jax_num_cpu_devices", 2)
    child.GROUPS.clear()
    child.GROUPS |= {
        "attention": rows,
        "hanging": lambda _: [CheckRow("hanging: 1", hang), holding("hanging: 2")],
        "scaled": lambda _: attention_rows(Scaled(block=128, interpret=True), unit=64)[:1],
        "dead": lambda _: crash(),
    }
    child.main()
