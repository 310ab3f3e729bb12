"""The contract of a parametrisation: rules by which initial values and optimiser settings follow width and depth.

A rule is a power of two ratios to a base model, on which the settings are tuned: of the parameter's fan-in (the width
for parameters without one and for convolutions), written s, and of the depth, written m. At the base every factor is 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

from pydantic import BeforeValidator, SerializeAsAny

from workbench.config import Config, require
from workbench.contract import Role
from workbench.registry import Registry

UpdateFamily: TypeAlias = Literal["sign", "orthogonal", "spectral", "rms", "gradient"]
"""How large an optimiser's update is, before the learning rate:

- ``sign``: every number has a size of about 1 (Adam, Lion);
- ``orthogonal``: a semi-orthogonal matrix times sqrt(max(1, out / in)) (Muon);
- ``spectral``: a semi-orthogonal matrix times sqrt(out / in) (the spectral condition);
- ``rms``: a semi-orthogonal matrix times a constant · sqrt(max(out, in)) (Muon with the root mean square of AdamW);
- ``gradient``: the gradient, or a running sum of it (SGD).
"""

MATRICES = frozenset({Role.HIDDEN, Role.LATENT_DOWN, Role.LATENT_UP, Role.EXPERT, Role.ROUTER, Role.HEAD})
"""Roles whose product sums over a fan-in that may grow with the width. Taps of a convolution sum over a constant."""


class Power(NamedTuple):
    """s^width · m^depth."""

    width: float = 0.0
    depth: float = 0.0

    def at(self, ratio: float, depth_ratio: float = 1.0) -> float:
        return ratio**self.width * depth_ratio**self.depth

    def __str__(self) -> str:
        factors = [
            symbol if exponent == 1 else f"{symbol}^{exponent:g}"
            for symbol, exponent in (("s", self.width), ("m", self.depth))
            if exponent
        ]
        return " · ".join(factors) or "1"


class Rule(NamedTuple):
    """How the settings of parameters of one role follow s and m. m acts on the parameters of residual branches only."""

    variance: Power = Power()
    """Of initial values."""
    learning_rate: Power = Power()
    """Of the update family ``sign``; :func:`learning_rate_factor` has the others."""
    epsilon: Power = Power()
    """Of the constant in the denominator of an update. s is the ratio of the model's widths for every parameter, as the
    gradients of all of them shrink with it."""


BY_FAN_IN = Rule(variance=Power(-1), learning_rate=Power(-1))
"""Variance and learning rate of a matrix whose inputs keep their size."""


def rules(default: Rule, matrices: Rule | None = None, **by_role: Rule) -> dict[Role, Rule]:
    """A rule for every role.

    Args:
        default: of vectors, embeddings and the head.
        matrices: of the other :data:`MATRICES`; default: ``default``.
        by_role: of single roles, by their names.
    """
    of_matrices = {} if matrices is None else dict.fromkeys(MATRICES - {Role.HEAD}, matrices)
    return dict.fromkeys(Role, default) | of_matrices | {Role(name): rule for name, rule in by_role.items()}


class ParametrisationConfig(Config):
    """Base of a parametrisation's configuration. ``kind`` is the registered name."""

    kind: str
    base: dict[str, Any] = {}
    """The base model, on which settings are tuned: fields of the model that differ in it, such as {width: 256} or
    {width: 256, depth: 6}. Fields that are left out are those of the model; a size that is set there and follows the
    width, such as an explicit hidden width, must be given for the base too."""

    def model_post_init(self, _context: Any) -> None:
        require(
            self.kind == "standard" or "width" in self.base or "depth" in self.base,
            "base",
            got=self.base,
            expected="the width, or the depth, of the model on which settings are tuned",
            do="For example base: {width: 256}.",
        )
        require(
            "parametrisation" not in self.base,
            "base.parametrisation",
            got=self.base.get("parametrisation"),
            expected="no parametrisation: at the base all of them are equal",
        )


class Parametrisation:
    """Rules for the roles of parameters, and multipliers of the function. Built as ``cls(config)``.

    A parametrisation is one file with one decorated class; nothing else lists its name.
    """

    Config: ClassVar[type[ParametrisationConfig]]
    rules: Mapping[Role, Rule]
    """One for every role."""
    branches: Power = Power()
    """Multiplier of what a mixer, feed-forward or shortcut adds to the residual stream."""
    logits: Power = Power()
    """Multiplier of the scores before softmax; s is the ratio of widths."""
    scores: Power = Power()
    """Multiplier of attention scores, which are divided by sqrt(channels of a head); s is the ratio of channels."""
    residual_variance: float = -1.0
    """Power of m in the initial variance of matrices that write the residual stream."""
    keeps_decay: bool = False
    """Whether weight decay grows as the learning rate falls with the width, so that their product is constant."""
    gradient: Power | None = None
    """Learning rate, for updates of the family ``gradient``, of embeddings, head and vectors; matrices get the depth's
    part and in / out. None: no rule is known."""
    tied_head: bool = True
    """Whether there is a rule for a matrix that is embedding and head."""
    input_multiplier: float = 1.0
    """Multiplier of the embedding's output, at every width."""
    output_multiplier: float = 1.0
    """Multiplier of the logits, beside their power."""

    def __init__(self, config: Any):
        self.config = config


parametrisations: Registry[type[Parametrisation]] = Registry("parametrisation", "workbench.parametrisations")

ParametrisationSetting: TypeAlias = Annotated[
    SerializeAsAny[ParametrisationConfig], BeforeValidator(partial(parametrisations.parse, default_kind="standard"))
]
"""A field of a configuration that holds any registered parametrisation's Config."""


class Shape(NamedTuple):
    """Fan-in and fan-out of a parameter."""

    fan_in: int
    fan_out: int


def learning_rate_factor(
    parametrisation: Parametrisation,
    role: Role,
    family: UpdateFamily,
    shape: Shape,
    base: Shape,
    depth_ratio: float,
) -> float:
    """Factor of the learning rate, relative to the base.

    A matrix whose rule is s^-1 gets the factor with which the effect of an update on aligned inputs is that of the base
    (:func:`update_effect`, ours); s^0 leaves it alone.

    Raises:
        ConfigError: when the parametrisation has no rule for this family.
    """
    power, ratio = parametrisation.rules[role].learning_rate, shape.fan_in / base.fan_in
    if family == "gradient" and parametrisation.config.kind != "standard":
        require(
            parametrisation.gradient is not None,
            "model.parametrisation.kind",
            got=f"{parametrisation.config.kind}, which has no rule for updates as large as the gradient",
            expected="a parametrisation with such rules, or an optimiser whose updates are normalised",
            do="Choose mup or complete_p, or optimiser adamw.",
        )
        assert parametrisation.gradient is not None
        depth_factor = Power(0.0, parametrisation.gradient.depth).at(1.0, depth_ratio)
        if role in MATRICES and role != Role.HEAD:
            return depth_factor * update_effect("gradient", base) / update_effect("gradient", shape)
        return parametrisation.gradient.at(ratio, depth_ratio)
    if role not in MATRICES or role == Role.HEAD or family in ("sign", "gradient"):
        return power.at(ratio, depth_ratio)
    effect = update_effect(family, shape) / update_effect(family, base)
    return power.at(effect, depth_ratio)


def update_effect(family: UpdateFamily, shape: Shape) -> float:
    """Size of a channel of ΔW x, up to constants, for an update ΔW of this family and an input x of unit channels with
    which it is aligned.

    An update of unit spectral norm turns x, of length sqrt(in), into a vector of that length: sqrt(in / out) a channel.
    """
    fan_in, fan_out = shape
    return {
        "sign": fan_in,
        "orthogonal": math.sqrt(fan_in / fan_out * max(1.0, fan_out / fan_in)),
        "spectral": 1.0,
        "rms": math.sqrt(fan_in / fan_out * max(fan_in, fan_out)),
        "gradient": fan_in / fan_out,
    }[family]
