"""The walk over a jaxpr in which some values are weights with factors (`Factored`).

An equation that touches none of them is applied as it stands. One that does follows the rule for
its primitive; where there is none, or the rule declines, the weight is merged at that one place.
"""

import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.adapt import eqns, merging
from lora_jax.adapt.eqns import EagerSteps
from lora_jax.adapt.needed import FactorInputs, Live, needed_equations
from lora_jax.adapt.per_example.labels import ExampleLabel, ExampleLabels, MixedExamples
from lora_jax.adapt.user_code import SourceLine, place_of, place_of_call, user_context
from lora_jax.core.base import as_array, rearranged
from lora_jax.core.extend import Jaxpr, JaxprEqn
from lora_jax.core.factored import ExamplesError, Factored
from lora_jax.core.types import EqnParams, Forward, Outcome, Value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FoldedVector:
    """Weights laid end to end in one vector, unformed.

    `jax.flatten_util.ravel_pytree` lays them so.
    A vector has no in and out axes, so it has no factors. But a function that lays a tree out as a
    vector mostly takes it apart again: it then gets back the weights that went in. The vector lives
    within one jaxpr, and is formed where it leaves it.

    Attributes:
      pieces: weights, each in the shape that it had, and vectors.
    """

    pieces: tuple[Value, ...]

    def formed(self, merged: Callable[[Factored], jax.Array]) -> jax.Array:
        """Returns the vector, its weights formed by `merged`."""
        arrays = [merged(p).reshape(-1) if isinstance(p, Factored) else p for p in self.pieces]
        return jnp.concatenate(arrays) if len(arrays) > 1 else arrays[0]

    def cut(self, start: int, stop: int) -> Value:
        """Returns a stretch of the vector; None where it holds a part of a piece."""
        ends = [0, *itertools.accumulate(map(_size, self.pieces))]
        if start not in ends or stop not in ends:
            return None
        pieces = self.pieces[ends.index(start) : ends.index(stop)]
        is_vector = len(pieces) == 1 and not isinstance(pieces[0], Factored)
        return pieces[0] if is_vector else FoldedVector(pieces)


def _size(piece: Value) -> int:
    return math.prod(piece.base.shape if isinstance(piece, Factored) else piece.shape)


def move_vectors(name: str, params: EqnParams, values: Sequence[Value]) -> Outcome:
    """Returns the outputs of an equation that lays vectors together or takes them apart.

    Args:
      name: name of its primitive.
      params: the equation's.
      values: its operands, one `FoldedVector` or more among them.

    Returns:
      The outputs; None for any other equation, or where a weight is cut into.
    """
    first = values[0]
    if name == "concatenate":
        each = (v.pieces if isinstance(v, FoldedVector) else (v,) for v in values)
        return [FoldedVector(tuple(itertools.chain(*each)))]
    if name == "split":
        ends = [0, *itertools.accumulate(params["sizes"])]
        parts = [first.cut(*pair) for pair in itertools.pairwise(ends)]
        return None if any(part is None for part in parts) else parts
    if name == "slice" and params["strides"] in (None, (1,)):
        part = first.cut(*params["start_indices"], *params["limit_indices"])
        return None if part is None else [part]
    if name == "reshape" and len(first.pieces) == 1:
        (weight,) = first.pieces
        return [weight] if tuple(params["new_sizes"]) == tuple(weight.base.shape) else None
    return None


@dataclasses.dataclass(frozen=True)
class Use:
    """An equation that meets an adapted weight: its operands, and which outputs are wanted."""

    eqn: JaxprEqn
    values: list[Value]  # arrays, at least one `Factored` or `FoldedVector` among them
    live: Live
    inputs: FactorInputs
    jaxpr: Jaxpr  # that the equation is part of
    # The place of examples with adapters of their own, or of tokens, in the other operand.
    at: ExampleLabel = None

    @property
    def params(self) -> EqnParams:
        """The equation's parameters."""
        return self.eqn.params

    @property
    def name(self) -> str:
        """The name of the equation's primitive."""
        name: str = self.eqn.primitive.name
        return name

    @property
    def bases(self) -> list[Value]:
        """The operands, each weight as W alone."""
        return [as_array(v.base) if isinstance(v, Factored) else v for v in self.values]

    def bind(self, values: Sequence[Value]) -> list[Value]:
        """Applies the equation to plain arrays."""
        return eqns.bind(self.eqn, values)

    def rearranged(self, weight: Factored) -> Value:
        """Returns W after the equation, whose one operand is the weight."""
        out = self.eqn.outvars[0].aval
        return rearranged(weight.base, self.eqn.primitive, self.params, out)

    def varying_axes(self, place: int) -> list[int]:
        """Returns the axes along which an operand may vary: not those that it is stretched along.

        Args:
          place: index of the operand.
        """
        atom = self.eqn.invars[place]
        made_by = (eqn for eqn in self.jaxpr.eqns if atom in eqn.outvars)
        source = None if eqns.is_literal(atom) else next(made_by, None)
        if source is None or source.primitive.name != "broadcast_in_dim":
            return [axis for axis, n in enumerate(eqns.type_of(atom).shape) if n != 1]
        before = eqns.type_of(source.invars[0]).shape
        held = zip(source.params["broadcast_dimensions"], before, strict=True)
        return [axis for axis, n in held if n != 1]


class WeightUse(NamedTuple):
    """One use of an adapted weight; see `lora_jax.explain`."""

    path: str
    primitive: str
    place: str  # file:line of the user's code
    how: str  # "factored", "merged" or "unused"
    why: str


# A rule returns the equation's outputs, or None to have its operands merged.
Rule = Callable[["Interpreter", Use], Outcome]


class RoleError(ValueError):
    """A function uses a weight against its recorded axis roles."""


# Functions made of inner jaxprs, so that one that is called forty times, or in call after call,
# is traced and compiled once. An entry goes with the jaxpr that it is made of.
_FUNCTIONS: weakref.WeakKeyDictionary[eqns.AnyJaxpr, dict[Hashable, Forward]] = (
    weakref.WeakKeyDictionary()
)


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """Evaluates jaxprs whose values may be `Factored`."""

    rules: Mapping[str, Rule] = dataclasses.field(hash=False, compare=False)
    strict: bool = False
    # The caller's own rules, by the name of a primitive or of a function; see `adapt`.
    own: tuple[tuple[str, Forward], ...] = ()
    # Called with each use of a weight. Inner functions are then evaluated in each call, not cached.
    record: Callable[[WeightUse], None] | None = None
    # The rule for primitives that have none; without it, weights are merged there.
    default: Rule | None = dataclasses.field(default=None, hash=False, compare=False)
    # Where the examples of a batch lie in the jaxpr that is evaluated, if each has its adapter, or
    # where the tokens lie, if some of them alone see an adapter.
    examples: ExampleLabels | None = None

    def evaluate(
        self,
        jaxpr: eqns.AnyJaxpr,
        args: Sequence[Value],
        live: Live | None = None,
        steps: EagerSteps | None = None,
    ) -> list[Value]:
        """Returns the outputs of `jaxpr`, `Factored` where a weight leaves as it came or moved.

        Args:
          jaxpr: the jaxpr to evaluate.
          args: its inputs.
          live: which outputs are wanted; the others are None, and what only they need is not run.
          steps: in an eager call, the rules that are compiled for equations of this jaxpr; added
            to. None: rules are applied as they are, to be traced with what surrounds them.
        """
        inner, consts = eqns.opened(jaxpr)
        live = (True,) * len(inner.outvars) if live is None else live
        environment: dict[eqns.Atom, Value] = dict(zip(inner.constvars, consts, strict=True))
        environment |= dict(zip(inner.invars, args, strict=True))

        def read(atom: eqns.Atom) -> Value:
            return atom.val if eqns.is_literal(atom) else environment[atom]

        def result(atom: eqns.Atom) -> Value:
            value = read(atom)
            if isinstance(value, FoldedVector):
                return self._unfolded(value, "output", place_of_call())
            return value

        needed = needed_equations(inner, live)
        inputs = FactorInputs()
        done: set[int] = set()  # identities of equations that came before their turn
        if steps is None and self.record is None:
            known = (needed.moves, inner, environment, done)
            inputs = FactorInputs(needed.same_operand, functools.partial(self._ahead, *known))
        site = 0  # counts uses of adapted weights alone, so that other equations change no dropout
        for eqn, wanted, last_uses in needed.equations:
            values = [read(atom) for atom in eqn.invars]
            if id(eqn) in done:
                outputs = [environment[atom] for atom in eqn.outvars]
                site += 1
            elif any(isinstance(value, (Factored, FoldedVector)) for value in values):
                outputs = self._apply(site, Use(eqn, values, wanted, inputs, inner), steps)
                site += any(isinstance(value, Factored) for value in values)
            elif steps is None:
                outputs = eqns.bind(eqn, values)
            else:
                outputs = steps.bind(eqn, values)
            environment |= dict(zip(eqn.outvars, outputs, strict=True))
            for atom in last_uses:
                del environment[atom]
        wanted_atoms = zip(inner.outvars, live, strict=True)
        return [result(atom) if wanted else None for atom, wanted in wanted_atoms]

    def _ahead(
        self,
        moves: Mapping[eqns.Atom, JaxprEqn],
        jaxpr: Jaxpr,
        environment: dict[eqns.Atom, Value],
        done: set[int],
        atom: eqns.Atom,
    ) -> Value:
        """Returns a weight before its turn, moved and cast; None where that is not known yet.

        Args:
          moves: equations of the jaxpr that move or cast, by their results.
          jaxpr: the jaxpr that is evaluated.
          environment: the values so far; added to.
          done: identities of the equations that are done before their turn; added to.
          atom: the operand.
        """
        chain: list[JaxprEqn] = []
        while not eqns.is_literal(atom) and atom not in environment and atom in moves:
            chain.append(moves[atom])
            atom = chain[-1].invars[0]
        value = None if eqns.is_literal(atom) else environment.get(atom)
        for eqn in reversed(chain):
            if not isinstance(value, Factored) or value.key is not None:
                return None
            (value,) = self._apply(0, Use(eqn, [value], (True,), FactorInputs(), jaxpr), None)
            environment[eqn.outvars[0]] = value
            done.add(id(eqn))
        return value

    def function(
        self, jaxpr: eqns.AnyJaxpr, live: Live | None = None
    ) -> Callable[..., list[Value]]:
        """Returns `evaluate` of an inner jaxpr as a function, always the same object."""
        reference = weakref.ref(jaxpr)  # the cache must not keep its own key alive
        within = self
        if self.examples is not None:
            within = dataclasses.replace(self, examples=self.examples.inner.get(id(jaxpr)))

        def make() -> Callable[..., list[Value]]:
            def call(*args: Value) -> list[Value]:
                alive = reference()
                assert alive is not None, "an equation holds its jaxpr while it is evaluated"
                return within.evaluate(alive, args, live)

            return call

        return within.memoised(jaxpr, ("function", live), make)

    def memoised(self, jaxpr: eqns.AnyJaxpr, key: Hashable, make: Callable[[], Forward]) -> Forward:
        """Returns the function that `make` returned the first time for this jaxpr and key."""
        functions = _FUNCTIONS.setdefault(jaxpr, {})
        known = functions.get((self, key))
        return known or functions.setdefault((self, key), make())  # one, whichever thread made it

    def merged(self, weight: Factored, primitive: str, where: JaxprEqn | SourceLine) -> jax.Array:
        """Returns W + s·AB, formed at an equation or a place; see `say_merged`."""
        self.say_merged(weight, primitive, where)
        return weight.merged()

    def plain(self, value: Value, use: Use, how: str = "") -> Value:
        """Returns a value as an array; a weight is merged at the equation, in which it is `how`."""
        what = f"{use.name} ({how})" if how else use.name
        return self.merged(value, what, use.eqn) if isinstance(value, Factored) else value

    def say_merged(self, weight: Factored, primitive: str, where: JaxprEqn | SourceLine) -> None:
        """Warns that a weight is merged at an equation or a place, or raises MergeError."""
        if isinstance(where, SourceLine):
            place, function = where, None
        else:
            place, function = place_of(where), eqns.function_name(where)
        if weight.rows is not None:
            raise ExamplesError(merging.example_error(weight, primitive, place))
        if self.record is not None:
            why = merging.merge_reason(primitive)
            self.record(WeightUse(str(weight.path), primitive, str(place), "merged", why))
        else:
            merging.warn_or_raise(weight, primitive, function, place, strict=self.strict)

    def _apply(self, site: int, use: Use, steps: EagerSteps | None) -> list[Value]:
        eqn, name, values = use.eqn, use.name, use.values
        if any(isinstance(value, FoldedVector) for value in values):
            outputs = move_vectors(name, eqn.params, values)
            if outputs is not None:
                return outputs
            values = [self._unfolded(value, name, eqn) for value in values]
        if not any(isinstance(value, Factored) for value in values):
            return use.bind(values)
        merging.check_tokens(name, values, lambda: place_of(eqn))
        at, here = (
            self._examples_in(eqn, values),
            [fold_dropout_key(value, site) for value in values],
        )
        use = dataclasses.replace(use, values=here, at=at)
        for called, rule in self.own:
            if called in (name, eqns.function_name(eqn)):
                _refuse_rows(eqn, values)
                with user_context(eqn):
                    outputs = rule(*use.values, **eqn.params)
                if outputs is not None:
                    self._note(use, f"by the rule given for {called!r}")
                    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
        seen = values
        if name in _USES:
            kind = _USES[name]
            seen = [v.seen_by(kind) if isinstance(v, Factored) else v for v in values]
        if any(a is not b for a, b in zip(seen, values, strict=True)):
            if not any(isinstance(value, Factored) and value.parts for value in seen):
                self._note(use, "W alone: the adapter is for other uses of it")
            return self._apply(site, dataclasses.replace(use, values=seen), steps)
        known = self.rules.get(name) or self.default
        if known is not None:
            outputs = self._apply_rule(known, use, steps)
            if outputs is not None and not _cuts_shifted(use, outputs):
                if name in _JOINS and sum(isinstance(v, Factored) for v in use.values) > 1:
                    self._note(use, "joined with another weight, unformed")
                elif name in _PRODUCTS and not any(isinstance(o, Factored) for o in outputs):
                    self._note(use, "xW + s·(xA)B")
                return outputs
        return use.bind([self.plain(value, use) for value in values])

    def _apply_rule(self, rule: Rule, use: Use, steps: EagerSteps | None) -> Outcome:
        """Returns the outputs of an equation by a rule, compiled where the call is eager."""
        eqn = use.eqn
        if steps is None or use.name in ("jit", "pjit"):  # compiled by itself
            with user_context(eqn):
                return rule(self, use)

        # A step outlives the call's arrays.
        bare = dataclasses.replace(use, values=[], inputs=FactorInputs())

        def call(values: list[Value]) -> Outcome:
            with user_context(eqn):
                return rule(self, dataclasses.replace(bare, values=values, inputs=FactorInputs()))

        how = (use.live, id(eqn) if use.name in _READ_AROUND else 0, self.examples, use.at)
        outputs: Outcome = steps.compiled(eqn, how, call)(use.values)
        return outputs

    def _examples_in(self, eqn: JaxprEqn, values: Sequence[Value]) -> ExampleLabel:
        """Returns the examples' axis in an equation's plain operand, if each has its adapter.

        Raises:
          ExamplesError: that is not known; see `lora_jax.adapt.per_example`.
        """
        known = {} if self.examples is None else self.examples.uses
        label = known.get(id(eqn))
        if id(eqn) not in known or isinstance(label, MixedExamples):
            _refuse_rows(eqn, values)
        return label

    def _unfolded(self, value: Value, primitive: str, where: JaxprEqn | SourceLine) -> Value:
        """Returns the value as an array, where it is a vector of weights laid end to end."""
        if not isinstance(value, FoldedVector):
            return value
        return value.formed(lambda weight: self.merged(weight, primitive, where))

    def _note(self, use: Use, why: str) -> None:
        if self.record is None:
            return
        place = str(place_of(use.eqn))
        for value in use.values:
            if isinstance(value, Factored):
                self.record(WeightUse(str(value.path), use.name, place, "factored", why))


def _refuse_rows(eqn: JaxprEqn, values: Sequence[Value]) -> None:
    """Raises ExamplesError if a weight has an adapter for each example."""
    for value in values:
        if isinstance(value, Factored) and value.rows is not None:
            raise ExamplesError(merging.example_error(value, eqn.primitive.name, place_of(eqn)))


def _cuts_shifted(use: Use, outputs: Sequence[Value]) -> bool:
    """Returns True if a bias on B would be added for a part of the in axes, and so more than once.

    That is so where a weight loses part of its in axes, or where a part of them is multiplied.
    """

    def shifted(values: Sequence[Value]) -> list[Factored]:
        return [v for v in values if isinstance(v, Factored) and v.shift is not None]

    def sizes(weights: Sequence[Factored]) -> set[int]:
        return {math.prod(weight.sizes("in")) for weight in weights}

    weights = shifted(use.values)
    if use.name in _SUMS and any(weight.split for weight in weights):
        return True
    return use.name != "all_gather" and not sizes(shifted(outputs)) <= sizes(weights)


# By primitive, how it uses a weight, which may be adapted for one kind of use only.
_USES = {"gather": "lookup"}
_USES |= dict.fromkeys(("dot_general", "conv_general_dilated", "ragged_dot_general"), "product")
# Primitives that multiply by a weight, or read rows of it.
_PRODUCTS = frozenset({*_USES, "slice", "dynamic_slice", "reduce_sum"})
_SUMS = _PRODUCTS - {"gather", "slice", "dynamic_slice"}  # over the in axes
# Primitives that make one weight of several.
_JOINS = frozenset({"add", "add_any", "sub", "concatenate", "stack", "select_n", "dot_general"})
# Primitives whose rule looks at the equations around theirs.
_READ_AROUND = ("select_n",)


def fold_dropout_key(value: Value, index: int | jax.Array) -> Value:
    """Returns the value with a dropout key of its own for one equation or one iteration."""
    if not isinstance(value, Factored) or value.key is None:
        return value
    fold = jax.random.fold_in
    for _ in range(value.key.ndim):
        fold = jax.vmap(fold, (0, None))
    return value.replace(key=fold(value.key, index))
