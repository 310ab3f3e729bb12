"""Mixture of experts with limited expert capacity (arXiv 2101.03961): a baseline that drops tokens in training.

An expert takes the first ``capacity`` times its fair share of the choices of a micro-batch on its device, as published;
further choices are dropped, and the token passes with fewer experts. So what is trained depends on ``accumulate`` and
on the number of devices. What is dropped depends on the rows trained together, never on later tokens of the
same row. Evaluation and decoding drop nothing. Diagnostics count what is computed after dropping. Accounting assumes
that all experts are chosen equally often (ours): min(1, capacity) of K_e experts per token, an upper bound, since no
expert takes more than its capacity.

Legend: as in moe.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.contract import AuxOutputs, Cost, feedforwards
from workbench.feedforwards.moe import MixtureOfExperts
from workbench.feedforwards.router import Routing
from workbench.ops.experts import sort_choices
from workbench.pooled import Mean, deviation_of, mean_of


@feedforwards.register
class CapacityMixtureOfExperts(MixtureOfExperts):
    """Top-K routed experts of limited capacity: training drops choices beyond it."""

    conformance_cases = ({"capacity": 4.0},)  # four experts: nothing is dropped, as accounting assumes

    class Config(MixtureOfExperts.Config):
        """Top-K mixture of experts that drops tokens in training."""

        kind: Literal["moe_capacity"] = "moe_capacity"  # type: ignore[assignment]
        capacity: Annotated[float, Field(gt=0)] = 1.25
        """Choices that one expert takes, as a multiple of its fair share."""

    def mix(self, x_ND: Tensor, routing: Routing, aux: AuxOutputs | None) -> Tensor:
        if not self.training:
            return super().mix(x_ND, routing, aux)
        config, routes, ids_NK = self.config, routing.routes, routing.topk_expert_ids_NK
        num_candidates = self.router.num_candidates
        tokens = routes.counts[:num_candidates].sum().double() / config.top_k
        capacity = (config.capacity * config.expected_experts * tokens / config.experts).ceil()
        first_row_C = routes.counts.cumsum(0) - routes.counts
        is_expert_NK = ids_NK < config.experts
        dropped_NK = is_expert_NK & (routes.row_NK - first_row_C[ids_NK] >= capacity)
        ids_NK = torch.where(dropped_NK, num_candidates, ids_NK)
        scores_NK = torch.where(dropped_NK, 0.0, routing.topk_scores_NK)
        if aux is not None and aux.collect_metrics:
            experts_N, valid_N = (is_expert_NK & ~dropped_NK).sum(-1), routing.topk_expert_ids_NK[:, 0] < num_candidates
            aux.metrics |= {
                "dropped_share": Mean(dropped_NK.sum(), is_expert_NK.sum()),
                "ffn_experts": mean_of(experts_N, valid_N),
                "ffn_experts_sd": deviation_of(experts_N, valid_N),
            }
        return super().mix(x_ND, Routing(ids_NK, scores_NK, sort_choices(ids_NK, num_candidates + 1)), aux)

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        cost = super().cost(config, width, length, element_bytes)
        dropped_experts = (1 - min(1.0, config.capacity)) * config.expected_experts
        return replace(cost, flops=cost.flops - dropped_experts * 6 * width * config.hidden)
