"""The kernels of a learned index, and of attention to selected tokens, against the chunked forms."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import in_interpreter

from workbench.ops.sparse_attention import document_starts, selected_attention
from workbench.ops.token_index import IndexKeys, index_divergence, select_tokens

pytestmark = pytest.mark.compile

SCRIPT = Path(__file__).with_name("token_index_kernels.py")


def test_the_kernels_in_the_interpreter_are_the_chunked_forms() -> None:
    printed = in_interpreter(str(SCRIPT), str(torch.initial_seed()), "cpu", "small,16 bits", "float32")
    assert "kernels agree" in printed, printed[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("part", "dtype"),
    [("small", "float32"), ("small", "bfloat16"), ("long", "float32"), ("long", "bfloat16"), ("latents", "bfloat16")],
)
def test_on_the_device_the_kernels_are_the_chunked_forms(part: str, dtype: str) -> None:
    call = [sys.executable, str(SCRIPT), str(torch.initial_seed()), "cuda", part, dtype]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert "kernels agree" in done.stdout, done.stderr[-3000:]


@pytest.mark.gpu
def test_memory_on_the_device_does_not_hold_a_square() -> None:
    T, J, X, H, G, K, n = 16_384, 4, 64, 4, 1, 64, 512

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(1, T, *shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    index, start_BT = IndexKeys(rows(J, X), rows(X), rows(J)), document_starts(None, 1, T, torch.device("cuda"))
    q, k, v = rows(H, K), rows(G, K), rows(G, K)
    for _ in range(2):  # the first pass compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        tokens = select_tokens(index, count=n, start_BT=start_BT)
        o, _ = selected_attention(q, k, v, tokens[:, :, None], block=1, start_BT=start_BT)
        losses = [index_divergence(index, q, k, x, start_BT=start_BT).sum() for x in (None, tokens)]
        (o.float().sum() + sum(losses)).backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * T * T  # of a square in bf16
