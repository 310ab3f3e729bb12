"""Tensors of an optimiser, whether or not they are sharded over ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """The elements on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assign(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """Set the elements of ``target`` on this rank, except where ``found_inf`` is 1.0; decided on the device."""
    elements = local(target)
    elements.copy_(value if found_inf is None else torch.where(found_inf > 0, elements, value))
