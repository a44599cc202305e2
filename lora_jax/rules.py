"""Rules select the leaves of a parameter tree that are adapted or trained in full."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Literal, Self

import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax import init as initialisers
from lora_jax.core.parts import AXES
from lora_jax.core.paths import most_similar
from lora_jax.core.weight import Part
from lora_jax.variants import VARIANTS, Variants
from lora_jax.variants.variant import Variant

Targets = str | Sequence[str]
_LAYERS = ("attention", "mlp", "experts")
ALL_LINEAR = "all-linear"
# The kinds of leaves (`lora_jax.models.kinds`) that a preset selects. No preset selects tables,
# heads and norms.
PRESETS: dict[str, frozenset[str]] = {kind: frozenset({kind}) for kind in _LAYERS}
PRESETS[ALL_LINEAR] = frozenset({*_LAYERS, "router", "pooler", "transform", "connector"})


def _repr_of_changed_fields(rule: "Rule") -> str:
    """Returns the repr of a rule with only the fields that differ from the defaults."""
    # Fields of variants have metadata, and come last.
    fields = sorted(dataclasses.fields(rule), key=lambda field: bool(field.metadata))
    values = {field.name: getattr(rule, field.name) for field in fields}
    arguments = [
        f"{field.name}={_source_text(values[field.name])}"
        for field in fields
        if values[field.name] != field.default
    ]
    return f"{type(rule).__name__}({', '.join(arguments)})"


def _source_text(value: object) -> str:
    """Returns a field's value as Python source."""
    if isinstance(value, tuple):
        return repr(list(value))
    return getattr(value, "__name__", None) or repr(value)


class AnyOf(tuple[str, ...]):
    """A list of names of which some may match nothing, as in PEFT's configurations."""


class _RuleFields:
    """Superclass of rules that explains unknown keywords in its error."""

    _peft_fields: dict[str, str]  # what to write for fields of PEFT's configurations

    def __new__(cls, *values: object, **keywords: object) -> Self:
        """Raises a TypeError for positional arguments and for unknown keywords."""
        if values:
            raise TypeError(
                f"{cls.__name__} takes keyword arguments only. Write "
                f"{cls.__name__}(targets={values[0]!r}, …)."
            )
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in keywords:
            if name not in names:
                # A field of PEFT's configurations, or a misspelled field.
                remedy = f"The most similar field is {most_similar(name, names)[0]}."
                if name in cls._peft_fields:
                    remedy = f"Write {cls._peft_fields[name]}."
                raise TypeError(f"{cls.__name__} has no field {name!r}. {remedy}")
        return super().__new__(cls)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LoraRule(_RuleFields, Variants):
    """Adapts each kernel that `targets` selects: W becomes W + s·AB, A and B trained.

    Args:
      targets: a list of names, each equal to a run of whole path segments (``["q_proj"]`` selects
        ``model/layers/q_proj/kernel``, and never a bias or a norm; to `lorafy`, a name that selects
        nothing is an error); or a string, which
        `re.fullmatch`\\ es the whole ``/``-joined path of the leaf; or a preset, alone or among the
        names: ``"all-linear"``, every kernel but embeddings and the output head (experts and their
        routers are kernels, too; `lorafy`'s `trace` finds kernels of any name); ``"attention"``,
        ``"mlp"`` or ``"experts"``, which need `lorafy`'s `kinds`.
      exclude: paths that are left alone, in either of the first two forms.
      layers: indices of the layers to adapt; the first batch axis of a stacked kernel, or the
        first numbered segment of the path. None: all.
      rank: r, the number of columns of A and rows of B.
      alpha: s = alpha / rank (or / √rank, see `scaling`). None: alpha = rank, so s = 1 (or √rank).
      scaling: "alpha/rank" (Hu et al., arXiv 2106.09685) or "alpha/sqrt(rank)" (rsLoRA,
        arXiv 2312.03732).
      dropout: probability of zeroing an element of A's input, in [0, 1).
      init: draws A and B; see `lora_jax.init`.
      dora, freeze_a, bias_on_b and other variants: see `lora_jax.variants.Variants`.
      extras: further parts of your own that train beside A and B; see `lora_jax.variants`.
      train_bias: train in full the bias that stands beside each selected kernel (PEFT's
        ``bias="lora_only"``).
      uses: for an embedding that is also the output head (tied): "lookup" or "product" adapts one
        of the two uses only, "each" gives each its own adapter of this rank, as PEFT does. Such a
        weight cannot be merged. "all": both uses see one adapter.
      share_a: give kernels that stand side by side (``…/experts/gate_proj/kernel`` and
        ``…/experts/up_proj/kernel``) one A, which trains once, as PEFT's experts have it.
      invocation: token ids from whose last occurrence in a row on the adapter acts (activated LoRA,
        arXiv 2504.12397; PEFT's ``alora_invocation_tokens``): the tokens before them see the base
        alone, and so do rows without them. Such an adapter cannot be merged, and is for weights
        that multiply activations [batch, seq, …]: no tables, heads and experts. See
        `lora_jax.activate`. None: all tokens.
      dtype: dtype of A and B. They are cast to the activation's dtype where they are used.
      in_axes, out_axes: the kernel's axis roles, where they are not Flax's (last axis out, the one
        before it in, the rest batch). Both or neither. A leaf named like a bias or a part of a norm
        (``b``, ``scale``, …) is left alone, unless a rule that names it gives them, or `lorafy`'s
        `trace` shows that it is a kernel.

    Raises:
      ValueError: on construction, where a field makes no sense.

    >>> rule = lj.LoraRule(targets=["q_proj", "v_proj"], rank=8, alpha=16)
    >>> rule.scale
    2.0
    """

    targets: Targets
    exclude: Targets = ()
    layers: Sequence[int] | None = None
    rank: int = 8
    alpha: float | None = None
    scaling: Literal["alpha/rank", "alpha/sqrt(rank)"] = "alpha/rank"
    dropout: float = 0.0
    init: initialisers.Initialiser = initialisers.kaiming
    extras: Sequence[Part] = ()
    train_bias: bool = False
    uses: Literal["all", "lookup", "product", "each"] = "all"
    share_a: bool = False
    invocation: Sequence[int] | None = None
    dtype: DTypeLike = jnp.float32
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None

    __repr__ = _repr_of_changed_fields
    _peft_fields = {
        "r": "rank=…",
        "lora_alpha": "alpha=…",
        "lora_dropout": "dropout=…",
        "target_modules": "targets=[…]",
        "target_parameters": "targets=[…]",
        "exclude_modules": "exclude=[…]",
        "layers_to_transform": "layers=[…]",
        "use_rslora": "scaling='alpha/sqrt(rank)'",
        "use_dora": "dora=True",
        "lora_bias": "bias_on_b=True",
        "init_lora_weights": "init=lora_jax.init.kaiming, or another function there",
        "alora_invocation_tokens": "invocation=[…]",
        "bias": "train_bias=True for the adapted kernels' own, or TrainRule(targets=['bias'])",
        "modules_to_save": "a rule beside it, TrainRule(targets=[…])",
        "trainable_token_indices": "a rule beside it, TrainRule(targets=[…], rows=[…])",
        "rank_pattern": "a rule for each rank, the first that selects a kernel wins",
        "alpha_pattern": "a rule for each alpha, the first that selects a kernel wins",
    }

    def __post_init__(self) -> None:
        _freeze_sequences(self, "targets", "exclude", "layers", "in_axes", "out_axes", "extras")
        _freeze_sequences(self, "invocation")
        _check_targets(self.targets)
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r} must be an integer of at least 1.")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha={self.alpha!r} must be a positive number.")
        if self.scaling not in ("alpha/rank", "alpha/sqrt(rank)"):
            raise ValueError(
                f"scaling={self.scaling!r} is unknown. Choose 'alpha/rank' or 'alpha/sqrt(rank)'."
            )
        if self.uses not in ("all", "lookup", "product", "each"):
            raise ValueError(
                f"uses={self.uses!r} is unknown. Choose 'all', 'lookup', 'product' or 'each'."
            )
        is_plain = not (self.variants or self.extras or initialisers.takes_from_base(self.init))
        if self.uses == "each" and not is_plain:
            options = ", ".join(variant.option for variant in VARIANTS)
            raise ValueError(
                "uses='each' gives a table one plain LoRA for look-ups and one for products. It "
                f"does not support {options}, extras=, or an init that computes A and B from the "
                "base. Remove these, or adapt one use only: uses='lookup' or uses='product'."
            )
        if self.share_a and (self.frozen or initialisers.takes_from_base(self.init)):
            raise ValueError(
                "share_a=True cannot share an A that is frozen or computed from the base. Remove "
                "share_a, or remove the variant or the init that does this."
            )
        self._check_variants()
        self._check_invocation()
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout={self.dropout!r} must be a probability in [0, 1). Pass a value such as "
                "0.05."
            )
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(
                f"dtype={self.dtype!r} must be a floating-point dtype, because it is the dtype of "
                "A and B. Pass jnp.float32 or jnp.bfloat16."
            )
        if (self.in_axes is None) != (self.out_axes is None):
            raise ValueError("Give both in_axes and out_axes, or neither.")
        self._check_part_names()

    def _check_part_names(self) -> None:
        """Raises a ValueError if a part of `extras` has the name of another array."""
        names = [part.name for part in self.parts]
        extra_names = {part.name for part in self.extras}
        reserved_names = extra_names & {*AXES, "value"}
        for name in names:
            if name in reserved_names or names.count(name) > 1:
                raise ValueError(
                    f"extras: a weight already has an array with the name {name!r}. Choose another "
                    "name for the part."
                )

    def _check_variants(self) -> None:
        """Raises a ValueError for variants that exclude each other or other fields."""
        for variant in VARIANTS:
            self._check_settings(variant)
        for variant in self.variants:
            options = [other.option for other in self.variants if other is not variant]
            for option in options:
                if option in variant.not_with:
                    reason = variant.not_with[option]
                    raise ValueError(
                        f"{variant.option} cannot be combined with {option}. {reason} Remove one "
                        "of the two."
                    )
            if self.extras:
                options.append("extras")
            if self.init is not initialisers.kaiming:
                options.append("init")
            if variant.alone and options:
                raise ValueError(
                    f"{variant.option} cannot be combined with {options[0]}, because "
                    f"{variant.option} {variant.alone}, freezes both and trains what is "
                    f"between them. Remove {' and '.join(options)}."
                )

    def _check_settings(self, variant: Variant) -> None:
        """Raises a ValueError for a setting without its variant, or an invalid one."""
        for setting in variant.settings:
            value = getattr(self, setting.name)
            if value != setting.default and variant not in self.variants:
                raise ValueError(
                    f"{setting.name}={value!r} has no effect without {variant.option}=True. Remove "
                    f"{setting.name}, or set {variant.option}=True."
                )
            if not setting.fits(value):
                raise ValueError(f"{setting.name}={value!r} must be {setting.needed}.")

    def _check_invocation(self) -> None:
        """Raises a ValueError for an invalid invocation, or a field that excludes it."""
        tokens = self.invocation
        if tokens is None:
            return
        if not tokens or not all(type(token) is int and token >= 0 for token in tokens):
            raise ValueError(
                f"invocation={list(tokens)} must be at least one token id, none negative. Pass the "
                "ids of the tokens that invoke the adapter."
            )
        fields = [variant.option for variant in self.variants if variant.option != "freeze_a"]
        fields += [part.name for part in self.extras]
        if self.train_bias:
            fields.append("train_bias")
        if self.uses != "all":
            fields.append("uses")
        if fields:
            raise ValueError(f"invocation= supports only plain A and B. Remove {fields[0]}.")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The trained parts other than A and B."""
        return (*(part for variant in self.variants for part in variant.parts), *self.extras)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The names of the factors that do not train."""
        return tuple(name for variant in self.variants for name in variant.frozen)

    @property
    def stored_rank(self) -> int:
        """The rank that A and B are stored with; with uses="each", the sum for both uses."""
        return 2 * self.rank if self.uses == "each" else self.rank

    @property
    def scale(self) -> float:
        """s, the factor that multiplies AB."""
        alpha = self.rank if self.alpha is None else self.alpha
        divisor = math.sqrt(self.rank) if self.scaling == "alpha/sqrt(rank)" else self.rank
        return alpha / divisor


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class TrainRule(_RuleFields):
    """Trains the selected leaves in full: a head, norms, biases; targets ``".*"`` selects all.

    Args:
      targets: a string, `re.fullmatch`\\ ed on the whole path of the leaf, or a list of names,
        each a run of whole path segments (``["lm_head"]``, ``["bias"]``).
      exclude: paths that are left alone.
      rows: train these rows only, of tables such as an embedding: the tokens' indices along the
        first axis. Look-ups and a tied head both use them; the table is neither copied nor
        differentiated (PEFT's ``trainable_token_indices``).
      layers: train these layers only: indices along the first axis of a stacked leaf, or the first
        numbered segment of the path.

    Raises:
      ValueError: on construction, where a field makes no sense.

    >>> lj.TrainRule(targets=["bias"])
    TrainRule(targets=['bias'])
    """

    targets: Targets
    exclude: Targets = ()
    rows: Sequence[int] | None = None
    layers: Sequence[int] | None = None

    __repr__ = _repr_of_changed_fields
    _peft_fields = {
        "target_modules": "targets=[…]",
        "modules_to_save": "targets=[…]",
        "exclude_modules": "exclude=[…]",
        "trainable_token_indices": "rows=[…]",
        "layers_to_transform": "layers=[…]",
    }

    def __post_init__(self) -> None:
        _freeze_sequences(self, "targets", "exclude", "rows", "layers")
        _check_targets(self.targets)
        if self.rows is not None and self.layers is not None:
            raise ValueError("rows= is for tables and layers= is for stacks. Give one of them.")
        for name in ("rows", "layers"):
            indices = getattr(self, name)
            if indices is None:
                continue
            if not indices or len(set(indices)) < len(indices) or min(indices) < 0:
                raise ValueError(
                    f"{name}={list(indices)} must be different indices, counted from 0. Pass each "
                    "index once, none negative."
                )


Rule = LoraRule | TrainRule


def _freeze_sequences(rule: Rule, *names: str) -> None:
    """Replaces lists in a rule's fields by tuples, so that the rule is hashable."""
    for name in names:
        value = getattr(rule, name)
        if value is not None and not isinstance(value, (str, tuple)):
            object.__setattr__(rule, name, tuple(value))


def _check_targets(targets: Targets) -> None:
    """Raises a ValueError unless targets are a regular expression or a list of names."""
    if not targets:
        raise ValueError("targets is empty. Name at least one module, or 'all-linear'.")
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"targets={targets!r} is not a regular expression ({error}). Pass a valid pattern, "
                "or a list of names."
            ) from None
        return
    for name in targets:
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"targets contains {name!r}, but each target must be a non-empty string. Remove it."
            )
