"""What autocast means for operations that torch does not cast by itself."""

from __future__ import annotations

import torch
from torch import Tensor


def product_type(x: Tensor) -> torch.dtype:
    """The type in which matrix products with ``x`` are made here: autocast's where it is on, else that of ``x``."""
    kind = "cpu" if x.device.type == "meta" else x.device.type  # autocast knows no meta device
    if torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
        return torch.get_autocast_dtype(kind)
    return x.dtype
