"""The compiled model on a CUDA device has the gradients of the plain one: layer by layer, where an error would grow."""

from __future__ import annotations

import pytest
import torch

from workbench.contract import mixers
from workbench.model import LanguageModel, ModelConfig


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pattern", sorted(mixers))
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_gradients_are_those_of_the_plain_model(pattern: str, packed: bool) -> None:
    torch._dynamo.reset()
    config = ModelConfig(width=256, depth=12, vocabulary=1000, pattern=pattern)
    tokens_BT = torch.randint(1000, (2, 1024), device="cuda")
    segments_BT = (torch.rand(2, 1024, device="cuda") < 1 / 100).int().cumsum(1).int() if packed else None

    def gradients(compiled: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = LanguageModel(config, seed=0).cuda().to(dtype)
        if compiled:
            model.compile_blocks()
        with torch.autocast("cuda", torch.bfloat16, enabled=compiled):
            model.loss(tokens_BT, tokens_BT.roll(-1, 1), segments=segments_BT).backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    exact = gradients(False, torch.float64)
    for name, gradient in gradients(True, torch.float32).items():
        error = float((gradient - exact[name]).norm() / exact[name].norm())
        assert error < 0.05, f"{name}: relative error {error:.1e}"
