"""Causal depthwise convolution over a few tokens with SiLU, within documents, and what heads are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from torch import Tensor, float64
from torch import dtype as DType

from workbench.ops import paths
from workbench.ops.short_convolution.reference import Heads
from workbench.ops.short_convolution.torch import short_convolution_torch

__all__ = ["Heads", "path", "short_convolution"]

TRITON = find_spec("triton") is not None
WIDEST_HEAD = 512
"""Most channels over which our kernels take a length."""


def path(device: str, dtype: DType, *, tail: bool, head: int = 0) -> str:
    """Which implementation computes a call: "triton" (our kernels) on CUDA, or "torch" (shifted rows), which alone keeps
    fp64, goes on from the ``tail`` of a cache, and scales heads of more than 512 channels (``head``) to a length."""
    kernels = TRITON and device == "cuda" and dtype != float64 and not tail and head <= WIDEST_HEAD
    return "triton" if kernels else "torch"


def short_convolution(
    x_BTC: Tensor,
    weight_CW: Tensor,
    parts: Sequence[Heads],
    *,
    segments: Tensor | None = None,
    tail_BPC: Tensor | None = None,
) -> list[Tensor]:
    """y_t = silu(Σ_j w_j x_{t-j}), j from 0 to W - 1, over inputs of the same document; then every part by itself.

    Args:
        x_BTC: (B, T, C) inputs.
        weight_CW: (C, W); ``weight_CW[:, 0]`` acts on the current token.
        parts: how the C channels are divided; a part with a length has y / sqrt(|y|² + 1e-6) times it per head.
        segments: (B, T) document numbers; None means one document a row.
        tail_BPC: the P = W - 1 inputs before this row, as a decode cache keeps them; default zeros.

    Returns:
        (B, T, heads, channels) for each part, in the type of ``x``, computed in fp32 (fp64 for fp64).

    Raises:
        ValueError: when the parts are not the channels.
    """
    if sum(part.heads * part.channels for part in parts) != x_BTC.shape[-1]:
        raise ValueError(f"short_convolution: parts: got {list(parts)}; expected {x_BTC.shape[-1]} channels together.")
    head = max(0 if part.length is None else part.channels for part in parts)
    chosen = path(x_BTC.device.type, x_BTC.dtype, tail=tail_BPC is not None, head=head)
    paths.note("short_convolution", chosen)
    if chosen == "triton":
        from workbench.ops.short_convolution.triton import short_convolution_triton  # only where it is used

        return short_convolution_triton(x_BTC, weight_CW, parts, segments)
    return short_convolution_torch(x_BTC, weight_CW, parts, segments=segments, tail_BPC=tail_BPC)
