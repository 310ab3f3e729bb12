"""Mixture of experts that drops tokens beyond an expert's capacity in training (arXiv 2101.03961): an arm to compare with.

An expert takes the first ``capacity`` times its fair share of a micro-batch's choices; further ones are lost, and the token
passes with fewer experts. What is dropped depends on the rows that are trained together, never on later tokens of the same row.
Evaluation and decoding drop nothing. Diagnostics say what was computed, after dropping. Accounting counts what training is
expected to compute where all experts are chosen alike (ours): min(1, capacity) of K_e experts a token, which nothing exceeds, since
no expert takes more than its capacity. Legend: as in moe.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.contract import AuxOutputs, Cost, feedforwards
from workbench.feedforwards.moe import MixtureOfExperts
from workbench.feedforwards.router import Routing
from workbench.ops.experts import sort_choices


@feedforwards.register
class CapacityMixtureOfExperts(MixtureOfExperts):
    """Top-K routed experts of limited capacity: training drops what does not fit."""

    conformance_cases = ({"capacity": 4.0},)  # four experts: nothing is dropped, as accounting counts

    class Config(MixtureOfExperts.Config):
        """Top-K mixture of experts that drops tokens in training."""

        kind: Literal["moe_capacity"] = "moe_capacity"  # type: ignore[assignment]
        capacity: Annotated[float, Field(gt=0)] = 1.25
        """Choices that one expert takes, as a multiple of its fair share."""

    def mix(self, x_ND: Tensor, routing: Routing, aux: AuxOutputs | None) -> Tensor:
        if not self.training:
            return super().mix(x_ND, routing, aux)
        config, routes, chosen_NK = self.config, routing.routes, routing.chosen_NK
        room = math.ceil(config.capacity * config.expected * len(x_ND) / config.experts)
        first_C = routes.counts.cumsum(0) - routes.counts
        real_NK = chosen_NK < config.experts
        dropped_NK = real_NK & (routes.row_NK - first_C[chosen_NK] >= room)
        nowhere = self.router.categories
        chosen_NK = torch.where(dropped_NK, nowhere, chosen_NK)
        kept = Routing(chosen_NK, torch.where(dropped_NK, 0.0, routing.gate_NK), sort_choices(chosen_NK, nowhere + 1))
        if aux is not None and aux.collect_metrics:
            kept_N = (real_NK & ~dropped_NK).sum(-1).to(routing.gate_NK.dtype)
            aux.metrics |= {
                "dropped_share": dropped_NK.sum() / real_NK.sum(),
                "ffn_experts": kept_N.mean(),
                "ffn_experts_sd": kept_N.std(correction=0),
            }
        return super().mix(x_ND, kept, aux)

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        cost = super().cost(config, width, length, element_bytes)
        dropped = (1 - min(1.0, config.capacity)) * config.expected
        return replace(cost, flops=cost.flops - dropped * 6 * width * config.hidden)
