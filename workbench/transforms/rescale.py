"""Pairs rescaled by numbers that are given: the control of :mod:`workbench.transforms.wisca`."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.contract import RescalingPair
from workbench.transforms.base import Weights, transforms
from workbench.transforms.pairs import PairConfig, PairRescaling


@transforms.register
class Rescale(PairRescaling):
    """Multiplies the first side of a pair by a number and divides the second by it: another initial scale of queries
    against keys, by hand. Definition ours."""

    conformance_cases = (
        {"source": {}, "config": {"scales": {"qk": 0.5, "vo": 2.0}}},
        {"source": {"pattern": "mla"}, "config": {"scales": {"qk": 0.7, "up_down": 3.0}, "state": "rescale"}},
    )

    names_field = "scales"

    class Config(PairConfig):
        """Rescale pairs by given numbers."""

        kind: Literal["rescale"] = "rescale"
        scales: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
        """Pair -> number that multiplies its first side: {qk: 0.5, vo: 2}."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.config.scales)

    def scales(self, pair: RescalingPair, weights: Weights) -> Tensor:
        return torch.full((len(pair.heads),), self.config.scales[pair.name], dtype=torch.float64)
