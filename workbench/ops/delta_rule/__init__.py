"""The delta rule: a linear-attention state that is edited instead of only added to. One operation for a family of
mixers.

    S_t = (I - β_t k_t e_tᵀ) Diag(exp g_t) S_{t-1} + β_t k_t v_tᵀ        o_t = S_tᵀ q_t

Legend: B batch, T time, H heads, K key channels, V value channels. Symbols of this package, the papers and fla:

    here             symbol   DeltaNet, GDN, KDA   fla: kda, gated_delta_rule   fla: dplr_delta_rule
    write_key        k        k                    k                            k, b = -k
    erase_key        e        k                    k                            a = β exp(g) e
    value            v        v                    v                            β v
    beta             β        β                    beta                         in a and v
    g (log-decay)    g        log α                g                            gk
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, bfloat16, compiler, float16

from workbench.ops import dispatch
from workbench.ops.delta_rule.peers import known_peers
from workbench.ops.delta_rule.peers.choice import fastest
from workbench.ops.delta_rule.peers.operator import compute
from workbench.ops.delta_rule.peers.verify import refusal
from workbench.ops.delta_rule.reference import delta_rule_recurrent
from workbench.ops.delta_rule.torch import by_blocks, delta_rule_flops, delta_rule_torch

__all__ = ["by_blocks", "delta_rule", "delta_rule_flops"]

BACKENDS = ("recurrent", "torch", "triton", *known_peers())
MAX_HEAD_CHANNELS = 256
"""Most key and value channels of one head that the kernels take."""


def choose_backend(value_BTHV: Tensor, key_channels: int) -> str:
    """The backend of ``backend="auto"`` without other packages.

    "recurrent" for one token (decoding), "triton" (our kernels) on CUDA in bfloat16 or float16 for heads of at most 256
    channels, "torch" (chunks of matrix products) for everything else.
    """
    if value_BTHV.shape[1] == 1:
        return "recurrent"
    fits = max(key_channels, value_BTHV.shape[-1]) <= MAX_HEAD_CHANNELS
    return dispatch.choose_backend(value_BTHV, supported=fits and value_BTHV.dtype in (bfloat16, float16))


def delta_rule(
    q_BTHK: Tensor,
    write_key_BTHK: Tensor,
    value_BTHV: Tensor,
    g: Tensor | None = None,
    *,
    erase_key_BTHK: Tensor | None = None,
    beta_BTH: Tensor | None = None,
    state_BHKV: Tensor | None = None,
    segments: Tensor | None = None,
    chunk: int = 32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = (I - β_t k_t e_tᵀ) Diag(exp g_t) S_{t-1} + β_t k_t v_tᵀ,  o_t = S_tᵀ q_t.

    The decay acts before the edit; the output reads the state after the write. The variants are special cases: the
    delta rule of arXiv 2406.06484 has e = k and no decay, 2412.06464 adds a decay per head, 2510.26692 one per channel;
    2605.22791 scales e and v by gates of their own.

    Args:
        q_BTHK: queries, already scaled.
        write_key_BTHK: k, where values are written; normalised by the caller.
        value_BTHV: v, the values written.
        g: log-decay <= 0: (B, T, H) per head, (B, T, H, K) per channel, None for none. The sign is not checked.
        erase_key_BTHK: e, what is erased; default ``write_key_BTHK``.
        beta_BTH: β, the strength of erasure and write; default 1.
        state_BHKV: state before the first token; default zeros. It belongs to the first token's document.
        segments: (B, T) document numbers; the state is reset where the number changes.
        chunk: tokens of a chunk in the "torch" backend, a power of two; affects speed and rounding only. 32 was fastest
            on a CPU.
        backend: "auto": that of :func:`choose_backend`, or on a GPU the fastest of it and of the installed packages
            that may be chosen (:mod:`.peers.choice`). Or one of "recurrent", "torch", "triton", or a backend of
            :mod:`.peers`: "fla", "flash_qla", and, which leave out what the state has forgotten,
            "flash_qla_truncated" and "cudnn_truncated". There is no fallback on errors of a named backend.

    Returns:
        outputs (B, T, H, V) in the dtype of ``value``, and the state after the last token (B, H, K, V), float32
            (float64 for float64).

    Raises:
        ValueError: when shapes do not match, or the backend is unknown.
        RuntimeError: when the named backend cannot compute this call, with the reason.
    """
    B, T, H, K = _axes("q_BTHK", q_BTHK, "BTHK")
    V = _axes("value_BTHV", value_BTHV, "BTHV")[-1]
    size = {"B": B, "T": T, "H": H, "K": K, "V": V}
    _check("write_key_BTHK", write_key_BTHK, "BTHK", size)
    _check("value_BTHV", value_BTHV, "BTHV", size)
    _check("g", g, "BTH" if g is not None and g.dim() == 3 else "BTHK", size)
    _check("erase_key_BTHK", erase_key_BTHK, "BTHK", size)
    _check("beta_BTH", beta_BTH, "BTH", size)
    _check("state_BHKV", state_BHKV, "BHKV", size)
    _check("segments", segments, "BT", size)
    if T < 1:
        raise ValueError("delta_rule: got T=0; expected at least one token.")
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"delta_rule: chunk: got {chunk}; expected a power of two.")
    decay = "none" if g is None else "head" if g.dim() == 3 else "channel"
    form = (decay, erase_key_BTHK is not None, segments is not None, compiler.is_compiling())
    call = (value_BTHV.device, value_BTHV.dtype, B, T, H, K, V, *form)
    if backend == "auto":
        backend = choose_backend(value_BTHV, K)
        if backend == "triton" and not dispatch.is_forced():
            backend = fastest(backend, *call)
    elif backend not in BACKENDS:
        raise ValueError(f"delta_rule: backend: got {backend!r}; expected 'auto' or one of {', '.join(BACKENDS)}.")
    dispatch.record("delta_rule", backend)
    optional: dict[str, Any] = {
        "erase_key_BTHK": erase_key_BTHK,
        "beta_BTH": beta_BTH,
        "state_BHKV": state_BHKV,
        "segments": segments,
    }
    if backend == "recurrent":
        return delta_rule_recurrent(q_BTHK, write_key_BTHK, value_BTHV, g, **optional)
    if backend == "torch":
        return delta_rule_torch(q_BTHK, write_key_BTHK, value_BTHV, g, chunk=chunk, **optional)
    if backend == "triton":
        if not dispatch.TRITON:
            raise RuntimeError("delta_rule: backend='triton': triton is not installed. Use backend='torch'.")
        from workbench.ops.delta_rule.kernels import delta_rule_triton

        return delta_rule_triton(q_BTHK, write_key_BTHK, value_BTHV, g, **optional)
    reason = refusal(backend, *call)
    if reason:
        raise RuntimeError(f"delta_rule: backend={backend!r}: {reason}. Use backend='auto'.")
    return compute(backend, q_BTHK, write_key_BTHK, value_BTHV, g, **optional, compiled=compiler.is_compiling())


def _axes(name: str, tensor: Tensor, axes: str) -> tuple[int, ...]:
    if tensor.dim() != len(axes):
        raise ValueError(f"delta_rule: {name}: got shape {tuple(tensor.shape)}; expected the axes ({', '.join(axes)}).")
    return tuple(tensor.shape)


def _check(name: str, tensor: Tensor | None, axes: str, size: dict[str, int]) -> None:
    if tensor is not None and tuple(tensor.shape) != tuple(size[axis] for axis in axes):
        expected = ", ".join(f"{axis}={size[axis]}" for axis in axes)
        raise ValueError(f"delta_rule: {name}: got shape {tuple(tensor.shape)}; expected ({expected}).")
