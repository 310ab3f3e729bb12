"""Mixture of experts that drops tokens beyond an expert's capacity in training (arXiv 2101.03961): an arm to compare with.

An expert takes the first ``capacity`` times its fair share of a micro-batch's choices; further ones are lost, and the token
passes with fewer experts. What is dropped depends on the rows that are trained together, never on later tokens of the same row.
Evaluation and decoding drop nothing. FLOPs are counted as if nothing were dropped. Legend: as in moe.py.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.contract import Side, feedforwards
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

    def mix(self, x_ND: Tensor, routing: Routing, side: Side | None) -> Tensor:
        if not self.training:
            return super().mix(x_ND, routing, side)
        config, routes, chosen_NK = self.config, routing.routes, routing.chosen_NK
        room = math.ceil(config.capacity * config.expected * len(x_ND) / config.experts)
        first_C = routes.counts.cumsum(0) - routes.counts
        real_NK = chosen_NK < config.experts
        dropped_NK = real_NK & (routes.row_NK - first_C[chosen_NK] >= room)
        nowhere = self.router.categories
        chosen_NK = torch.where(dropped_NK, nowhere, chosen_NK)
        kept = Routing(chosen_NK, torch.where(dropped_NK, 0.0, routing.gate_NK), sort_choices(chosen_NK, nowhere + 1))
        if side is not None and side.watch:
            side.metrics["dropped_share"] = dropped_NK.sum() / real_NK.sum()
        return super().mix(x_ND, kept, side)
