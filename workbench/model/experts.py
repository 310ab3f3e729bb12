"""Experts distributed over ranks."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from workbench.contract import FeedForward, Role
from workbench.model.roles import parameter_roles


def distribute_experts(model: nn.Module, mesh: Any) -> set[nn.Parameter]:
    """Replace the experts of every layer by DTensors, of which each rank stores equally many whole experts.

    Their gradients are complete without a reduction, since the forward pass of the layer brings the rows of all ranks
    to them (:mod:`workbench.ops.experts.exchange`).

    Args:
        model: equal on all ranks, on its device. Its feed-forwards have experts that ranks can divide
            (:meth:`workbench.contract.FeedForward.num_experts`), or none.
        mesh: of one dimension.

    Returns:
        The parameters that were replaced, as they are now.
    """
    distributed = set()
    for layer in model.modules():
        if not isinstance(layer, FeedForward):
            continue
        for name, role in parameter_roles(layer).items():
            if role.role == Role.EXPERT and "." not in name:
                whole = layer.get_parameter(name)
                # every rank has the whole tensor: its part is taken from there, not sent by the first rank
                part = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)
                experts = nn.Parameter(part, requires_grad=whole.requires_grad)
                setattr(layer, name, experts)
                distributed.add(experts)
    return distributed
