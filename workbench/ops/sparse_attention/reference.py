"""Compression, selection and window attention of one document by plain loops: the definition (arXiv 2502.11089, §3).

Independent of the fast forms: explicit sets of tokens, one query and one group at a time. Legend: T positions, N
compression blocks, H query heads, G key–value heads, R = H / G, K key channels, V value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compression_blocks(p: int, T: int, length: int, stride: int) -> list[int]:
    """Pooled blocks that end at or before position p."""
    return [i for i in range(T) if i * stride + length - 1 <= p]


def importance(p_cmp: dict[int, Tensor], length: int, stride: int, block: int, j: int) -> float:
    """Score of selection block j: for each of its tokens, the probabilities of the pooled blocks that contain it, over
    the stride."""
    tokens = range(j * block, (j + 1) * block)
    overlap = {i: sum(i * stride <= t < i * stride + length for t in tokens) for i in p_cmp}
    return sum(float(p_cmp[i].detach()) * overlap[i] / stride for i in p_cmp if overlap[i])


def select_reference(
    q_THK: Tensor,
    ck_NGK: Tensor,
    *,
    length: int,
    stride: int,
    block: int,
    count: int,
    initial: int,
    local: int,
    scale: float,
    reuse: int = 1,
) -> list[list[list[int]]]:
    """``count`` blocks for each position and group, ascending: the ``initial`` first and ``local`` last ones, then the
    best."""
    T, H = q_THK.shape[:2]
    G = ck_NGK.shape[1]
    R = H // G
    chosen: list[list[list[int]]] = []
    for p in range(T):
        if p % reuse:
            chosen.append(chosen[-1])
            continue
        visible, query_block = compression_blocks(p, T, length, stride), p // block
        groups = []
        for g in range(G):
            score = dict.fromkeys(range(query_block + 1), 0.0)
            for h in range(g * R, (g + 1) * R):
                if visible:
                    weights = (torch.stack([q_THK[p, h] @ ck_NGK[i, g] for i in visible]) * scale).softmax(0)
                    p_cmp = dict(zip(visible, weights))
                    for j in score:
                        score[j] += importance(p_cmp, length, stride, block, j)
            forced = [j for j in score if j < initial or j > query_block - local]
            free = sorted((j for j in score if j not in forced), key=lambda j: (-score[j], j))
            groups.append(sorted([*forced, *free][:count]))
        chosen.append(groups)
    return chosen


def _attend(q_K: Tensor, k_SK: Tensor, v_SV: Tensor, scale: float) -> Tensor:
    return ((k_SK @ q_K) * scale).softmax(0) @ v_SV if len(k_SK) else v_SV.sum(0) + 0 * q_K.sum()


def attend_reference(q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, keys: list[list[list[int]]], scale: float) -> Tensor:
    """(T, H, V): position t attends in group g over the rows ``keys[t][g]`` of k and v; zero where it has no rows."""
    T, H = q_THK.shape[:2]
    R = H // k_SGK.shape[1]
    heads = [
        _attend(q_THK[t, h], k_SGK[keys[t][h // R], h // R], v_SGV[keys[t][h // R], h // R], scale)
        for t in range(T)
        for h in range(H)
    ]
    return torch.stack(heads).view(T, H, -1)


def selected_tokens(chosen: list[list[list[int]]], block: int) -> list[list[list[int]]]:
    """The tokens s ≤ p of the chosen blocks."""
    return [
        [
            sorted({s for j in blocks if j >= 0 for s in range(j * block, (j + 1) * block) if s <= p})
            for blocks in groups
        ]
        for p, groups in enumerate(chosen)
    ]


def window_tokens(T: int, G: int, window: int) -> list[list[list[int]]]:
    """The last ``window`` tokens, the query's own included."""
    return [[[s for s in range(p + 1) if p - s < window]] * G for p in range(T)]
