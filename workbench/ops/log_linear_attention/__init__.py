"""Log-linear attention (arXiv 2506.04761): gated linear attention to a few states, whose number grows as log T.

    o_t = Σ_{s<=t} λ_t[ℓ(t, s)] D(s, t] (q_t · k_s) v_s        D(s, t] = exp(g_{s+1} + … + g_t)

and the same with the gated delta rule, where every token erases along its key from all states:

    o_t = Σ_{s<=t} λ_t[ℓ(t, s)] (q_tᵀ P(s, t] k_s) β_s v_s     P(s, t] = Π_{r=t…s+1} (I - β_r k_r k_rᵀ) exp(g_r)

Level 0 is the token itself; the tokens before fall into buckets of 1, 2, 4, … tokens, one for every bit that is set in
the position t of its document, the smallest bucket last (a Fenwick tree): ℓ(t, s) is the number of bits of t XOR s.
Every bucket is a state of linear attention. With J levels, tokens beyond level J - 1 belong to that level.

Legend: B batch, T time, H heads, K key channels, V value channels, J levels, I states, of the levels from 1 on.
"""

from __future__ import annotations

from torch import Tensor

from workbench.ops import dispatch
from workbench.ops.log_linear_attention.delta import log_linear_delta_rule_flops, log_linear_delta_rule_torch
from workbench.ops.log_linear_attention.reference import log_linear_attention_recurrent
from workbench.ops.log_linear_attention.torch import log_linear_attention_flops, log_linear_attention_torch

__all__ = ["log_linear_attention", "log_linear_attention_flops", "log_linear_delta_rule_flops", "state_count"]

BACKENDS = ("recurrent", "torch")


def state_count(length: int, levels: int) -> int:
    """States I after up to ``length`` tokens."""
    return min(length.bit_length(), levels - 1)


def log_linear_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    scales_BTHJ: Tensor,
    *,
    beta_BTH: Tensor | None = None,
    states_BHIKV: Tensor | None = None,
    positions_B: Tensor | None = None,
    segments: Tensor | None = None,
    chunk: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Outputs of the equations above, and the states behind them.

    Args:
        q_BTHK: queries, already scaled.
        k_BTHK: keys.
        v_BTHV: values.
        g_BTH: log-decay <= 0 per head. The sign is not checked.
        scales_BTHJ: λ of every level, J >= 2.
        beta_BTH: edit strengths of the delta rule. Default: states are only added to.
        states_BHIKV: states before the first token, I as of :func:`state_count` or more. Default: zero, and the states
            behind the last token are not computed.
        positions_B: (B,) tokens that the states have seen. Default: none, all states are zero.
        segments: (B, T) document numbers; positions begin again where the number changes.
        chunk: tokens of the smallest block in the "torch" backend, a power of two; affects speed and rounding only.
        backend: "recurrent" (token by token), "torch" (blocks of matrix products), or "auto": the first for one token,
            the second for more. With ``positions_B`` always the first.

    Returns:
        outputs (B, T, H, V) in the dtype of ``v``, and the states after the last token (B, H, I, K, V), float32
        (float64 for float64), or None.

    Raises:
        ValueError: when shapes do not match, or the backend is unknown.
    """
    (B, T, H, K), V, J = q_BTHK.shape, v_BTHV.shape[-1], scales_BTHJ.shape[-1]
    shapes = {"k_BTHK": (k_BTHK, (B, T, H, K)), "v_BTHV": (v_BTHV, (B, T, H, V)), "g_BTH": (g_BTH, (B, T, H))}
    shapes |= {"scales_BTHJ": (scales_BTHJ, (B, T, H, max(2, J)))}
    shapes |= {} if beta_BTH is None else {"beta_BTH": (beta_BTH, (B, T, H))}
    if states_BHIKV is not None:
        shapes |= {"states_BHIKV": (states_BHIKV, (B, H, min(states_BHIKV.shape[2], J - 1), K, V))}
    shapes |= {} if positions_B is None else {"positions_B": (positions_B, (B,))}
    shapes |= {} if segments is None else {"segments": (segments, (B, T))}
    for name, (tensor, expected) in shapes.items():
        if tuple(tensor.shape) != expected:
            raise ValueError(f"log_linear_attention: {name}: got shape {tuple(tensor.shape)}; expected {expected}.")
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"log_linear_attention: chunk: got {chunk}; expected a power of two.")
    if backend != "auto" and backend not in BACKENDS:
        expected_names = ", ".join(BACKENDS)
        raise ValueError(f"log_linear_attention: backend: got {backend!r}; expected 'auto' or one of {expected_names}.")
    if positions_B is not None or (backend == "auto" and T == 1):
        backend = "recurrent"
    backend = "torch" if backend == "auto" else backend
    dispatch.record("log_linear_attention", backend)
    operands = q_BTHK, k_BTHK, v_BTHV, g_BTH, scales_BTHJ
    if backend == "recurrent":
        return log_linear_attention_recurrent(
            *operands, beta_BTH=beta_BTH, states_BHIKV=states_BHIKV, positions_B=positions_B, segments=segments
        )
    if beta_BTH is None:
        return log_linear_attention_torch(*operands, states_BHIKV=states_BHIKV, segments=segments, chunk=chunk)
    return log_linear_delta_rule_torch(*operands, beta_BTH, states_BHIKV=states_BHIKV, segments=segments, chunk=chunk)
