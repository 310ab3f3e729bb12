"""Plain torch, for memory that the host addresses. Legend as in the package."""

from __future__ import annotations

import torch
from torch import Tensor


def fetch_blocks(host_BGNbX: Tensor, hot_BGSbX: Tensor, blocks_BGm: Tensor, slots_BGm: Tensor) -> None:
    is_copied = blocks_BGm >= 0
    B, G, m = blocks_BGm.shape
    S = hot_BGSbX.shape[2]
    # every slot takes the entry that names it, or keeps what it has: no shape depends on the number of copies
    entry_BGS = torch.full((B, G, S + 1), m, dtype=torch.int64, device=blocks_BGm.device)
    number_m = torch.arange(m, device=blocks_BGm.device).expand(B, G, m)
    entry_BGS.scatter_(-1, slots_BGm.where(is_copied, S), number_m)
    entry_BGS = entry_BGS[..., :S]
    source_BGS = torch.nn.functional.pad(blocks_BGm, (0, 1), value=-1).gather(-1, entry_BGS)
    sequence = torch.arange(B)[:, None, None]
    group = torch.arange(G)[None, :, None]
    fetched = host_BGNbX[sequence, group, source_BGS.clamp_min(0)]
    hot_BGSbX.copy_(
        torch.where((source_BGS >= 0)[..., None, None] & (entry_BGS < m)[..., None, None], fetched, hot_BGSbX)
    )


def store_rows(rows_BTGX: Tensor, host_BGNbX: Tensor, start_B: Tensor, lengths_B: Tensor) -> None:
    B, T, G, _ = rows_BTGX.shape
    block, capacity = host_BGNbX.shape[3], host_BGNbX.shape[2] * host_BGNbX.shape[3]
    position_BT = start_B[:, None] + torch.arange(T)
    is_padding = position_BT >= lengths_B[:, None]
    at_BT = position_BT.clamp_max(capacity - 1)
    index = (
        torch.arange(B)[:, None, None],
        torch.arange(G)[None, None],
        at_BT[..., None] // block,
        at_BT[..., None] % block,
    )
    rows = rows_BTGX.to(host_BGNbX.dtype)
    host_BGNbX[index] = torch.where(is_padding[..., None, None], host_BGNbX[index], rows) if T > 1 else rows
