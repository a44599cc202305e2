"""The policies of rematerialisation from most memory to least, and the first of them that fits."""

import dataclasses
from collections.abc import Callable, Sequence

GIB = 2**30

# From the fastest to the leanest. By the estimates of a TPU's compiler for Llama-3.1-8B and rows of
# 8,192 tokens, a GiB of what a kernel of attention returns saves more than 100 ms of work, a GiB of
# its projections 40, and of an MLP's products 30: what costs most and takes least goes last.
LADDER = ("none", "products", "projections", "attention", "full", "offload")
# Predictions may be short of a compiled step by so much.
MARGIN = 0.08

KEPT_KERNELS = ("splash", "flash")  # whose results "attention" keeps

_KEPT = {
    "none": "nothing is computed again",
    "products": "the layers are computed again, but for their products and kernels",
    "projections": "the layers are computed again, but for attention's products and kernels",
    "attention": "the layers are computed again, but for the kernels of attention",
    "full": "the layers are computed again",
    "offload": "the layers are computed again, and their inputs go to the host's memory",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RematChoice:
    """The policy that a step is compiled with.

    Attributes:
      remat: its name, one of `LADDER`.
      predicted: bytes of a device for each policy that was looked at, in their order.
      capacity: bytes of the smallest device; None where it is not known.
      lower: the policies that take less memory, in order.
      above: the leanest policy that its prediction alone ruled out; None if there is none.
    """

    remat: str
    predicted: dict[str, int]
    capacity: int | None
    lower: tuple[str, ...] = ()
    above: str | None = None

    @property
    def fits(self) -> bool:
        """Returns True if there is a prediction, and it leaves the margin."""
        return self.remat in self.predicted and fits(self.predicted[self.remat], self.capacity)

    @property
    def is_last(self) -> bool:
        """Returns True if no other policy is left to compile."""
        return not self.lower and self.above is None

    def describe(self) -> str:
        """Returns the choice and its reason in a line."""
        if self.capacity is None:
            why = "the memory of the device is not known"
        else:
            of = f"predicted {_gib(self.predicted[self.remat])} of {_gib(self.capacity)} GiB"
            above = [
                f"{name} would take {_gib(size)}"
                for name, size in self.predicted.items()
                if name != self.remat
            ]
            why = ", ".join([of, *above])
            if not self.fits:
                why += f": more than {1 - MARGIN:.0%} of the memory, and nothing takes less"
        return f"remat: {self.remat} ({_KEPT[self.remat]}): {why}"


def rungs_for(platform: str, attention: str) -> tuple[str, ...]:
    """Returns the policies of `LADDER` that differ from each other on a platform.

    Args:
      platform: "cpu", whose memory is the host's, or another.
      attention: the name of the implementation of attention; what some kernels return can be kept.
    """
    without = {"offload", "products", "projections"} if platform == "cpu" else set()
    if attention not in KEPT_KERNELS:
        without.add("attention")
    return tuple(remat for remat in LADDER if remat not in without)


def fits(size: int, capacity: int | None) -> bool:
    """Returns True if a predicted number of bytes leaves the margin; False if nothing is known."""
    return capacity is not None and size <= (1 - MARGIN) * capacity


def choose_remat(
    rungs: Sequence[str], predict: Callable[[str], int], capacity: int | None
) -> RematChoice:
    """Returns the first policy whose predicted bytes fit; the last one where none does.

    Deterministic in its arguments: processes with the same shapes and capacity choose alike.

    Args:
      rungs: policies of `LADDER`, in its order.
      predict: returns the bytes of a device of a policy; it is called for each until one fits.
      capacity: bytes of the smallest device; None where it is not known: then the choice is "full",
        or the last.

    >>> from lora_jax.training.memory.ladder import choose_remat
    >>> sizes = {"none": 30, "attention": 12, "full": 10}
    >>> choose_remat(tuple(sizes), sizes.__getitem__, 16).remat
    'attention'
    """
    if capacity is None:
        remat = "full" if "full" in rungs else rungs[-1]
        return RematChoice(remat=remat, predicted={}, capacity=None, lower=_after(rungs, remat))
    predicted: dict[str, int] = {}
    for remat in rungs:
        predicted[remat] = predict(remat)
        if fits(predicted[remat], capacity):
            break
    return RematChoice(
        remat=remat,
        predicted=predicted,
        capacity=capacity,
        lower=_after(rungs, remat),
        above=[None, *predicted][-2],
    )


def next_choice(choice: RematChoice, needed: int | None) -> RematChoice | None:
    """Returns the choice after one that did not fit: one policy down; None if nothing is left.

    A prediction may be too high. So after the last policy comes `RematChoice.above`.

    Args:
      choice: the policy that did not fit.
      needed: the bytes that its compiled step takes; None where the compiler did not say.
    """
    known = {**choice.predicted} if needed is None else {**choice.predicted, choice.remat: needed}
    if choice.lower:
        remat, *lower = choice.lower
        return dataclasses.replace(choice, remat=remat, predicted=known, lower=tuple(lower))
    if choice.above is None:
        return None
    return dataclasses.replace(choice, remat=choice.above, predicted=known, above=None)


def _after(rungs: Sequence[str], remat: str) -> tuple[str, ...]:
    return tuple(rungs[rungs.index(remat) + 1 :])


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"
