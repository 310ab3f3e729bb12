"""The kernels of sparse attention against the chunked form, and layers compiled with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import in_interpreter

from workbench.model import LanguageModel, ModelConfig

pytestmark = pytest.mark.compile

SCRIPT = Path(__file__).with_name("sparse_kernels.py")


def test_the_kernels_in_the_interpreter_are_the_chunked_form() -> None:
    printed = in_interpreter(str(SCRIPT), str(torch.initial_seed()), "cpu", "small,16 bits", "float32")
    assert "kernels agree" in printed, printed[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", ["small", "long", "pooled", *map(str, range(6))])  # minutes of compiling: for xdist
def test_on_the_device_the_kernels_are_the_chunked_form(part: str, dtype: str) -> None:
    call = [sys.executable, str(SCRIPT), str(torch.initial_seed()), "cuda", part, dtype]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert "kernels agree" in done.stdout, done.stderr[-3000:]


SMALL: dict[str, Any] = {
    "nsa": {
        "heads": 4,
        "kv_heads": 1,
        "compress_length": 32,
        "compress_stride": 16,
        "select_block": 64,
        "select_blocks": 4,
    },
    "asa_global": {"heads": 8, "latents": 2, "block": 16, "select_blocks": 8},
    "asa_local": {"heads": 4, "window": 100},
    "moba": {"heads": 4, "kv_heads": 2, "block": 64, "top_k": 3},
    "dsa": {"heads": 4, "kv_heads": 2, "top_k": 64, "index_heads": 2, "index_dim": 32},
    "lsa": {"heads": 4, "kv_heads": 1, "top_k": 64, "sink_tokens": 4, "window_tokens": 20, "index_heads": 2},
}


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pattern", list(SMALL))
def test_compiled_gradients_are_those_of_the_plain_model(pattern: str, packed: bool) -> None:
    torch._dynamo.reset()
    config = ModelConfig(width=256, depth=4, vocabulary=1000, pattern=pattern, mixers={pattern: SMALL[pattern]})
    tokens_BT = torch.randint(1000, (2, 512), device="cuda")
    segments_BT = (torch.rand(2, 512, device="cuda") < 1 / 150).int().cumsum(1).int() if packed else None

    def gradients(compiled: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = LanguageModel(config, seed=0).cuda().to(dtype)
        if compiled:
            model.compile_blocks()
        model.loss(tokens_BT, tokens_BT.roll(-1, 1), segments=segments_BT).backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    exact = gradients(False, torch.float64)  # the chunked form, as the kernels have no fp64
    for name, gradient in gradients(True, torch.float32).items():  # fp32: bf16 would select other blocks
        # a bias on all pooled keys alike changes no softmax: its gradient is rounding
        error = float((gradient - exact[name]).norm() / exact[name].norm().clamp_min(1e-5))
        assert error < 0.02, f"{name}: relative error {error:.1e}"
