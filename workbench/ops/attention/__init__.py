"""Softmax attention with grouped heads, a window and packed documents."""

from __future__ import annotations

from torch import Tensor, float64
from torch import dtype as Type  # `torch` is a module of this folder

from workbench.ops import paths
from workbench.ops.attention.flex import attention_flex
from workbench.ops.attention.torch import attention_torch

__all__ = ["attention", "path"]


def path(device: str, *, length: int, keys: int, window: int | None, segments: bool, dtype: Type) -> str:
    """Which implementation computes a call: "torch" (scaled_dot_product_attention) or "flex" (FlexAttention).

    Measured on an H200, forward and backward: without documents and window cuDNN's kernel, reached through torch, is the
    fastest (4.0 ms against 5.6 ms); with either of them FlexAttention is, since it skips what is not seen (2.8 and 2.2 ms).
    Compiled gradients of 24 layers through it are as close to fp32 as those of the masked kernels (seen on an H100; see
    tests/model/test_compiled.py). FlexAttention has no fp64 there.
    """
    masked = segments or (window is not None and window < length)
    able = device == "cuda" and dtype != float64 and keys == length and length > 1
    return "flex" if able and masked else "torch"


def attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, *, window: int | None = None, segments: Tensor | None = None
) -> Tensor:
    """Causal softmax attention with scale 1/sqrt(K).

    Args:
        q_BTHK: queries, (B, T, H, K).
        k_BSGK, v_BSGK: keys and values, (B, S, G, K), H a multiple of G. With S > T the queries are the last T of the
            S positions (decode).
        window: each query sees exactly the last ``window`` keys, itself included; None sees all.
        segments: (B, T) document numbers, only with S = T.

    Returns:
        (B, T, H, K), in the type of ``v``.
    """
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    q_BTHK, k_BSGK = q_BTHK.to(v_BSGK.dtype), k_BSGK.to(v_BSGK.dtype)
    chosen = path(
        q_BTHK.device.type, length=T, keys=S, window=window, segments=segments is not None, dtype=v_BSGK.dtype
    )
    paths.note("attention", chosen)
    call = attention_flex if chosen == "flex" else attention_torch
    return call(q_BTHK, k_BSGK, v_BSGK, window=window, segments=segments)
