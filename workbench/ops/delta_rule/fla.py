"""The delta rule through the kernels of flash-linear-attention (the extra `fla`), used only when named as the
backend.

Its functions and the cases they cover (version 0.6.0; scale 1, no normalisation inside):

    chunk_delta_rule        e = k, no decay                   chunk_gated_delta_rule   e = k, one decay per head
    chunk_kda               e = k, one decay per channel      chunk_dplr_delta_rule    everything else

The last computes S_t = Diag(exp gk) S_{t-1} + b (aᵀ S_{t-1}) + k vᵀ, where a reads the state *before* the decay: a =
exp(g) β e, b = -k, with β v for v. It is about twice as slow as the others. Inside a compiled block its functions break
the graph, which the workbench does not allow: train with `compile: false`.

Legend: B batch, T time, H heads, K key channels, V value channels, N documents of all rows.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from workbench.distribution import install_extra


def refusal(device: str) -> str | None:
    """Why flash-linear-attention cannot be used on this device; None if it may be tried. Imports nothing."""
    if device != "cuda":
        return f"its kernels need a CUDA device; the tensors are on {device}"
    missing = [name for name in ("triton", "fla") if find_spec(name) is None]
    return f"not installed: {', '.join(missing)} ({install_extra('fla')})" if missing else None


def delta_rule_fla(
    q_BTHK: Tensor,
    write_key_BTHK: Tensor,
    value_BTHV: Tensor,
    g: Tensor | None = None,
    *,
    erase_key_BTHK: Tensor | None = None,
    beta_BTH: Tensor | None = None,
    state_BHKV: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`workbench.ops.delta_rule.delta_rule`. Packed documents are counted, which synchronises with the device.

    Raises:
        RuntimeError: when flash-linear-attention is not installed or fails, with the reason.
    """
    reason = refusal(q_BTHK.device.type)
    if reason is not None:
        raise RuntimeError(f"delta_rule: backend='fla': {reason}. Use backend='auto'.")
    B, T, H, K = q_BTHK.shape
    dtype = value_BTHV.dtype
    q, k = q_BTHK.to(dtype), write_key_BTHK.to(dtype)
    options: dict[str, Any] = {"scale": 1.0, "output_final_state": True}
    state = None if state_BHKV is None else state_BHKV.float()
    last_B: Tensor | slice = slice(None)  # the last document of each row, whose final state is returned
    if segments is not None:
        starts_BT = torch.ones_like(segments, dtype=torch.bool)
        starts_BT[:, 1:] = segments[:, 1:] != segments[:, :-1]
        starts_N = starts_BT.flatten().nonzero()[:, 0]
        options["cu_seqlens"] = torch.cat((starts_N, starts_N.new_tensor([B * T])))
        last_B = starts_BT.sum(1).cumsum(0) - 1
        if state is not None:
            first_B = torch.cat((last_B.new_zeros(1), last_B[:-1] + 1))
            state = state.new_zeros(len(starts_N), *state.shape[1:]).index_copy(0, first_B, state)
    options["initial_state"] = state

    def row(x: Tensor) -> Tensor:  # with documents, all rows as one sequence
        return x if segments is None else x.flatten(0, 1)[None]

    if erase_key_BTHK is None:
        beta = value_BTHV.new_ones(B, T, H) if beta_BTH is None else beta_BTH.to(dtype)
        arguments = {"q": q, "k": k, "v": value_BTHV, "beta": beta}
        if g is None:
            module, name = "delta_rule", "chunk_delta_rule"
        else:
            arguments["g"] = g.float()
            module, name = ("gated_delta_rule", "chunk_gated_delta_rule") if g.dim() == 3 else ("kda", "chunk_kda")
    else:
        module, name = "generalized_delta_rule", "chunk_dplr_delta_rule"
        g = value_BTHV.new_zeros(B, T, H, 1, dtype=torch.float32) if g is None else g.float()
        g_BTHK = (g if g.dim() == 4 else g[..., None]).expand(B, T, H, K).contiguous()
        e, v = erase_key_BTHK, value_BTHV
        if beta_BTH is not None:
            e, v = beta_BTH[..., None] * e, (beta_BTH[..., None] * v).to(dtype)
        arguments = {"q": q, "k": k, "v": v, "a": (g_BTHK.exp() * e).to(dtype), "b": -k, "gk": g_BTHK}
    try:
        call = getattr(importlib.import_module(f"fla.ops.{module}"), name)
        out, final = call(**{name: row(x) for name, x in arguments.items()}, **options)
    except Exception as error:
        raise RuntimeError(f"delta_rule: backend='fla': {name}: {type(error).__name__}: {error}") from error
    return out.view(B, T, H, -1).to(dtype), final[last_B]
