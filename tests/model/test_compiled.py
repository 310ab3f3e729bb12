"""The compiled model on a CUDA device has the gradients of the plain one: layer by layer, where an error would grow."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
import torch

from workbench.contract import mixers
from workbench.model import LanguageModel, ModelConfig


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", sorted(mixers))
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_gradients_are_those_of_the_plain_model(pattern: str, packed: bool) -> None:
    """Both are compared with fp64. The error of bf16 alone depends on the tensor: a quarter for a decay rate, which
    sums nearly cancelling terms, a hundredth for a projection. So the plain model in bf16 sets the tolerance: its
    largest error of that tensor over the layers, since the error of one tensor is a single draw (eight numbers in a
    decay rate)."""
    torch._dynamo.reset()
    config = ModelConfig(width=256, depth=12, vocabulary=1000, pattern=pattern)
    tokens_BT = torch.randint(1000, (2, 1024), device="cuda")
    segments_BT = (torch.rand(2, 1024, device="cuda") < 1 / 100).int().cumsum(1).int() if packed else None

    def gradients(dtype: torch.dtype, *, compiled: bool = False) -> dict[str, torch.Tensor]:
        model = LanguageModel(config, seed=0).cuda().to(dtype)
        if compiled:
            model.compile_blocks()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype != torch.float64):
            model.loss(tokens_BT, tokens_BT.roll(-1, 1), segments=segments_BT).backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    exact, plain, compiled = gradients(torch.float64), gradients(torch.float32), gradients(torch.float32, compiled=True)

    def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
        # a bias common to all pooled keys changes no softmax: its gradient is rounding, or zero
        return float((got - wanted).norm() / wanted.norm().clamp_min(1e-5))

    allowed: dict[str, float] = defaultdict(float)
    for name, wanted in exact.items():
        kind = re.sub(r"^blocks\.\d+", "", name)
        allowed[kind] = max(allowed[kind], 1.5 * error(plain[name], wanted) + 0.02)
    for name, wanted in exact.items():
        got, most = error(compiled[name], wanted), allowed[re.sub(r"^blocks\.\d+", "", name)]
        assert got < most, f"{name}: relative error {got:.1e}; that of the plain model allows {most:.1e}"
