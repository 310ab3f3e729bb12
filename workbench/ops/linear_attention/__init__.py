"""Gated linear attention: a state that decays and is only added to, one decay per head.

    S_t = exp(g_t) S_{t-1} + k_t v_tᵀ        o_t = S_tᵀ q_t

Legend: B batch, T time, H heads, K key channels, V value channels. Symbols of this package, the papers and fla:

    here             Mamba-2 (arXiv 2405.21060)   fla: simple_gla
    q, k, v          C, B, Δ x                    q, k, v
    g (log-decay)    Δ A                          g
"""

from __future__ import annotations

from torch import Tensor

from workbench.ops import dispatch
from workbench.ops.linear_attention.reference import linear_attention_recurrent
from workbench.ops.linear_attention.torch import linear_attention_flops, linear_attention_torch

__all__ = ["linear_attention", "linear_attention_flops"]

BACKENDS = ("recurrent", "torch")


def linear_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    *,
    state_BHKV: Tensor | None = None,
    segments: Tensor | None = None,
    chunk: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_tᵀ,  o_t = S_tᵀ q_t.

    A token may have n rows: n queries, keys and values, which see one another after one decay. The first axis of q, k
    and v is then n·T, token by token.

    Args:
        q_BTHK: queries, already scaled.
        k_BTHK: keys.
        v_BTHV: values.
        g_BTH: log-decay <= 0 per token and head. The sign is not checked.
        state_BHKV: state before the first token; default zeros. It belongs to the first token's document.
        segments: (B, T) document numbers; the state is reset where the number changes.
        chunk: tokens of a chunk in the "torch" backend, a power of two; affects speed and rounding only.
        backend: "recurrent" (token by token), "torch" (chunks of matrix products), or "auto": the first for one token,
            the second for more.

    Returns:
        outputs (B, n·T, H, V) in the dtype of ``v``, and the state after the last token (B, H, K, V), float32 (float64
        for float64).

    Raises:
        ValueError: when shapes do not match, or the backend is unknown.
    """
    B, rows, H, K = q_BTHK.shape
    V, T = v_BTHV.shape[-1], g_BTH.shape[1]
    if T == 0 or rows % T:
        raise ValueError(f"linear_attention: q_BTHK: got {rows} rows; expected a multiple of the {T} tokens of g_BTH.")
    shapes = {"k_BTHK": (k_BTHK, (B, rows, H, K)), "v_BTHV": (v_BTHV, (B, rows, H, V)), "g_BTH": (g_BTH, (B, T, H))}
    shapes |= {} if state_BHKV is None else {"state_BHKV": (state_BHKV, (B, H, K, V))}
    shapes |= {} if segments is None else {"segments": (segments, (B, T))}
    for name, (tensor, expected) in shapes.items():
        if tuple(tensor.shape) != expected:
            raise ValueError(f"linear_attention: {name}: got shape {tuple(tensor.shape)}; expected {expected}.")
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"linear_attention: chunk: got {chunk}; expected a power of two.")
    if backend == "auto":
        backend = "recurrent" if T == 1 else "torch"
    elif backend not in BACKENDS:
        raise ValueError(
            f"linear_attention: backend: got {backend!r}; expected 'auto' or one of {', '.join(BACKENDS)}."
        )
    dispatch.record("linear_attention", backend)
    if backend == "recurrent":
        return linear_attention_recurrent(q_BTHK, k_BTHK, v_BTHV, g_BTH, state_BHKV=state_BHKV, segments=segments)
    return linear_attention_torch(q_BTHK, k_BTHK, v_BTHV, g_BTH, state_BHKV=state_BHKV, segments=segments, chunk=chunk)
