"""Plain torch, for memory that the host addresses. Legend as in the package."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.ops.block_transfer.layout import TAILS, Tables


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


def store_tails(rows_BTGX: Tensor, hot_BGSbX: Tensor, start_B: Tensor) -> None:
    (_, T, G, _), (S, block), device = rows_BTGX.shape, hot_BGSbX.shape[2:4], rows_BTGX.device
    kept = min(T, TAILS * block)
    position_BT = start_B[:, None] + torch.arange(T - kept, T, device=device)
    end_B1 = start_B[:, None] + T
    is_tail = position_BT // block > (end_B1 - 1) // block - TAILS
    # rows of earlier blocks repeat the newest row
    position_BT = position_BT.where(is_tail, end_B1 - 1)
    rows_BTGX = torch.where(is_tail[..., None, None], rows_BTGX[:, T - kept :], rows_BTGX[:, -1:])
    sequence, group = torch.arange(len(start_B), device=device)[:, None, None], torch.arange(G, device=device)
    slot_BT1 = (S - TAILS + position_BT // block % TAILS)[..., None]
    hot_BGSbX[sequence, group, slot_BT1, (position_BT % block)[..., None]] = rows_BTGX.to(hot_BGSbX.dtype)


def plan_copies(
    tables: Tables, wanted_BGm: Tensor, newest_B: Tensor, keep: bool, reuse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    slot_of_BGN, block_of_BGS, wanted_at_BGS, clock_BG = tables
    N, S = slot_of_BGN.shape[-1] - 1, block_of_BGS.shape[-1] - 1

    def drop(blocks_BGx: Tensor) -> None:  # forget the slots of these blocks, -1 for none
        slot_of_BGN.scatter_(-1, blocks_BGx.where(blocks_BGx >= 0, N), -1)

    exists = wanted_BGm >= 0
    valid = exists & (wanted_BGm <= newest_B[:, None, None] - TAILS)
    wanted_BGm = wanted_BGm.where(valid, N)
    if not reuse:
        slot_of_BGN.fill_(-1)
        block_of_BGS.fill_(-1)
    slot_BGm = slot_of_BGN.gather(-1, wanted_BGm)
    is_hit = valid & (slot_BGm >= 0)
    is_missing = valid & ~is_hit
    is_kept_BGS = torch.zeros_like(block_of_BGS, dtype=torch.bool)
    is_kept_BGS.scatter_(-1, slot_BGm.where(is_hit, S), True)
    if not keep:
        drop(block_of_BGS.masked_fill(is_kept_BGS, -1))
        block_of_BGS.masked_fill_(~is_kept_BGS, -1)
    age_BGS = wanted_at_BGS.masked_fill(block_of_BGS < 0, -1)
    age_BGS = age_BGS.masked_fill(is_kept_BGS, torch.iinfo(torch.int64).max)[..., :S]
    oldest_BGS = age_BGS.sort(dim=-1, stable=True).indices  # empty slots, then the least recently wanted
    # of these as many as are missing, in ascending order
    is_later_BGS = torch.arange(S, device=oldest_BGS.device) >= is_missing.sum(-1, keepdim=True)
    free_BGS = oldest_BGS.masked_fill(is_later_BGS, S).sort(dim=-1).values
    rank_BGm = (is_missing.cumsum(-1) - 1).clamp_(0, S - 1)
    target_BGm = free_BGS.gather(-1, rank_BGm).where(is_missing, S)
    drop(block_of_BGS.gather(-1, target_BGm).where(is_missing, -1))
    block_of_BGS.scatter_(-1, target_BGm, wanted_BGm)
    slot_of_BGN.scatter_(-1, wanted_BGm.where(is_missing, N), target_BGm)
    clock_BG += 1
    at_BGm = clock_BG[..., None].expand_as(target_BGm)
    wanted_at_BGS.scatter_(-1, torch.where(is_hit, slot_BGm, target_BGm), at_BGm)
    block_of_BGS[..., S], slot_of_BGN[..., N] = -1, -1
    return wanted_BGm.where(is_missing, -1), target_BGm, torch.stack((exists.sum(-1), is_missing.sum(-1)))


def slots_of_blocks(tables: Tables, newest_B: Tensor) -> Tensor:
    slots_BGN, S = tables.slot_of_BGN[..., :-1].clone(), tables.block_of_BGS.shape[-1] - 1
    tail_BT = newest_B[:, None] - torch.arange(TAILS, device=newest_B.device)
    # a sequence of a single block has no other: its slot is written twice
    tail_BT = tail_BT.clamp_min(0)
    tail_BGT = tail_BT[:, None].expand(-1, slots_BGN.shape[1], -1)
    return slots_BGN.scatter_(-1, tail_BGT, S + tail_BGT % TAILS)
