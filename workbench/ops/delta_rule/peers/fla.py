"""flash-linear-attention (the extra `fla`), used only where it is named: in every case that was measured it is slower
than our kernels, and it tunes itself for minutes at first use.

Its functions and the cases they cover (version 0.6.0; scale 1, no normalisation inside):

    chunk_delta_rule        e = k, no decay                   chunk_gated_delta_rule   e = k, one decay per head
    chunk_kda               e = k, one decay per channel      chunk_dplr_delta_rule    everything else

The last computes S_t = Diag(exp gk) S_{t-1} + b (aᵀ S_{t-1}) + k vᵀ, where a reads the state *before* the decay: a =
exp(g) β e, b = -k, with β v for v. It is about twice as slow as the others.

Legend: B batch, T time, H heads, K key channels, V value channels, N documents of all rows.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from workbench.ops.delta_rule.peers import Peer
from workbench.ops.delta_rule.peers.documents import Sequences


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
    """As :func:`workbench.ops.delta_rule.delta_rule`."""
    B, T, H, K = q_BTHK.shape
    dtype = value_BTHV.dtype
    q, k = q_BTHK.to(dtype), write_key_BTHK.to(dtype)
    sequences = Sequences(segments, state_BHKV)
    options: dict[str, Any] = {"scale": 1.0, "output_final_state": True, "initial_state": sequences.state_NHKV}
    if sequences.ends_N1 is not None:
        options["cu_seqlens"] = sequences.ends_N1
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
    call = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    out, final = call(**{name: sequences.one_row(x) for name, x in arguments.items()}, **options)
    return out.view(B, T, H, -1).to(dtype), final[sequences.last_B]


PEERS = (
    Peer(
        name="fla",
        modules=("triton", "fla"),
        distribution="fla-core",
        extra="fla",
        compute=delta_rule_fla,
        erase=True,
    ),
)
