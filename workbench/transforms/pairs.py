"""Rescaling along the exact pairs that a model's components declare."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from workbench.config import ConfigError, Problem, nearest, require
from workbench.contract import Component, FeedForward, Mixer, RescalingPair
from workbench.model import LanguageModel, ModelConfig, rescaling_pairs
from workbench.model.lora import adapter_factor
from workbench.optimisers import AVERAGE, SCALE
from workbench.transforms.base import OptimiserState, Transform, TransformConfig, Weights

ATTENTION = ("qk", "qk_rotary", "vo")
"""Pairs of a mixer."""
EXPECTED: tuple[tuple[type[Component], tuple[str, ...]], ...] = ((Mixer, ("qk", "vo")), (FeedForward, ("up_down",)))
"""Pairs that every component of a kind has, unless something stands between the tensors."""
NAMES = frozenset({*ATTENTION, "up_down", "tables_mix", "lora"})
"""Pairs of the workbench's components, which a model need not have."""


class PairConfig(TransformConfig):
    """Fields of every rescaling."""

    state: Literal["keep", "rescale", "reset", "compensate"] = "keep"
    """The optimiser's state of the rescaled parameters: unchanged; rescaled as their gradients are (momentum by 1/s,
    second moment by 1/s²); fresh, step count included; or compensated: the optimiser continues on the weights without
    the rescaling, so that training is unchanged."""
    missing: Literal["refuse", "skip"] = "refuse"
    """What happens to a layer that lacks one of the pairs: the run is refused, or the layer stays as it is."""

    @property
    def needs_optimiser(self) -> bool:
        return self.state == "compensate"


class PairRescaling(Transform):
    """Multiplies one side of each pair and divides the other. The function of the model does not change: bit for bit
    where all scales are powers of two, else up to rounding.

    Moving averages of weights are rescaled as their parameters are.
    """

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Pairs that are rescaled."""

    names_field: ClassVar[str]
    """Field of the configuration in which they are named."""

    @abstractmethod
    def scales(self, pair: RescalingPair, weights: Weights) -> Tensor:
        """(S,) fp64 scales of ``pair.first``; ``pair.second`` is divided by them."""

    def preserves_function(self, source: ModelConfig, target: ModelConfig) -> bool:
        return True

    def compensated(self, source: ModelConfig) -> frozenset[str]:
        if self.config.state != "compensate":
            return frozenset()
        with torch.device("meta"):
            structure = LanguageModel(source)
        names = {name for name, _ in structure.named_parameters()}
        return frozenset(self._factors(structure, names, lambda pair: torch.ones(len(pair.heads))))

    def _factors(
        self, structure: LanguageModel, names: Collection[str], scales: Callable[[RescalingPair], Tensor]
    ) -> dict[str, Tensor]:
        """Parameter -> what multiplies it, adapters included.

        Args:
            structure: the model, on any device.
            names: of its parameters.
            scales: of a pair.
        """
        factors: dict[str, Tensor] = {}
        for pair in (pair for _, pair in rescaling_pairs(structure) if pair.name in self.names):
            for name, factor in pair.factors(scales(pair)):
                for scaled, by in {name: factor, **adapter_factor(name, factor, names)}.items():
                    factors[scaled] = factors[scaled] * by if scaled in factors else by
        return factors

    def check(self, source: ModelConfig, target: ModelConfig) -> None:
        with torch.device("meta"):
            model = LanguageModel(source)
        present = {pair.name for _, pair in rescaling_pairs(model)}
        known = set(present | NAMES)
        problems: dict[tuple[str, str], Problem] = {}
        for module in model.modules():
            if not isinstance(module, Component):
                continue
            obstacles, declared = module.rescaling_obstacles(), {pair.name for pair in module.rescaling_pairs()}
            known |= obstacles.keys()
            expected = {name for kind, names in EXPECTED if isinstance(module, kind) for name in names}
            for name in self.names:
                if name in declared or name not in expected | obstacles.keys():
                    continue
                kind = module.Config.model_fields["kind"].default
                reason = obstacles.get(name, "it declares no such pair")
                part = "feedforwards" if isinstance(module, FeedForward) else "mixers"
                problems[kind, name] = Problem(
                    f"model.{part}.{kind}",
                    f"no exact rescaling {name!r}: {reason}",
                    f"components with the pairs {', '.join(self.names)}",
                    "Name other pairs, or set missing: skip to leave such layers unchanged.",
                )
        for name in self.names:
            require(
                name in known,
                self.names_field,
                got=name,
                expected=f"a pair: {', '.join(sorted(known))}",
                do=nearest(name, known),
            )
        if problems and self.config.missing == "refuse":
            raise ConfigError(list(problems.values()))
        require(
            present & set(self.names),
            self.names_field,
            got=list(self.names),
            expected=f"a pair of this model: {', '.join(sorted(present)) or 'it has none'}",
            do="" if present else "Choose components with exact rescalings.",
        )

    def __call__(
        self, weights: Weights, optimiser_state: OptimiserState | None, source: ModelConfig, target: ModelConfig
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]] | None]:
        with torch.device("meta"):
            structure = LanguageModel(source)
        factors = self._factors(structure, weights.keys(), lambda pair: self.scales(pair, weights))
        new = dict(weights)
        for name, factor in factors.items():
            new[name] = weights[name] * factor.to(weights[name])
        if optimiser_state is None:
            return new, None
        state = {name: dict(entry) for name, entry in optimiser_state.items()}
        trained = {name for name, parameter in structure.named_parameters() if parameter.requires_grad}
        for name, factor in factors.items():
            if name not in trained:
                continue
            entry = self._entry(state.pop(name, {}), factor.to(weights[name]), weights[name])
            if entry:
                state[name] = entry
        return new, state

    def _entry(self, entry: dict[str, Any], factor: Tensor, weight: Tensor) -> dict[str, Any]:
        """The optimiser's state of a parameter that ``factor`` multiplies."""
        mode = self.config.state
        assert self.optimiser is not None, "a transform of an optimiser's state is built with the optimiser"
        rescaled = self.optimiser.rescaled_state(
            entry, parameter=factor, gradient=1 / factor if mode == "rescale" else torch.ones_like(factor)
        )
        if mode == "reset":
            return {key: rescaled[key] for key in (AVERAGE, SCALE) if key in rescaled}
        if mode == "compensate":
            rescaled[SCALE] = rescaled.get(SCALE, torch.ones_like(weight)) * factor
        return rescaled
