"""Which matrix products of a model are computed in eight bits: ``training.fp8``."""

from __future__ import annotations

from torch import nn

from workbench.contract import Role
from workbench.layers import Linear
from workbench.model.roles import parameter_roles
from workbench.ops.scaled_linear import MULTIPLE, Scaling

ROLES = frozenset({Role.HIDDEN, Role.LATENT_DOWN, Role.LATENT_UP})
"""Roles of the weights. Embeddings, heads, routers and the grouped products of experts stay in bf16."""


def use_fp8(model: nn.Module, scaling: Scaling) -> list[str]:
    """Compute the products of the model's projections in eight bits while it trains; evaluation stays in bf16.

    Left out are projections that decide how long a recurrent state lasts or how tokens are chosen
    (:attr:`workbench.layers.Linear.sensitive`), and sizes that the kernels do not have.

    Returns:
        Names of the projections, in the model's order.
    """
    roles, names = parameter_roles(model), []
    for name, module in model.named_modules():
        if not isinstance(module, Linear) or module.sensitive:
            continue
        fits = module.in_features % MULTIPLE == module.out_features % MULTIPLE == 0
        if fits and roles[f"{name}.weight"].role in ROLES:
            module.fp8 = scaling
            names.append(name)
    return names
