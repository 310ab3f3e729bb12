"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.contract import Range
from workbench.optimisers.base import Optimiser, OptimiserConfig, optimisers
from workbench.optimisers.groups import ParameterGroup

Beta = Annotated[float, Field(ge=0, lt=1)]


@optimisers.register
class AdamW(Optimiser):
    """torch's fused AdamW."""

    class Config(OptimiserConfig):
        """AdamW."""

        kind: Literal["adamw"] = "adamw"
        betas: tuple[Beta, Beta] = (0.9, 0.95)
        """Decay rates of the running means of the gradient and of its square."""
        epsilon: Annotated[float, Field(gt=0)] = 1e-8
        """Added to the root of the second moment."""

    skips_on_found_inf = True
    gradient_powers: ClassVar[dict[str, int]] = {"exp_avg": 1, "exp_avg_sq": 2}

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        config = self.config
        settings = [group.settings(eps=config.epsilon * group.epsilon_factor) for group in groups]
        return torch.optim.AdamW(settings, betas=config.betas, eps=config.epsilon, fused=True)

    def state_bytes(self, group: ParameterGroup) -> int:
        """Two fp32 moments per parameter, and one fp32 step count per tensor."""
        return sum(8 * parameter.numel() + 4 for parameter in group.parameters.values())

    def denominator(self, entry: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
        return adamw_denominator(entry, group)

    @property
    def epsilon(self) -> float:
        return float(self.config.epsilon)

    @classmethod
    def search_space(cls, config: Any) -> dict[str, Range]:
        return {"epsilon": Range(low=1e-16, high=1e-6, log=True)}


def adamw_denominator(entry: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """Root of a parameter's second moment without its bias towards zero, to which epsilon is added."""
    return (entry["exp_avg_sq"] / (1 - group["betas"][1] ** entry["step"])).sqrt()
