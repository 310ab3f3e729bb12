"""Slow formulas of one sequence, term by term, for tests. They share no code with the fast paths.

Legend as in the package; R heads of one group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def block_bound(q_RK: Tensor, k_nK: Tensor) -> float:
    """Σ_h Σ_c max(q_hc max_j k_jc, q_hc min_j k_jc) over the keys of a block."""
    total = 0.0
    for q_K in q_RK.tolist():
        for c, number in enumerate(q_K):
            column = k_nK[:, c].tolist()
            total += max(number * max(column), number * min(column))
    return total


def block_masses(q_RK: Tensor, blocks: Sequence[Tensor], scale: float) -> list[float]:
    """Mean over heads of each block's softmax weight when its keys are replaced by their mean."""
    heads = []
    for q_K in q_RK:
        weights = [len(k_nK) * math.exp(scale * float(q_K @ k_nK.mean(0))) for k_nK in blocks]
        heads.append([weight / sum(weights) for weight in weights])
    return [sum(column) / len(heads) for column in zip(*heads)]


def token_weights(q_Rc: Tensor, keys: Sequence[Tensor], scale: float) -> list[float]:
    """Mean over heads of each key's softmax weight."""
    return block_masses(q_Rc, [key_c[None] for key_c in keys], scale)


def indexer_score(q_RK: Tensor, weights_R: Tensor, k_K: Tensor) -> float:
    """Σ_h w_h ReLU(q_h · k)"""
    return sum(
        weight * max(0.0, sum(x * y for x, y in zip(q_K, k_K.tolist())))
        for weight, q_K in zip(weights_R.tolist(), q_RK.tolist())
    )


def four_bits(x_c: Tensor) -> Tensor:
    """``x_c`` rounded to multiples of its largest magnitude over 7, which is rounded to fp16."""
    step = float((x_c.abs().max() / 7).half())
    return x_c.new_tensor([max(-7, min(7, round(number / step))) * step for number in x_c.tolist()])


def attention_over(
    q_K: Tensor,
    k_SK: Tensor,
    v_SV: Tensor,
    tokens: Sequence[int],
    scale: float,
    softcap: float = 0.0,
    sink: float | None = None,
) -> Tensor:
    """(V,) softmax attention over the rows ``tokens``."""
    scores = [scale * float(q_K @ k_SK[token]) for token in tokens]
    if softcap:
        scores = [softcap * math.tanh(score / softcap) for score in scores]
    total = sum(map(math.exp, scores)) + (0.0 if sink is None else math.exp(sink))
    return sum(
        (math.exp(score) / total * v_SV[token] for score, token in zip(scores, tokens)), v_SV.new_zeros(v_SV.shape[1])
    )
