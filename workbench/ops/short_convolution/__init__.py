"""Short convolution: causal, depthwise, over a few tokens of one document, with SiLU, split into heads.

Legend: B batch, T time, C channels, W width, P = W - 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, cat
from torch.compiler import is_compiling

from workbench.ops.dispatch import choose_backend, record
from workbench.ops.short_convolution.reference import Heads, to_length
from workbench.ops.short_convolution.torch import short_convolution_torch

__all__ = ["Heads", "short_convolution", "to_length"]

MAX_NORMALISED_CHANNELS = 512
"""Most channels of a head that the kernels scale to a length."""


def short_convolution(
    x_BTC: Tensor,
    weight_CW: Tensor,
    parts: Sequence[Heads],
    *,
    segments: Tensor | None = None,
    tail_BPC: Tensor | None = None,
    silu: bool = True,
) -> list[Tensor]:
    """y_t = silu(Σ_j w_j x_{t-j}), j = 0 … W - 1, over inputs of the same document; then each part is split into heads.

    The kernels cover neither float64, nor heads wider than 512 channels that are scaled to a length, nor sums without
    SiLU. Compiled decoding steps with a tail do not use them.

    Args:
        x_BTC: (B, T, C) inputs.
        weight_CW: (C, W); ``weight_CW[:, 0]`` weights the current token.
        parts: how the C channels are divided; a part with a length L is scaled per head to L y / sqrt(|y|² + 1e-6).
        segments: (B, T) document numbers; None for one document a row.
        tail_BPC: the P inputs before this row, from a decode cache; default zeros. Not together with ``segments``.
        silu: whether the sum passes a SiLU.

    Returns:
        (B, T, heads, channels) for each part, in the dtype of ``x``, computed in float32 (float64 for float64).

    Raises:
        ValueError: when the channels of the parts do not add up to C.
    """
    if sum(part.heads * part.channels for part in parts) != x_BTC.shape[-1]:
        raise ValueError(f"short_convolution: parts: got {list(parts)}; expected {x_BTC.shape[-1]} channels together.")
    widest = max(0 if part.length is None else part.channels for part in parts)
    # in a compiled decoding step the compiler merges the sum with what surrounds it; the kernels are a launch per part
    merged = tail_BPC is not None and x_BTC.shape[1] == 1 and is_compiling()
    supported = silu and widest <= MAX_NORMALISED_CHANNELS and not merged
    if record("short_convolution", choose_backend(x_BTC, supported=supported)) == "triton":
        from workbench.ops.short_convolution.triton import short_convolution_triton

        if tail_BPC is None:
            return short_convolution_triton(x_BTC, weight_CW, parts, segments)
        padded = cat((tail_BPC.to(x_BTC.dtype), x_BTC), dim=1)
        P, T = tail_BPC.shape[1], x_BTC.shape[1]
        return [y.narrow(1, P, T) for y in short_convolution_triton(padded, weight_CW, parts, None)]
    return short_convolution_torch(x_BTC, weight_CW, parts, segments=segments, tail_BPC=tail_BPC, silu=silu)
