"""Causal depthwise convolution over a few tokens with SiLU, within documents."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from workbench.ops import paths
from workbench.ops.short_convolution.torch import short_convolution_torch

__all__ = ["short_convolution"]

TRITON = find_spec("triton") is not None


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
    if TRITON and x_BTC.is_cuda and tail_BPC is None:
        paths.note("short_convolution", "triton")
        from workbench.ops.short_convolution.triton import short_convolution_triton  # only where it is used

        return short_convolution_triton(x_BTC, weight_CW, segments)
    paths.note("short_convolution", "torch")
    return short_convolution_torch(x_BTC, weight_CW, segments=segments, tail_BPC=tail_BPC)
