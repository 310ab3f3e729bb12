"""What is logged about routing on diagnostic steps, from scores and choices and from counts.

Legend: N tokens, C candidates (experts, then zero-computation experts), E experts, K choices per token, D model width.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import torch.nn.functional as F
from torch import Tensor

from workbench.pooled import Pooled, deviation_of, maximum_of, mean_of

COLLAPSED = 0.5
"""A router has collapsed when more than this fraction of its experts got no token since the last diagnostics. Ours."""


def routing_metrics(
    logits_NC: Tensor,
    probability_NC: Tensor,
    topk_expert_ids_NK: Tensor,
    weight_CD: Tensor,
    num_experts: int,
    valid_N: Tensor | None = None,
) -> dict[str, Pooled]:
    """Numbers over the tokens of a micro-batch. Inputs are detached; ``probability_NC`` sums to one per token.

    Args:
        valid_N: where there is a token and no padding. Default: everywhere.
    """
    experts_N = (topk_expert_ids_NK < num_experts).sum(-1)
    rows_CD, C = F.normalize(weight_CD, dim=-1), len(weight_CD)
    return {
        "routing_entropy": mean_of(-(probability_NC * probability_NC.clamp_min(1e-20).log()).sum(-1), valid_N),
        "top_k_mass": mean_of(probability_NC.gather(1, topk_expert_ids_NK).sum(-1), valid_N),
        "ffn_experts": mean_of(experts_N, valid_N),
        "ffn_experts_sd": deviation_of(experts_N, valid_N),
        "router_cosine": mean_of((rows_CD.sum(0).square().sum() - C) / max(1, C * (C - 1))),
        "router_logit_max": maximum_of(logits_NC.amax(-1), valid_N),
        "router_z": mean_of(logits_NC.logsumexp(-1).square(), valid_N),
    }


def load_metrics(counts_C: Tensor, recent_counts_C: Tensor, num_experts: int) -> dict[str, Tensor]:
    """Expert load of a step and since the last diagnostics, with the floor that perfect balance shows by chance.

    ``load`` (E,) is relative to the mean, ``max_violation_*`` its maximum minus 1 (MaxVio of arXiv 2408.15664).
    """
    values: dict[str, Tensor] = {}
    for window, counts in (("step", counts_C), ("recent", recent_counts_C)):
        experts_E = counts.double()[:num_experts]
        load_E = experts_E / experts_E.mean().clamp_min(1e-9)
        values[f"max_violation_{window}"] = load_E.max() - 1
        values[f"max_violation_floor_{window}"] = expected_normal_maximum(num_experts) / experts_E.mean().sqrt()
    recent_C = recent_counts_C.double()
    share_E = recent_C[:num_experts] / recent_C[:num_experts].sum().clamp_min(1)
    dead_experts = (recent_C[:num_experts] == 0).sum()
    return values | {
        "load": load_E,
        "load_entropy": -(share_E * share_E.clamp_min(1e-20).log()).sum(),
        "dead_experts": dead_experts,
        "collapsed": (dead_experts > COLLAPSED * num_experts).double(),
        "zero_share": recent_C[num_experts:].sum() / recent_C.sum(),
    }


def bias_metrics(bias_E: Tensor) -> dict[str, Tensor]:
    """Range and spread of the experts' selection bias."""
    return {"bias_low": bias_E.min(), "bias_high": bias_E.max(), "bias_sd": bias_E.std(correction=0)}


def gradient_ratios(
    balance_gradient_C: Tensor, loss_gradient_C: Tensor, mean_probability_C: Tensor
) -> dict[str, Tensor]:
    """R_g (arXiv 2509.01322, eq. 9): gradient norm of the balance loss over that of the training loss.

    Both gradients are with respect to the mean probabilities. A constant vector has no effect through a softmax but
    counts in R_g; ``r_g_centred`` (ours) removes it.
    """

    def centred(gradient_C: Tensor) -> Tensor:
        return gradient_C - (mean_probability_C * gradient_C).sum()

    return {
        "r_g": balance_gradient_C.norm() / loss_gradient_C.norm(),
        "r_g_centred": centred(balance_gradient_C).norm() / centred(loss_gradient_C).norm(),
    }


@cache
def expected_normal_maximum(count: int) -> float:
    """Expected maximum of ``count`` independent standard normal variables."""
    steps = [i / 500 - 8 + 0.001 for i in range(8000)]
    normal = NormalDist()
    return sum(x * count * normal.pdf(x) * normal.cdf(x) ** (count - 1) for x in steps) / 500
