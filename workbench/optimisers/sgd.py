"""Stochastic gradient descent with momentum and decoupled weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.config import require
from workbench.contract import ParameterRole, Range
from workbench.optimisers.base import Optimiser, OptimiserConfig, optimisers
from workbench.optimisers.groups import ParameterGroup
from workbench.optimisers.tensors import assign, local
from workbench.parametrisations import UpdateFamily


@optimisers.register
class SGD(Optimiser):
    """b = momentum · b + g;  w = (1 - lr · weight_decay) w - lr · b, with Nesterov lr · (g + momentum · b)."""

    class Config(OptimiserConfig):
        """SGD with momentum."""

        kind: Literal["sgd"] = "sgd"
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
        """Decay rate of the running sum of gradients; without momentum there is no state."""
        nesterov: bool = False
        """Whether to step along the gradient plus the decayed sum."""

        def model_post_init(self, _context: Any) -> None:
            require(self.momentum or not self.nesterov, "nesterov", got=True, expected="momentum above 0")

    skips_on_found_inf = True
    gradient_powers: ClassVar[dict[str, int]] = {"momentum": 1}

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        settings = [group.settings() for group in groups]
        return DecoupledSGD(settings, momentum=self.config.momentum, nesterov=self.config.nesterov)

    def state_bytes(self, group: ParameterGroup) -> int:
        """One fp32 number per parameter; none without momentum."""
        return sum(4 * parameter.numel() for parameter in group.parameters.values()) if self.config.momentum else 0

    def update_family(self, role: ParameterRole) -> UpdateFamily:
        return "gradient"

    @classmethod
    def search_space(cls, config: Any) -> dict[str, Range]:
        return {"momentum": Range(low=0.5, high=0.99)}


class DecoupledSGD(torch.optim.Optimizer):
    """torch's SGD adds weight decay to the gradient, and thereby to the momentum; here it only shrinks parameters."""

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, nesterov: bool):
        super().__init__(groups, {"momentum": momentum, "nesterov": nesterov})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            momentum, shrinkage = group["momentum"], 1 - group["lr"] * group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = gradient = local(parameter.grad)
                if momentum:
                    state = self.state[parameter]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(parameter)
                    total = momentum * local(state["momentum"]) + gradient
                    update = gradient + momentum * total if group["nesterov"] else total
                    assign(state["momentum"], total, self.found_inf)
                assign(parameter, local(parameter) * shrinkage - group["lr"] * update, self.found_inf)
