"""Control for zero-computation experts: how many a token gets, and which, is random, with the same mean.

The number of a token's zero-computation experts is binomial, limited to what E and Z allow, with mean K - K_e; the
remaining choices are its best-scored experts. Only the difference to `moe` shows that the router's choice is worth
something. The random numbers are hashed from the router's logits, so that a recomputed forward pass draws the same.

Legend: as in router.py.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.contract import feedforwards
from workbench.feedforwards.moe import MixtureOfExperts
from workbench.feedforwards.router import Router


class RandomZeroRouter(Router):
    """Chooses the best experts and random zero-computation experts."""

    def __init__(self, config: Any, width: int):
        super().__init__(config, width)
        E, Z, K = config.experts, config.zero_experts, config.top_k
        self.zero_probability = binomial_probability(K, max(0, K - E), Z, K - config.expected_experts)

    def select(self, scores_NC: Tensor, logits_NC: Tensor) -> Tensor:
        E, Z, K = self.config.experts, self.config.zero_experts, self.config.top_k
        scores_for_choice_NC = scores_NC if self.bias is None else scores_NC + self.bias
        uniform_NC = hashed_uniform(logits_NC)
        num_zero_N1 = (uniform_NC[:, :K] < self.zero_probability).sum(-1, keepdim=True).clamp(K - E, Z)
        rank_K = torch.arange(K, device=logits_NC.device)
        best_NK = scores_for_choice_NC[:, :E].topk(min(K, E), dim=-1).indices[:, rank_K.clamp_max(E - 1)]
        zero_NK = uniform_NC[:, E:].topk(min(K, Z), dim=-1).indices[:, (K - 1 - rank_K).clamp_max(Z - 1)] + E
        return torch.where(rank_K < K - num_zero_N1, best_NK, zero_NK)


@feedforwards.register
class RandomZeroExperts(MixtureOfExperts):
    """Mixture of experts with randomly assigned zero-computation experts."""

    router_class = RandomZeroRouter
    conformance_cases = ({"zero_experts": 2, "top_k": 6},)  # all of them, so that the FLOPs are exact

    class Config(MixtureOfExperts.Config):
        """Top-K mixture of experts whose zero-computation experts are assigned at random."""

        kind: Literal["moe_random_zero"] = "moe_random_zero"  # type: ignore[assignment]

        zero_experts: Annotated[int, Field(ge=1)] = 4
        """Zero-computation experts Z: their output is their input."""


@cache
def binomial_probability(trials: int, low: int, high: int, mean: float) -> float:
    """p for which a binomial variable of ``trials`` trials, clamped to [low, high], has this mean (by bisection)."""
    lower, upper = 0.0, 1.0
    for _ in range(60):
        p = (lower + upper) / 2
        weights = [math.comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(trials + 1)]
        clamped_mean = sum(w * min(max(i, low), high) for i, w in enumerate(weights))
        lower, upper = (p, upper) if clamped_mean < mean else (lower, p)
    return (lower + upper) / 2


def hashed_uniform(logits_NC: Tensor) -> Tensor:
    """Pseudo-random numbers in [0, 1) from the bits of the logits, fp64."""
    bits = logits_NC.float().contiguous().view(torch.int32).long()
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B & 0x7FFFFFFF), (16, 0x9E3779B)):
        bits = ((bits & 0xFFFFFFFF) ^ ((bits & 0xFFFFFFFF) >> shift)) * factor
    return (bits & 0xFFFFFF).double() / 2**24
