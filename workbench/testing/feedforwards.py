"""What a feed-forward must do, checked on the CPU with fresh random input.

Legend: B batch, T time, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from workbench.contract import AuxOutputs, feedforwards
from workbench.model.experts import distribute_experts
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

    def test_experts_can_be_distributed(self, case: dict[str, Any]) -> None:
        """With experts as DTensors of a single rank, the layer computes what it computes with whole experts."""
        experts = self.component().num_experts(self.config(case))
        if not experts or dist.is_initialized():
            return
        x_BTD, dy_BTD = self.random(2, 19), self.random(2, 19)
        expected = _output_and_gradients(self.build(case), x_BTD, dy_BTD)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            module = self.build(case)
            distributed = distribute_experts(module, init_device_mesh("cpu", (1,)))
            lengths = {len(parameter) for parameter in distributed}
            assert lengths == {experts}, f"num_experts gives {experts}; experts are stacks of {sorted(lengths)}"
            try:
                values = _output_and_gradients(module, x_BTD, dy_BTD)
            except RuntimeError as error:
                raise AssertionError(f"experts are not passed on to the operator as they are stored: {error}") from None
        finally:
            dist.destroy_process_group()
        for name, value in values.items():
            assert_close(value, expected[name], f"{name} with distributed experts")


def _output_and_gradients(module: Any, x_BTD: Tensor, dy_BTD: Tensor) -> dict[str, Tensor]:
    y_BTD = module(x_BTD)
    (y_BTD * dy_BTD).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    local = {name: grad.to_local() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}
    return {"output": y_BTD.detach(), **{f"gradient of {name}": gradient for name, gradient in local.items()}}
