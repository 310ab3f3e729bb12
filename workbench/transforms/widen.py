"""Growth in width: a wider model that computes the function of a trained one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from workbench import seeding
from workbench.config import ConfigError, Problem, require
from workbench.contract import Component, ParameterRole, feedforwards, mixers
from workbench.model import LanguageModel, ModelConfig
from workbench.model.roles import parameter_roles
from workbench.optimisers import SCALE
from workbench.transforms.base import OptimiserState, Transform, TransformConfig, Weights, state_shapes, transforms

SPREAD = 0.5
"""Largest deviation of a copy's share of a weight from an equal share, relative to it. Our choice."""

INITIAL_ONLY = "initialisation"
"""The one transfer constant that is not part of the function, but of initial values alone."""


@transforms.register
class Widen(Transform):
    """Every channel of the residual stream becomes n channels of its value, and so do units inside a component where it
    declares them (``widens``: hidden channels, heads). Output axes are repeated, and the weights of an input axis are
    divided among the copies (Net2Net, arXiv 1511.05641). RMS norms do not see the repetition. Exact up to rounding. The
    roles of the parameters say which axes these are.

    All other inner sizes stay: more channels in a head would change the scale of its scores and its rotations.
    """

    conformance_cases = (
        {
            "source": {"width": 32, "mixers": {"full": {"head_dim": 16, "kv_heads": 1}}, "tied": False},
            "target": {"width": 64, "mixers": {"full": {"head_dim": 16, "kv_heads": 2}}, "tied": False},
        },
        {
            "source": {
                "width": 32,
                "pattern": "full gdn",
                "mixers": {
                    "full": {"head_dim": 16},
                    "gdn": {"heads": 2, "head_dim": 16, "value_dim": 16, "output_gate_rank": 16},
                },
                "feedforward": "moe",
                "feedforwards": {"moe": {"hidden": 16, "shared": 1}},
            },
            "target": {
                "width": 96,
                "pattern": "full gdn",
                "mixers": {
                    "full": {"head_dim": 16},
                    "gdn": {"heads": 2, "head_dim": 16, "value_dim": 16, "output_gate_rank": 16},
                },
                "feedforward": "moe",
                "feedforwards": {"moe": {"hidden": 32, "shared": 1}},
            },
            "config": {"split": "even"},
        },
    )

    class Config(TransformConfig):
        """Widen the residual stream and hidden layers."""

        kind: Literal["widen"] = "widen"
        split: Literal["random", "even"] = "random"
        """Shares of the copies of an input channel: random around equal ones, so that copies have different gradients,
        or equal. Equal copies of one channel would have the same gradients for ever."""
        seed: int = 0
        """Seed of random shares."""
        optimiser: Literal["copy", "reset"] = "copy"
        """Optimiser state: repeated with the weights, rescaled as the gradients are with equal shares; or fresh."""

    variant_configs = ({},)

    @classmethod
    def example_target(cls, source: ModelConfig) -> ModelConfig:
        wide = source.with_spans(source.spans).plain()
        for settings, registry in ((wide["mixers"], mixers), (wide["feedforwards"], feedforwards)):
            for values in settings.values():
                values |= {name: 2 * values[name] for name in registry[values["kind"]].widens}
        return ModelConfig.parse({**wide, "width": 2 * source.width, "mtp": None})

    def target(self, source: ModelConfig, final: ModelConfig) -> ModelConfig:
        return final if source.depth == final.depth else final.with_spans(final.spans[: len(source.spans)])

    def preserves_function(self, source: ModelConfig, target: ModelConfig) -> bool:
        return True

    def check(self, source: ModelConfig, target: ModelConfig) -> None:
        require(
            target.width % source.width == 0,
            "model.width",
            got=target.width,
            expected=f"a multiple of the small model's {source.width}",
        )
        require(
            target.mtp is None or source.width == target.width,
            "model.mtp",
            got="a multi-token head",
            expected="none: it reads the embedding and the hidden state side by side, through norms of its own",
        )
        allowed = ("width", "layers", "shortcut.feedforwards")
        problems = {
            path: Problem(f"model.{path}", repr(new), f"{old!r}, as in the small model")
            for path, (old, new) in target.diff(source).items()
            if not path.startswith(allowed)
        }
        for (_, old), (cls, new) in zip(source.variants(), target.variants(), strict=False):
            before, after = old.plain(), new.plain()
            wider: set[str] = set(cls.widens) & after.keys() if before["kind"] == after["kind"] else set()
            multiples = {after[name] / before[name] for name in wider}
            if len(multiples) == 1 and multiples.pop() % 1 == 0:
                before |= {name: after[name] for name in wider}
            for name in sorted(before.keys() | after.keys()):
                if before.get(name) != after.get(name):
                    path = f"model.{after['kind']}.{name}"
                    expected = f"{before.get(name)!r}, as in the small model"
                    if name in wider:
                        expected = (
                            f"a multiple of the small model's {before[name]}, the same of {' and '.join(cls.widens)}"
                        )
                    do = "Set it explicitly in both models: defaults follow the width."
                    problems.setdefault(path, Problem(path, repr(after.get(name)), expected, do))
        if source.width != target.width:
            problems |= _width_constants(source, target) if not problems else {}
        if problems:
            raise ConfigError(list(problems.values()))
        shapes, roles = state_shapes(target), _roles(target)
        for name, shape in state_shapes(source).items():
            for axis, (size, wider_size) in enumerate(zip(shape, shapes[name])):
                known = name in roles and axis - len(shape) in (roles[name].fan_in, roles[name].fan_out)
                require(
                    size == wider_size or (known and wider_size % size == 0),
                    f"model.{name}",
                    got=f"shape {tuple(shapes[name])} from {tuple(shape)}",
                    expected="wider input or output channels only, as its role names them",
                )

    def __call__(
        self, weights: Weights, optimiser_state: OptimiserState | None, source: ModelConfig, target: ModelConfig
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]] | None]:
        roles, shapes = _roles(target), state_shapes(target)
        new: dict[str, Tensor] = {}
        state: dict[str, dict[str, Any]] | None = None if optimiser_state is None else {}
        for name, weight in weights.items():
            if name not in roles:
                new[name] = weight
                continue
            plan = _Plan(roles[name], weight, shapes[name], divides_output=target.tied and name == "norm.weight")
            new[name] = plan.repeated(weight) * self._shares(name, plan, weight)
            if state is None or optimiser_state is None or name not in optimiser_state:
                continue
            assert self.optimiser is not None, "a transform of an optimiser's state is built with the optimiser"
            entry = self.optimiser.remapped_state(optimiser_state[name], plan.repeated)
            if self.config.optimiser == "reset":
                if SCALE in entry:  # the weights are compensated all the same
                    state[name] = {SCALE: entry[SCALE]}
            else:
                shares = self._shares(name, plan, weight)
                gradient = torch.ones_like(shares) / (1 if plan.divides_output else plan.outputs)
                state[name] = self.optimiser.rescaled_state(entry, parameter=shares, gradient=gradient)
        return new, state

    def _shares(self, name: str, plan: _Plan, weight: Tensor) -> Tensor:
        """What each number of the repeated parameter is multiplied by: shares of the copies that are added up."""
        axis = plan.divided_axis
        if axis is None:
            return torch.ones_like(plan.repeated(weight))
        copies = plan.outputs if plan.divides_output else plan.inputs
        shares = torch.full((copies, *weight.shape), 1 / copies, dtype=torch.float64)
        if self.config.split == "random":
            generator = seeding.generator(self.config.seed, name)
            noise = (2 * torch.rand(shares.shape, dtype=torch.float64, generator=generator) - 1) * SPREAD / 2
            shares = shares * (1 + noise - noise.mean(0))
        joined = torch.cat(list(shares), dim=axis)
        if not plan.divides_output:
            joined = plan.repeated_outputs(joined)
        return joined.to(weight)


def _width_constants(source: ModelConfig, target: ModelConfig) -> dict[str, Problem]:
    """Constants of the function that follow the width."""
    with torch.device("meta"):
        small, large = LanguageModel(source), dict(LanguageModel(target).named_modules())
    problems: dict[str, Problem] = {}
    if target.parametrisation.kind != "standard":
        expected = "standard: the multipliers of others follow the width"
        path = "model.parametrisation"
        problems[path] = Problem(path, repr(target.parametrisation.kind), expected)
    for name, module in small.named_modules():
        if isinstance(module, Component) and (obstacle := module.width_obstacle()):
            problems.setdefault(name, Problem(f"model.{name}", obstacle, "channels that can be repeated"))
        before: Mapping[str, float] = getattr(module, "transfer_constants", dict)()
        after: Mapping[str, float] = getattr(large[name], "transfer_constants", dict)()
        for setting, value in before.items():
            if setting != INITIAL_ONLY and after[setting] != value:
                got, expected = f"a factor of {after[setting]:g} in {name}", f"{value:g}, as in the small model"
                problems.setdefault(setting, Problem(f"model.{setting}", got, expected))
    return problems


class _Plan:
    """How a parameter is repeated along its axes.

    Args:
        role: of the parameter.
        weight: of the small model.
        shape: in the wide model.
        divides_output: whether its output copies are shares of one number: the last gain of a tied model, whose head
            has the repeated channels of the embedding.
    """

    def __init__(self, role: ParameterRole, weight: Tensor, shape: torch.Size, *, divides_output: bool):
        self.role, self.divides_output = role, divides_output
        self.inputs = 1 if role.fan_in is None else shape[role.fan_in] // weight.shape[role.fan_in]
        self.outputs = shape[role.fan_out] // weight.shape[role.fan_out]

    @property
    def divided_axis(self) -> int | None:
        """Axis whose copies are added up later, so that each has a share."""
        if self.divides_output:
            return self.role.fan_out if self.outputs > 1 else None
        return self.role.fan_in if self.inputs > 1 else None

    def repeated(self, tensor: Tensor) -> Tensor:
        """A tensor of the small parameter's shape in that of the wide one."""
        if self.inputs > 1:
            assert self.role.fan_in is not None
            tensor = torch.cat([tensor] * self.inputs, dim=self.role.fan_in)
        return self.repeated_outputs(tensor)

    def repeated_outputs(self, tensor: Tensor) -> Tensor:
        """The same along the output axis, each of the parameter's parts by itself."""
        if self.outputs == 1:
            return tensor
        axis = self.role.fan_out
        sizes = [heads * channels for heads, channels in self.role.parts] or [1]  # of the wide model
        parts = tensor.split([tensor.shape[axis] * size // sum(sizes) for size in sizes], axis)
        return torch.cat([part for part in parts for _ in range(self.outputs)], dim=axis)


def _roles(config: ModelConfig) -> dict[str, ParameterRole]:
    with torch.device("meta"):
        return parameter_roles(LanguageModel(config))
