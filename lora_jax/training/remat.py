"""The remat policies from most to least memory, and the search for one that fits.

A compiler tells what a step needs with a policy. A rule of bytes per layer names the policy to
compile first; the search goes on from there.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax.core.types import Tree
from lora_jax.core.weight import leaves_of
from lora_jax.models import DecoderConfig, GPT2Config

GIB = 2**30

# From the fastest to the leanest. By the estimates of a TPU's compiler for Llama-3.1-8B and rows of
# 8,192 tokens, a GiB of what a kernel of attention returns saves more than 100 ms of work, a GiB of
# its projections 40, and of an MLP's products 30: what costs most and takes least goes last.
LADDER = ("none", "products", "projections", "attention", "full", "offload")
# The policies that some of the layers can have. With "products:7", the last seven layers have
# "products", and the others have the next leaner policy.
COUNTED = ("products", "projections", "attention")
KEPT_KERNELS = ("splash", "flash")  # whose results "attention" keeps
SLOW_SECONDS = 120.0  # of a compilation; after a slower one, few policies are tried
_ROOMY = 2 / 3  # a step that takes less of the memory leaves room for a faster policy
# What remains free with a counted policy. Close to its limit, a TPU's compiler recomputes more and
# no longer overlaps collectives: 184 ms of 3,397 for Llama-3.1-8B on v5e, at 97% of the memory.
_RESERVE = 0.04
_REFUSAL = "RESOURCE_EXHAUSTED"  # in a compiler's message: the program does not fit

_KEPT = {
    "none": "nothing is computed again",
    "products": "the layers are computed again, but for their products and kernels",
    "projections": "the layers are computed again, but for attention's products and kernels",
    "attention": "the layers are computed again, but for the kernels of attention",
    "full": "the layers are computed again",
    "offload": "the layers are computed again, and their inputs go to the host's memory",
}


def expected_bytes(
    config: Any,
    params: Tree,
    kinds: Mapping[str, str],
    *,
    tokens: int,
    itemsize: int,
    arguments: int,
) -> dict[str, int]:
    """Returns the estimated bytes per device of a step, for each policy of `LADDER`.

    It is a rule, and no model of a compiler: the arguments, what all layers keep, and twice what
    one layer computes with.

    Args:
      config: the model's configuration.
      params: its plain parameters, or their shapes.
      kinds: the kind of each parameter, by path; see `lora_jax.models.kinds`.
      tokens: the tokens that a device has at once.
      itemsize: bytes of an element of an activation.
      arguments: bytes of the step's arguments.
    """
    n_layers = max(1, config.num_hidden_layers)
    widths = {"attention": 0, "mlp": 0, "experts": 0}  # of the outputs of all layers' products
    width_of_down = 0  # of the last products of MLPs, which "products" does not keep
    for path, leaf in leaves_of(params)[0]:
        kind = kinds.get(path)
        if kind in widths and len(leaf.shape) > 1:
            width = math.prod(leaf.shape[:-2]) * leaf.shape[-1]
            widths[kind] += width
            if kind == "mlp" and leaf.shape[-2] != config.hidden_size:
                width_of_down += width
    # Of the experts, a token goes through a few.
    n_experts = getattr(config, "num_experts", None) or 1
    active = getattr(config, "num_experts_per_tok", None) or n_experts
    size = tokens * itemsize
    inputs = kernels = n_layers * config.hidden_size * size
    projections = widths["attention"] * size
    products = projections + (widths["mlp"] + widths["experts"] * active // n_experts) * size
    everything = 2 * (products + kernels)  # what is elementwise takes as much again
    kept = {
        "none": everything,
        "products": products - width_of_down * size + kernels,
        "projections": projections + kernels,
        "attention": kernels,
        "full": 0,
        "offload": -inputs,
    }
    of_all = arguments + inputs + 2 * everything // n_layers
    return {remat: of_all + size for remat, size in kept.items()}


def countable_layers(config: Any) -> int:
    """Returns the number of a model's layers for counted policies; 0 if it cannot have any.

    Args:
      config: the model's configuration.
    """
    is_decoder = type(config) is DecoderConfig and not config.num_experts
    is_one_stack = is_decoder and [*config.runs] == [*config.runs.get("", {})] == [""]
    is_countable = is_one_stack or isinstance(config, GPT2Config)
    return config.num_hidden_layers if is_countable else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """A step compiled with one policy.

    Attributes:
      remat: the policy, one of `LADDER`, or a counted one.
      size: bytes of a device; None where the compiler does not say.
      refused: whether the compiler refused the step for want of memory.
      seconds: the time of the compilation.
      crashed: whether the compiler ended its process, which says nothing about the memory.
      step: the compiled step; None where it was refused, or is not needed any more.
    """

    remat: str
    size: int | None
    refused: bool
    seconds: float
    crashed: bool = False
    step: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RematSearch:
    """A search over remat policies, with estimates from before compilation.

    Attributes:
      rungs: the policies, in the order of `LADDER`.
      capacity: bytes of the smallest device; None where a device does not say.
      first: the policy to compile first.
      is_settled: whether an earlier search ended with `first`, for the same shapes and devices.
      n_layers: the layers that a counted policy can have; see `countable_layers`.
      expected: the bytes that each policy is expected to take; needed for counted policies.
    """

    rungs: tuple[str, ...]
    capacity: int | None
    first: str
    is_settled: bool = False
    n_layers: int = 0
    expected: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        rungs: Sequence[str],
        capacity: int | None,
        expected: Mapping[str, int],
        settled: str | None = None,
        n_layers: int = 0,
    ) -> "RematSearch":
        """Returns a search that starts with a known policy, or else the likeliest one.

        The likeliest one is the fastest that is expected to fit. Where none is, or the memory is
        not known, it is "full".

        Args:
          rungs, capacity: see `RematSearch`.
          expected: the bytes that each policy is expected to take; see `expected_bytes`.
          settled: the policy with which an earlier search ended; None for none.
          n_layers: see `RematSearch`.

        >>> from lora_jax.training.remat import RematSearch
        >>> sizes = {"none": 30, "attention": 12, "full": 10}
        >>> RematSearch.begin([*sizes], 16, sizes).first
        'attention'
        """
        if settled is not None and settled.partition(":")[0] in rungs:
            first = settled
        else:
            first = "full"
            for rung in rungs:
                if capacity is not None and expected[rung] <= capacity:
                    first = rung
                    break
        return cls(
            rungs=(*rungs,),
            capacity=capacity,
            first=first,
            is_settled=first == settled,
            n_layers=n_layers,
            expected=expected,
        )

    def position(self, remat: str) -> float:
        """Returns the place of a policy in the order from the fastest to the leanest one."""
        policy, _, number = remat.partition(":")
        return self.rungs.index(policy) + (0.5 if number else 0)

    def fits(self, attempt: Attempt) -> bool:
        """Returns True if a step fits; if its size is unknown, lean policies count as fitting."""
        if self.capacity is None or attempt.size is None:
            is_lean = self.position(attempt.remat) >= self.position("full")
            return is_lean and not attempt.refused and not attempt.crashed
        return attempt.size <= self.capacity and not attempt.refused

    def best(self, attempts: Sequence[Attempt]) -> Attempt | None:
        """Returns the fastest attempt that fits, or None."""
        fitting = [attempt for attempt in attempts if self.fits(attempt)]
        return min(fitting, key=lambda attempt: self.position(attempt.remat), default=None)

    def next_remat(self, attempts: Sequence[Attempt]) -> str | None:
        """Returns the policy to compile next, or None if the search is over.

        A leaner policy follows one that does not fit. A faster one follows one that was compiled
        soon and leaves a third of the memory. At the end, as many layers as fit get the faster
        policy. After a slow compilation, only the leanest policy is tried, and only if the step
        did not fit.
        """
        best = self.best(attempts)
        if best is None:
            return self._next_leaner(attempts)
        has_slow = any(attempt.seconds > SLOW_SECONDS for attempt in attempts)
        has_counted = any(":" in attempt.remat for attempt in attempts)
        if has_slow or has_counted or self.is_settled:
            return None
        best_rung = self.rungs.index(best.remat)
        if best_rung == 0:
            return None
        faster = self.rungs[best_rung - 1]
        is_tried = any(attempt.remat == faster for attempt in attempts)
        if self._is_roomy(best) and not is_tried:
            return faster
        return self._counted(best, faster)

    def _counted(self, best: Attempt, faster: str) -> str | None:
        """Returns a faster policy for the layers that fit beside a compiled step, or None."""
        if self.capacity is None or best.size is None or not self.n_layers or faster not in COUNTED:
            return None
        free_bytes = (1 - _RESERVE) * self.capacity - best.size
        bytes_of_layers = self.expected[faster] - self.expected[best.remat]
        n_layers = int(free_bytes * self.n_layers / max(1, bytes_of_layers))
        n_layers = min(n_layers, self.n_layers - 1)
        return f"{faster}:{n_layers}" if n_layers > 0 else None

    def _next_leaner(self, attempts: Sequence[Attempt]) -> str | None:
        """Returns the next policy after attempts that do not fit, or None."""
        last_attempt = attempts[-1]
        position = self.position(last_attempt.remat)
        leaner_rungs = tuple(rung for rung in self.rungs if self.position(rung) > position)
        if last_attempt.crashed:
            return leaner_rungs[0] if leaner_rungs else None
        is_size_unknown = last_attempt.size is None and not last_attempt.refused
        if is_size_unknown:
            leaner_rungs = ("full",)
        is_slow = [attempt.seconds > SLOW_SECONDS for attempt in attempts]
        if any(is_slow[:-1]):
            return None
        if not leaner_rungs:
            return None
        return leaner_rungs[-1] if is_slow[-1] else leaner_rungs[0]

    def _is_roomy(self, attempt: Attempt) -> bool:
        if self.capacity is None or attempt.size is None:
            return False
        return attempt.size <= _ROOMY * self.capacity

    def run(
        self,
        compile_rung: Callable[[str], Attempt],
        notice: Callable[[str], object] = lambda line: None,
    ) -> list[Attempt]:
        """Compiles policies until the search is over; returns all attempts.

        Of the compiled steps, only the best one is kept.

        Args:
          compile_rung: compiles the step with a policy.
          notice: is told why another policy is compiled.
        """
        attempts: list[Attempt] = []
        remat: str | None = self.first
        while remat is not None:
            attempts.append(compile_rung(remat))
            best = self.best(attempts)
            attempts = [
                attempt if attempt is best else dataclasses.replace(attempt, step=None)
                for attempt in attempts
            ]
            remat = self.next_remat(attempts)
            if remat is not None:
                last_attempt = attempts[-1]
                if last_attempt.crashed:
                    standing = "has no step"
                elif last_attempt is not best:
                    standing = "does not fit"
                elif ":" in remat:
                    standing = "leaves memory for some layers"
                else:
                    standing = "leaves a third of the memory"
                reason = f"{last_attempt.remat} {standing} ({self._size(last_attempt)})"
                notice(f"remat: {reason}: compiling anew with {remat}")
        return attempts

    def describe(self, attempts: Sequence[Attempt]) -> str:
        """Returns a line with the chosen policy and the reason."""
        best = self.best(attempts)
        if best is None:
            sizes = "; ".join(f"{attempt.remat}: {self._size(attempt)}" for attempt in attempts)
            return f"remat: no policy that was tried fits ({sizes})"
        policy, _, number = best.remat.partition(":")
        explanation = _KEPT[policy]
        if number:
            leaner = self.rungs[self.rungs.index(policy) + 1]
            explanation = f"the policy of {number} layers; the others have {leaner}"
        return f"remat: {best.remat} ({explanation}): {self._size(best)}"

    def _size(self, attempt: Attempt) -> str:
        """Returns a text with the size of a step, or the reason why it is unknown."""
        if attempt.crashed:
            return "the compiler crashed on the step"
        if attempt.refused:
            return "the compiler refuses the step for want of memory"
        if attempt.size is None:
            return "the compiler does not say what the step takes"
        size = f"the compiled step takes {attempt.size / GIB:,.2f}"
        if self.capacity is None:
            return f"{size} GiB, and the memory of the device is not known"
        return f"{size} of {self.capacity / GIB:,.2f} GiB"


def rungs_for(platform: str, attention: str) -> tuple[str, ...]:
    """Returns the policies of `LADDER` that make a difference on a platform.

    Args:
      platform: "cpu", whose memory is the host's, or another.
      attention: the name of the implementation of attention; what some kernels return can be kept.
    """
    without = {"offload", "products", "projections"} if platform == "cpu" else set()
    if attention not in KEPT_KERNELS:
        without.add("attention")
    return tuple(remat for remat in LADDER if remat not in without)


def is_refusal(error: BaseException) -> bool:
    """Returns True if a compiler error means that the program does not fit into memory."""
    return _REFUSAL in str(error)


def compiled_bytes(compiled: Any) -> dict[str, int]:
    """Returns the memory of a compiled function, in bytes; {} if the backend does not report it."""
    memory = compiled.memory_analysis()
    if memory is None:
        return {}
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }


def step_bytes(compiled: Any) -> int | None:
    """Returns the bytes per device of a compiled step; None if they are not reported."""
    return total_bytes(compiled_bytes(compiled))


def total_bytes(sizes: Mapping[str, int]) -> int | None:
    """Returns the sum of `compiled_bytes`; None if the backend does not report them.

    Donated arguments become outputs, so that both of them count the aliased bytes.
    """
    return sum(sizes.values()) - 2 * sizes["aliased"] if sizes else None
