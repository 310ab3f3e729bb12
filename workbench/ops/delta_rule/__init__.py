"""The delta rule: a linear-attention state that is edited, not only added to. One operation for a family of mixers."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import Tensor, bfloat16, float16
from torch import dtype as DType

from workbench.ops import paths
from workbench.ops.delta_rule.reference import delta_rule_recurrent
from workbench.ops.delta_rule.torch import delta_rule_flops, delta_rule_torch

__all__ = ["delta_rule", "delta_rule_flops", "path"]

PATHS = ("recurrent", "torch", "triton", "fla")
TRITON = all(find_spec(name) for name in ("triton", "workbench.ops.delta_rule.triton"))
"""Whether there are kernels of our own for CUDA devices."""
LARGEST_TILE = 256
"""Most key and value channels of one head that they take."""


def path(device: str, dtype: DType, *, length: int, K: int, V: int) -> str:
    """Which implementation ``backend="auto"`` takes.

    "recurrent" for one token (decode), "triton" (our kernels) on CUDA in bf16 or fp16 for heads of at most 256 channels,
    "torch" (chunks of matrix products) for everything else. "fla" (flash-linear-attention) is taken only when named.
    """
    if length == 1:
        return "recurrent"
    fits = max(K, V) <= LARGEST_TILE and dtype in (bfloat16, float16)
    return "triton" if TRITON and device == "cuda" and fits else "torch"


def delta_rule(
    q_BTHK: Tensor,
    p_BTHK: Tensor,
    z_BTHV: Tensor,
    g: Tensor | None = None,
    *,
    e_BTHK: Tensor | None = None,
    strength_BTH: Tensor | None = None,
    state_BHKV: Tensor | None = None,
    segments: Tensor | None = None,
    chunk: int = 32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = (I - p_t ẽ_tᵀ) Diag(exp g_t) S_{t-1} + p_t z̃_tᵀ,  o_t = S_tᵀ q_t,  with ẽ = strength · e, z̃ = strength · z.

    The decay acts before the edit; the output reads the state after the write. The variants are special cases: the
    delta rule of arXiv 2406.06484 has p = e = k, z = v, strength β and no decay, 2412.06464 adds a decay a head,
    2510.26692 one a channel; 2605.22791 scales e and z by gates of their own.

    Args:
        q_BTHK: queries, already scaled.
        p_BTHK: addresses written to; normalised by the caller.
        z_BTHV: values written.
        g: log-decay <= 0, (B, T, H) for one a head, (B, T, H, K) for one a channel, None for none. It is not checked that
            none is positive.
        e_BTHK: addresses read for the erasure; default ``p_BTHK``.
        strength_BTH: factor on erasure and write; default 1.
        state_BHKV: state before the first token; default zeros. It belongs to the first token's document.
        segments: (B, T) document numbers; the state is emptied where the number changes.
        chunk: tokens in a chunk of the "torch" path, a power of two; changes speed and rounding only. 32 was the fastest on a CPU.
        backend: "auto" (see :func:`path`), or one of "recurrent", "torch", "triton", "fla". Never changed on an error.

    Returns:
        outputs (B, T, H, V) in the type of ``z``, and the state behind the last token (B, H, K, V), fp32 (fp64 for fp64).

    Raises:
        ValueError: when shapes do not belong together, or there is no such backend.
        RuntimeError: when the named backend cannot compute this call, with the reason.
    """
    B, T, H, K = _axes("q_BTHK", q_BTHK, "BTHK")
    V = _axes("z_BTHV", z_BTHV, "BTHV")[-1]
    size = {"B": B, "T": T, "H": H, "K": K, "V": V}
    _check("p_BTHK", p_BTHK, "BTHK", size)
    _check("z_BTHV", z_BTHV, "BTHV", size)
    _check("g", g, "BTH" if g is not None and g.dim() == 3 else "BTHK", size)
    _check("e_BTHK", e_BTHK, "BTHK", size)
    _check("strength_BTH", strength_BTH, "BTH", size)
    _check("state_BHKV", state_BHKV, "BHKV", size)
    _check("segments", segments, "BT", size)
    if T < 1:
        raise ValueError("delta_rule: got T=0; expected at least one token.")
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"delta_rule: chunk: got {chunk}; expected a power of two.")
    if backend == "auto":
        backend = path(q_BTHK.device.type, z_BTHV.dtype, length=T, K=K, V=V)
    elif backend not in PATHS:
        raise ValueError(f"delta_rule: backend: got {backend!r}; expected 'auto' or one of {', '.join(PATHS)}.")
    paths.note("delta_rule", backend)
    more: dict[str, Any] = {
        "e_BTHK": e_BTHK,
        "strength_BTH": strength_BTH,
        "state_BHKV": state_BHKV,
        "segments": segments,
    }
    if backend == "recurrent":
        return delta_rule_recurrent(q_BTHK, p_BTHK, z_BTHV, g, **more)
    if backend == "torch":
        return delta_rule_torch(q_BTHK, p_BTHK, z_BTHV, g, chunk=chunk, **more)
    if backend == "triton":
        if not TRITON:
            raise RuntimeError("delta_rule: backend='triton': there is no triton here. Take backend='torch'.")
        from workbench.ops.delta_rule.triton import delta_rule_triton  # only where it is used: it needs triton

        return delta_rule_triton(q_BTHK, p_BTHK, z_BTHV, g, **more)
    from workbench.ops.delta_rule.fla import delta_rule_fla

    return delta_rule_fla(q_BTHK, p_BTHK, z_BTHV, g, **more)


def _axes(name: str, tensor: Tensor, axes: str) -> tuple[int, ...]:
    if tensor.dim() != len(axes):
        raise ValueError(f"delta_rule: {name}: got shape {tuple(tensor.shape)}; expected the axes ({', '.join(axes)}).")
    return tuple(tensor.shape)


def _check(name: str, tensor: Tensor | None, axes: str, size: dict[str, int]) -> None:
    if tensor is not None and tuple(tensor.shape) != tuple(size[axis] for axis in axes):
        wanted = ", ".join(f"{axis}={size[axis]}" for axis in axes)
        raise ValueError(f"delta_rule: {name}: got shape {tuple(tensor.shape)}; expected ({wanted}).")
