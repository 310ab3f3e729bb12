"""Index scores, selection and divergence of one document: the definition (arXiv 2512.02556, §2.1), with every T × T
matrix, in the precision of the input.

Independent of the fast forms. Legend: T positions, J index heads, X index channels, H query heads, G key–value heads, K
key channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def index_scores(q_TJX: Tensor, k_TX: Tensor, w_TJ: Tensor) -> Tensor:
    """(T, T) I_{t,s} = Σ_j w_{t,j} ReLU(q_{t,j} · k_s)."""
    return sum(w_TJ[:, j, None] * torch.relu(q_TJX[:, j] @ k_TX.T) for j in range(q_TJX.shape[1]))  # type: ignore[return-value]


def select_reference(scores_TT: Tensor, count: int, initial: int = 0, local: int = 0) -> list[list[int]]:
    """The tokens of each position, ascending: the ``initial`` first and ``local`` last ones, then the best, of equal
    ones the first."""
    chosen = []
    for t, scores_T in enumerate(scores_TT.tolist()):
        forced = [s for s in range(t + 1) if s < initial or s > t - local]
        free = sorted((s for s in range(t + 1) if s not in forced), key=lambda s: (-scores_T[s], s))
        chosen.append(sorted([*forced, *free][:count]))
    return chosen


def mean_attention(q_THK: Tensor, k_TGK: Tensor, tokens: list[list[int]], scale: float) -> Tensor:
    """(T, T) softmax over the tokens of each position, the mean over the heads; zero elsewhere."""
    (T, H, _), G = q_THK.shape, k_TGK.shape[1]
    p_TT = q_THK.new_zeros(T, T)
    for t, seen in enumerate(tokens):
        for h in range(H):
            scores = scale * k_TGK[seen, h * G // H] @ q_THK[t, h]
            p_TT[t, seen] += scores.softmax(0).detach() / H
    return p_TT


def divergence_reference(scores_TT: Tensor, p_TT: Tensor, tokens: list[list[int]]) -> Tensor:
    """(T,) KL(p_t ‖ softmax of the scores over the tokens of t)."""
    of_t = []
    for scores_T, p_T, seen in zip(scores_TT, p_TT, tokens):
        p = p_T[seen]
        of_t.append((torch.special.xlogy(p, p) - p * scores_T[seen].log_softmax(0)).sum())
    return torch.stack(of_t)
