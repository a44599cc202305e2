"""Evaluates a jaxpr in which some values are weights with factors (`Factored`).

An equation that touches none of them is applied as it stands. One that does follows the rule for
its primitive; where there is none, or the rule declines, the weight is merged at that one place.

A **use** is an equation that has a weight among its operands.
"""

import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence

import jax
import jax.numpy as jnp

from lora_jax.adapt import eqns, merging
from lora_jax.adapt.eqns import EagerSteps
from lora_jax.adapt.needed import FactorInputs, UsedOutputs, needed_equations
from lora_jax.adapt.per_example.labels import ExampleLabel, ExampleLabels, MixedExamples
from lora_jax.adapt.reports import WeightUse, watch
from lora_jax.adapt.user_code import SourceLine, UserContext, user_line_of, user_line_of_call
from lora_jax.core.base import as_array, rearranged
from lora_jax.core.extend import Jaxpr, JaxprEqn
from lora_jax.core.factored import ExamplesError, Factored
from lora_jax.core.types import EqnParams, Forward, Outcome, Value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FoldedVector:
    """Weights that are flattened and concatenated to one vector, but keep their factors.

    `jax.flatten_util.ravel_pytree` lays them so.
    A vector has no in and out axes, so it has no factors. But a function that lays a tree out as a
    vector mostly takes it apart again: it then gets back the weights that went in. The vector lives
    within one jaxpr, and is formed where it leaves it.

    Attributes:
      pieces: weights, each in the shape that it had, and vectors.
    """

    pieces: tuple[Value, ...]

    def formed(self, merge: Callable[[Factored], jax.Array]) -> jax.Array:
        """Returns the vector as an array, with each weight merged by `merge`."""
        vectors = []
        for piece in self.pieces:
            vectors.append(merge(piece).reshape(-1) if isinstance(piece, Factored) else piece)
        return jnp.concatenate(vectors) if len(vectors) > 1 else vectors[0]

    def cut(self, start: int, stop: int) -> Value:
        """Returns a slice of the vector, or None if it would cut through a piece."""
        ends = [0, *itertools.accumulate(map(_n_elements, self.pieces))]
        if start not in ends or stop not in ends:
            return None
        pieces = self.pieces[ends.index(start) : ends.index(stop)]
        is_plain_vector = len(pieces) == 1 and not isinstance(pieces[0], Factored)
        return pieces[0] if is_plain_vector else FoldedVector(pieces)


def _n_elements(piece: Value) -> int:
    return math.prod(piece.base.shape if isinstance(piece, Factored) else piece.shape)


def move_folded_vectors(primitive: str, params: EqnParams, values: Sequence[Value]) -> Outcome:
    """Returns the outputs of an equation that concatenates or slices folded vectors.

    Args:
      primitive: name of its primitive.
      params: the equation's.
      values: its operands, one `FoldedVector` or more among them.

    Returns:
      The outputs; None for any other equation, or where a weight is cut into.
    """
    if primitive == "concatenate":
        pieces: list[Value] = []
        for value in values:
            pieces += value.pieces if isinstance(value, FoldedVector) else (value,)
        return [FoldedVector(tuple(pieces))]
    vector = values[0]
    stretches: list[tuple[int, int]] = []
    if primitive == "split":
        ends = [0, *itertools.accumulate(params["sizes"])]
        stretches = list(itertools.pairwise(ends))
    elif primitive == "slice" and params["strides"] in (None, (1,)):
        (start,) = params["start_indices"]
        (stop,) = params["limit_indices"]
        stretches = [(start, stop)]
    elif primitive == "reshape" and len(vector.pieces) == 1:
        (weight,) = vector.pieces
        is_shape_of_weight = tuple(params["new_sizes"]) == tuple(weight.base.shape)
        return [weight] if is_shape_of_weight else None
    outputs = [vector.cut(start, stop) for start, stop in stretches]
    cuts_piece = any(output is None for output in outputs)
    return None if cuts_piece or not outputs else outputs


@dataclasses.dataclass(frozen=True)
class Use:
    """An equation with an adapted weight among its operands, and the outputs that are used.

    Attributes:
      eqn: the equation.
      values: its operands: arrays, at least one `Factored` or `FoldedVector` among them.
      used_outputs: which of its outputs something reads.
      inputs: what factors read in this jaxpr.
      jaxpr: the jaxpr that the equation is part of.
      activation_label: where the examples with adapters of their own, or the tokens of a mask, lie
        in the other operand.
    """

    eqn: JaxprEqn
    values: list[Value]
    used_outputs: UsedOutputs
    inputs: FactorInputs
    jaxpr: Jaxpr
    activation_label: ExampleLabel = None

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
        """The operands, with each weight replaced by W."""
        return [
            as_array(value.base) if isinstance(value, Factored) else value for value in self.values
        ]

    def bind(self, values: Sequence[Value]) -> list[Value]:
        """Applies the equation to plain arrays."""
        return eqns.apply_equation(self.eqn, values)

    def rearranged(self, weight: Factored) -> Value:
        """Returns W after the equation, whose only operand is the weight."""
        result_type = self.eqn.outvars[0].aval
        return rearranged(weight.base, self.eqn.primitive, self.params, result_type)

    def varying_axes(self, operand_index: int) -> list[int]:
        """Returns the axes along which an operand may vary, without its broadcast axes.

        Args:
          operand_index: index of the operand.
        """
        operand = self.eqn.invars[operand_index]
        broadcast = self._broadcast_of(operand)
        if broadcast is None:
            shape = eqns.type_of(operand).shape
            return [axis for axis, size in enumerate(shape) if size != 1]
        source_shape = eqns.type_of(broadcast.invars[0]).shape
        axis_of_source = broadcast.params["broadcast_dimensions"]
        return [axis for axis, size in zip(axis_of_source, source_shape, strict=True) if size != 1]

    def _broadcast_of(self, operand: eqns.Atom) -> JaxprEqn | None:
        """Returns the `broadcast_in_dim` that computed an operand, or None."""
        if eqns.is_literal(operand):
            return None
        for eqn in self.jaxpr.eqns:
            if operand in eqn.outvars:
                return eqn if eqn.primitive.name == "broadcast_in_dim" else None
        return None


# A rule returns the equation's outputs, or None to have its operands merged.
Rule = Callable[["Interpreter", Use], Outcome]


class RoleError(ValueError):
    """Raised if a function uses a weight against its recorded axis roles."""


# Functions made of inner jaxprs, so that one that is called forty times, or in call after call,
# is traced and compiled once. An entry goes with the jaxpr that it is made of.
_FUNCTIONS: weakref.WeakKeyDictionary[eqns.AnyJaxpr, dict[Hashable, Forward]] = (
    weakref.WeakKeyDictionary()
)


@dataclasses.dataclass
class _Variables:
    """The values of a jaxpr's variables while it is evaluated.

    Attributes:
      values: the value of each variable. A value that nothing reads any more is removed.
      early_equations: identities of the equations that were evaluated before their turn.
    """

    values: dict[eqns.Atom, Value]
    early_equations: set[int] = dataclasses.field(default_factory=set)

    def value_of(self, atom: eqns.Atom) -> Value:
        return atom.val if eqns.is_literal(atom) else self.values[atom]


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """Evaluates jaxprs whose values may be `Factored` weights.

    Attributes:
      rules: the rule for each primitive.
      strict: raise where a weight would be merged.
      own_rules: pairs of a name and a rule of the caller. The name is that of a primitive or of a
        function (`adapt`).
      record: called with each use of a weight. Inner functions are then evaluated in each call, not
        cached.
      warns: warn of merges although uses are recorded, so that no cache hides a warning.
      default: the rule for primitives without a rule of their own. None: weights are merged there.
      examples: the axes of the examples in the jaxpr, if each example has its adapter. The axes of
        the tokens, if only some tokens see an adapter. Else None.
      apply_equation: applies an equation to plain arrays.
    """

    rules: Mapping[str, Rule] = dataclasses.field(hash=False, compare=False)
    strict: bool = False
    own_rules: tuple[tuple[str, Forward], ...] = ()
    record: Callable[[WeightUse], None] | None = None
    warns: bool = False
    default: Rule | None = dataclasses.field(default=None, hash=False, compare=False)
    examples: ExampleLabels | None = None
    apply_equation: Callable[[JaxprEqn, Sequence[Value]], list[Value]] = eqns.apply_equation

    def evaluate(
        self,
        jaxpr: eqns.AnyJaxpr,
        args: Sequence[Value],
        used_outputs: UsedOutputs | None = None,
        eager_steps: EagerSteps | None = None,
    ) -> list[Value]:
        """Returns the outputs of `jaxpr`; a weight that is only moved stays `Factored`.

        Args:
          jaxpr: the jaxpr to evaluate.
          args: its inputs.
          used_outputs: True for each output that is used. The others are None, and equations that
            only they need do not run.
          eager_steps: compiled rules of this jaxpr's equations, for an eager call. The call adds
            rules that are missing. None: a compiled function around this one traces the rules.
        """
        inner, consts = eqns.jaxpr_and_consts(jaxpr)
        if used_outputs is None:
            used_outputs = (True,) * len(inner.outvars)
        variables = _Variables(dict(zip(inner.constvars, consts, strict=True)))
        variables.values |= zip(inner.invars, args, strict=True)
        needed = needed_equations(inner, used_outputs)
        inputs = FactorInputs()
        if eager_steps is None and self.record is None:
            value_ahead = functools.partial(
                self._weight_before_its_equation, needed.moves, inner, variables
            )
            inputs = FactorInputs(needed.products_of_operand, value_ahead)
        use_index = 0  # counts uses alone, so that other equations change no dropout
        for eqn, used_outputs_of_eqn, unread_variables in needed.equations:
            values = [variables.value_of(atom) for atom in eqn.invars]
            is_use = any(isinstance(value, (Factored, FoldedVector)) for value in values)
            if id(eqn) in variables.early_equations:
                outputs = [variables.value_of(atom) for atom in eqn.outvars]
            elif is_use:
                use = Use(
                    eqn=eqn,
                    values=values,
                    used_outputs=used_outputs_of_eqn,
                    inputs=inputs,
                    jaxpr=inner,
                )
                outputs = self._apply(use, use_index, eager_steps)
            elif eager_steps is None:
                outputs = self.apply_equation(eqn, values)
            else:
                outputs = eager_steps.apply_equation(eqn, values)
            if is_use and any(isinstance(value, Factored) for value in values):
                use_index += 1
            variables.values |= zip(eqn.outvars, outputs, strict=True)
            for atom in unread_variables:
                del variables.values[atom]
        results: list[Value] = []
        for atom, is_used in zip(inner.outvars, used_outputs, strict=True):
            result = variables.value_of(atom) if is_used else None
            if isinstance(result, FoldedVector):
                result = self._form_folded_vector(result, "output", user_line_of_call())
            results.append(result)
        return results

    def _weight_before_its_equation(
        self,
        moves: Mapping[eqns.Atom, JaxprEqn],
        jaxpr: Jaxpr,
        variables: _Variables,
        atom: eqns.Atom,
    ) -> Value:
        """Returns a moved or cast weight before its equation runs, or None.

        Args:
          moves: equations of the jaxpr that move or cast, by their results.
          jaxpr: the jaxpr that is evaluated.
          variables: the values so far; added to.
          atom: the operand.
        """
        chain: list[JaxprEqn] = []  # of moves, from the last to the first
        while not eqns.is_literal(atom) and atom not in variables.values and atom in moves:
            chain.append(moves[atom])
            atom = chain[-1].invars[0]
        if eqns.is_literal(atom):
            return None
        value = variables.values.get(atom)
        for eqn in reversed(chain):
            if not isinstance(value, Factored) or value.key is not None:
                return None
            use = Use(
                eqn=eqn, values=[value], used_outputs=(True,), inputs=FactorInputs(), jaxpr=jaxpr
            )
            # The index of the use is for dropout, which a weight without a key has not.
            (value,) = self._apply(use, 0, None)
            variables.values[eqn.outvars[0]] = value
            variables.early_equations.add(id(eqn))
        return value

    def function_of_jaxpr(
        self, jaxpr: eqns.AnyJaxpr, used_outputs: UsedOutputs | None = None
    ) -> Callable[..., list[Value]]:
        """Returns `evaluate` of an inner jaxpr as a function, cached by jaxpr."""
        jaxpr_reference = weakref.ref(jaxpr)  # the cache must not keep its own key alive
        interpreter = self
        if self.examples is not None:
            inner_examples = self.examples.inner_labels.get(id(jaxpr))
            interpreter = dataclasses.replace(self, examples=inner_examples)

        def make() -> Callable[..., list[Value]]:
            """Makes the function, which does not keep its jaxpr alive."""

            def call(*args: Value) -> list[Value]:
                live_jaxpr = jaxpr_reference()
                assert live_jaxpr is not None, "an equation holds its jaxpr while it is evaluated"
                return interpreter.evaluate(live_jaxpr, args, used_outputs)

            return call

        return interpreter.cached_function(jaxpr, ("function", used_outputs), make)

    def cached_function(
        self, jaxpr: eqns.AnyJaxpr, key: Hashable, make: Callable[[], Forward]
    ) -> Forward:
        """Returns the function that `make` returned first for this jaxpr and key."""
        functions = _FUNCTIONS.setdefault(jaxpr, {})
        function = functions.get((self, key))
        if function is None:
            function = functions.setdefault((self, key), make())  # one, whichever thread made it
        return function

    def merge_weight(
        self, weight: Factored, primitive: str, source: JaxprEqn | SourceLine
    ) -> jax.Array:
        """Returns W + s·AB, and reports the merge; see `report_merge`."""
        self.report_merge(weight, primitive, source)
        return weight.merged()

    def as_plain_array(self, value: Value, use: Use, position: str = "") -> Value:
        """Returns a value as an array; merges it if it is a weight.

        Args:
          value: a weight or an array.
          use: the equation that the message names.
          position: the weight's position in this equation, such as "as a carry".
        """
        if not isinstance(value, Factored):
            return value
        primitive = f"{use.name} ({position})" if position else use.name
        return self.merge_weight(value, primitive, use.eqn)

    def report_merge(self, weight: Factored, primitive: str, source: JaxprEqn | SourceLine) -> None:
        """Warns that a weight is merged at an equation or a line of code, or raises MergeError."""
        if isinstance(source, SourceLine):
            line = source
            function = None
        else:
            line = user_line_of(source)
            function = eqns.function_name(source)
        if weight.rows is not None:
            raise ExamplesError(merging.unknown_examples_message(weight, primitive, line))
        if self.record is None or self.warns:
            merging.warn_of_merge(weight, primitive, function, line, strict=self.strict)
            return
        record = WeightUse(
            path=str(weight.path),
            primitive=primitive,
            place=str(line),
            how="merged",
            why=merging.merge_reason(primitive),
        )
        self.record(record)

    def _apply(self, use: Use, use_index: int, eager_steps: EagerSteps | None) -> list[Value]:
        """Returns the outputs of an equation with weights or folded vectors as operands.

        Args:
          use: the equation.
          use_index: index of the use in its jaxpr, for dropout.
          eager_steps: see `evaluate`.
        """
        if any(isinstance(value, FoldedVector) for value in use.values):
            outputs = move_folded_vectors(use.name, use.params, use.values)
            if outputs is not None:
                return outputs
            values = [self._form_folded_vector(value, use.name, use.eqn) for value in use.values]
            use = dataclasses.replace(use, values=values)
        if not any(isinstance(value, Factored) for value in use.values):
            return self.apply_equation(use.eqn, use.values)
        return self._apply_to_weights(use, use_index, eager_steps)

    def _apply_to_weights(
        self, use: Use, use_index: int, eager_steps: EagerSteps | None
    ) -> list[Value]:
        """Returns the outputs by the first rule that applies, or by merging weights."""
        merging.check_tokens(use.name, use.values, use.eqn)
        activation_label = self._activation_label(use)
        use_without_keys = use
        values = [fold_dropout_key(value, use_index) for value in use.values]
        use = dataclasses.replace(use, values=values, activation_label=activation_label)
        outputs = self._apply_own_rule(use)
        if outputs is not None:
            return outputs
        seen_values = _operands_seen_by_use(use_without_keys)
        if seen_values is not None:
            if not any(isinstance(value, Factored) and value.parts for value in seen_values):
                self._record_use(use, "W alone: the adapter is for other uses of it")
            return self._apply(dataclasses.replace(use, values=seen_values), use_index, eager_steps)
        rule = self.rules.get(use.name) or self.default
        outputs = None if rule is None else self._apply_rule(rule, use, eager_steps)
        if outputs is not None and not _repeats_shift(use, outputs):
            self._record_factored_use(use, outputs)
            return outputs
        return self.apply_equation(
            use.eqn, [self.as_plain_array(value, use) for value in use.values]
        )

    def _apply_own_rule(self, use: Use) -> Outcome:
        """Returns the outputs by the caller's own rule, or None if none applies."""
        for name, rule in self.own_rules:
            if name not in (use.name, eqns.function_name(use.eqn)):
                continue
            _raise_if_per_example(use)
            with UserContext(use.eqn):
                outputs = rule(*use.values, **use.params)
            if outputs is not None:
                self._record_use(use, f"by the rule given for {name!r}")
                return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
        return None

    def _apply_rule(self, rule: Rule, use: Use, eager_steps: EagerSteps | None) -> Outcome:
        """Returns the outputs of an equation by a rule, which eager calls compile."""
        eqn = use.eqn
        is_compiled_by_jit = use.name in ("jit", "pjit")
        if eager_steps is None or is_compiled_by_jit:
            with UserContext(eqn):
                return rule(self, use)

        # A compiled step outlives the call's arrays.
        use_without_arrays = dataclasses.replace(use, values=[], inputs=FactorInputs())

        def call(values: list[Value]) -> Outcome:
            """Applies the rule to operands, with the equation's names and line."""
            with UserContext(eqn):
                traced_use = dataclasses.replace(
                    use_without_arrays, values=values, inputs=FactorInputs()
                )
                return rule(self, traced_use)

        eqn_identity = id(eqn) if use.name in _RULES_THAT_READ_THE_JAXPR else 0
        key = (use.used_outputs, eqn_identity, self.examples, use.activation_label)
        program = eager_steps.compiled_program(eqn, key, call)
        with watch(program):
            outputs: Outcome = program(use.values)
        return outputs

    def _activation_label(self, use: Use) -> ExampleLabel:
        """Returns the axis of the examples in an equation's plain operand.

        Raises:
          ExamplesError: that is not known; see `lora_jax.adapt.per_example`.
        """
        label_of_use = {} if self.examples is None else self.examples.uses
        label = label_of_use.get(id(use.eqn))
        if id(use.eqn) not in label_of_use or isinstance(label, MixedExamples):
            _raise_if_per_example(use)
        return label

    def _form_folded_vector(
        self, value: Value, primitive: str, source: JaxprEqn | SourceLine
    ) -> Value:
        """Returns a folded vector as an array, and any other value unchanged."""
        if not isinstance(value, FoldedVector):
            return value
        return value.formed(lambda weight: self.merge_weight(weight, primitive, source))

    def _record_factored_use(self, use: Use, outputs: Sequence[Value]) -> None:
        """Records a product or a concatenation that merges none of its weights."""
        n_weights = sum(isinstance(value, Factored) for value in use.values)
        if use.name in _JOINS and n_weights > 1:
            self._record_use(use, "joined with another weight, unformed")
        elif use.name in _PRODUCTS and not any(isinstance(value, Factored) for value in outputs):
            self._record_use(use, "xW + s·(xA)B")

    def _record_use(self, use: Use, why: str) -> None:
        """Records a use of each weight among the operands as factored."""
        if self.record is None:
            return
        line = str(user_line_of(use.eqn))
        for value in use.values:
            if isinstance(value, Factored):
                record = WeightUse(
                    path=str(value.path), primitive=use.name, place=line, how="factored", why=why
                )
                self.record(record)


def _raise_if_per_example(use: Use) -> None:
    """Raises ExamplesError if a weight has an adapter for each example."""
    for value in use.values:
        if isinstance(value, Factored) and value.rows is not None:
            line = user_line_of(use.eqn)
            raise ExamplesError(merging.unknown_examples_message(value, use.name, line))


def _operands_seen_by_use(use: Use) -> list[Value] | None:
    """Returns the operands with the weights adapted for this kind of use, or None.

    A weight may be adapted for one kind of use only.
    """
    if use.name not in _KIND_OF_USE:
        return None
    kind = _KIND_OF_USE[use.name]
    seen_values = [
        value.seen_by_use(kind) if isinstance(value, Factored) else value for value in use.values
    ]
    is_same = all(seen is value for seen, value in zip(seen_values, use.values, strict=True))
    return None if is_same else seen_values


def _repeats_shift(use: Use, outputs: Sequence[Value]) -> bool:
    """Returns True if each part of the in axes would add the bias on B again.

    That is so where a weight loses part of its in axes, or where a part of them is multiplied.
    """
    operands_with_shift = _weights_with_shift(use.values)
    if use.name in _SUMS and any(weight.split for weight in operands_with_shift):
        return True
    if use.name == "all_gather":
        return False
    return not _fan_ins(_weights_with_shift(outputs)) <= _fan_ins(operands_with_shift)


def _weights_with_shift(values: Sequence[Value]) -> list[Factored]:
    return [value for value in values if isinstance(value, Factored) and value.shift is not None]


def _fan_ins(weights: Sequence[Factored]) -> set[int]:
    return {math.prod(weight.sizes("in")) for weight in weights}


# By primitive, the kind of use that it makes of a weight.
_KIND_OF_USE = {"gather": "lookup"}
_KIND_OF_USE |= dict.fromkeys(
    ("dot_general", "conv_general_dilated", "ragged_dot_general"), "product"
)
# Primitives that multiply by a weight, or read rows of it.
_PRODUCTS = frozenset({*_KIND_OF_USE, "slice", "dynamic_slice", "reduce_sum"})
_SUMS = _PRODUCTS - {"gather", "slice", "dynamic_slice"}  # over the in axes
# Primitives that make one weight of several.
_JOINS = frozenset({"add", "add_any", "sub", "concatenate", "stack", "select_n", "dot_general"})
# Primitives whose rule looks at the equations around theirs.
_RULES_THAT_READ_THE_JAXPR = ("select_n",)


def fold_dropout_key(value: Value, index: int | jax.Array) -> Value:
    """Returns the value with a separate dropout key for one equation or iteration."""
    if not isinstance(value, Factored) or value.key is None:
        return value
    fold = jax.random.fold_in
    for _ in range(value.key.ndim):
        fold = jax.vmap(fold, (0, None))
    return value.replace(key=fold(value.key, index))
