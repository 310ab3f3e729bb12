"""What a feed-forward must do, checked on the CPU with fresh random input.

Legend: B batch, T time, D model width.
"""

from __future__ import annotations

from typing import Any

import torch

from workbench.contract import AuxOutputs, feedforwards
from workbench.testing.component import VariantConformance
from workbench.testing.measure import assert_close


class FeedForwardConformance(VariantConformance):
    """Checks for a feed-forward: what :class:`VariantConformance` asks, and that tokens stay by themselves."""

    registry = feedforwards

    def test_tokens_are_independent(self, case: dict[str, Any]) -> None:
        if not self.component().capabilities.causal:
            return
        module, x_BTD = self.build(case), self.random(2, 19)
        before = module(x_BTD)
        changed = x_BTD.clone()
        changed[0, 7] = self.random(1)[0]
        after = module(changed)
        others = torch.ones(2, 19, dtype=torch.bool)
        others[0, 7] = False
        assert_close(after[others], before[others], "tokens beside a changed one")

    def test_auxiliary_losses_are_finite_scalars(self, case: dict[str, Any]) -> None:
        aux = AuxOutputs()
        self.build(case)(self.random(2, 19), aux=aux)
        assert all(loss.dim() == 0 and loss.isfinite() for loss in aux.losses)
