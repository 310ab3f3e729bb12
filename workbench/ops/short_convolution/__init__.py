"""Causal depthwise convolution over a few tokens with SiLU, within documents."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor, float64
from torch import dtype as DType

from workbench.ops import paths
from workbench.ops.short_convolution.torch import short_convolution_torch

__all__ = ["path", "short_convolution"]

TRITON = find_spec("triton") is not None


def path(device: str, dtype: DType, *, tail: bool) -> str:
    """Which implementation computes a call: "triton" (our kernels) on CUDA, or "torch" (shifted rows), which alone keeps
    fp64 and goes on from the ``tail`` of a cache."""
    return "triton" if TRITON and device == "cuda" and dtype != float64 and not tail else "torch"


def short_convolution(
    x_BTC: Tensor, weight_CW: Tensor, *, segments: Tensor | None = None, tail_BPC: Tensor | None = None
) -> Tensor:
    """y_t = silu(Σ_j w_j x_{t-j}), j from 0 to W - 1, over inputs of the same document.

    Args:
        x_BTC: (B, T, C) inputs.
        weight_CW: (C, W); ``weight_CW[:, 0]`` acts on the current token.
        segments: (B, T) document numbers; None means one document a row.
        tail_BPC: the P = W - 1 inputs before this row, as a decode cache keeps them; default zeros.

    Returns:
        (B, T, C) in the type of ``x``, computed in fp32 (fp64 for fp64).
    """
    chosen = path(x_BTC.device.type, x_BTC.dtype, tail=tail_BPC is not None)
    paths.note("short_convolution", chosen)
    if chosen == "triton":
        from workbench.ops.short_convolution.triton import short_convolution_triton  # only where it is used

        return short_convolution_triton(x_BTC, weight_CW, segments)
    return short_convolution_torch(x_BTC, weight_CW, segments=segments, tail_BPC=tail_BPC)
