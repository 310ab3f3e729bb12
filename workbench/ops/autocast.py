"""What autocast means for operations that torch does not cast by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def product_type(x: Tensor) -> torch.dtype:
    """The type in which matrix products with ``x`` are made here: autocast's where it is on, else that of ``x``."""
    kind = "cpu" if x.device.type == "meta" else x.device.type  # autocast knows no meta device
    if torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def without_autocast(like: Tensor) -> torch.autocast:
    """Products are made in the type of their factors here, whatever the caller's autocast says."""
    device = "cpu" if like.device.type == "meta" else like.device.type  # autocast knows no meta device
    return torch.autocast(device, enabled=False)


def in_own_types(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, whose first argument is a tensor, :func:`without_autocast`."""

    @wraps(call)
    def run(like: Tensor, *args: Any) -> Any:
        with without_autocast(like):
            return call(like, *args)

    return run
