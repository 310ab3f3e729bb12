"""Triton's interpreter computes with 16-bit numbers as torch does: what the tests of 16-bit kernels rest on."""

from __future__ import annotations

import sys

import pytest
import torch
from interpreter import in_interpreter

pytestmark = pytest.mark.compile


def test_16_bit_numbers_are_torchs() -> None:
    printed = in_interpreter(__file__, str(torch.initial_seed()))
    assert "numbers agree" in printed, printed


if __name__ == "__main__":
    import triton
    import triton.language as tl

    @triton.jit
    def compute(x, y, out, dot, bits, N: tl.constexpr):
        i = tl.arange(0, N)
        a = tl.load(x + i, mask=i < N - 1, other=3.0)
        b = tl.load(y + i)
        tl.store(out + i, a + b)
        tl.store(out + N + i, a * b)
        tl.store(out + 2 * N + i, tl.where(a > b, tl.abs(a), -b))
        tl.store(out + 3 * N + i, (a.to(tl.float32) * 1.01).to(a.dtype))
        tl.store(out + 4 * N + i, tl.maximum(a, b) - tl.sum(a.to(tl.float32), axis=0).to(a.dtype))
        tl.store(bits + i, a.to(tl.int16, bitcast=True))
        square = i[:, None] * N + i[None, :]
        outer = tl.dot(a[:, None] * tl.full((1, N), 0.1, a.dtype), tl.trans(b[:, None] + tl.zeros((N, N), a.dtype)))
        tl.store(dot + square, outer)

    torch.manual_seed(int(sys.argv[1]) % 2**63)
    N = 16
    for dtype in (torch.bfloat16, torch.float16):
        x, y = torch.randn(N).to(dtype), torch.randn(N).to(dtype)
        out, dot, bits = torch.empty(5, N, dtype=dtype), torch.empty(N, N), torch.empty(N, dtype=torch.int16)
        compute[(1,)](x, y, out, dot, bits, N)
        x[-1] = 3.0  # behind the mask
        assert torch.equal(bits, x.view(torch.int16))
        assert torch.equal(out[0], x + y)
        assert torch.equal(out[1], x * y)
        assert torch.equal(out[2], torch.where(x > y, x.abs(), -y))
        assert torch.equal(out[3], (x.float() * 1.01).to(dtype))
        assert torch.allclose(out[4].float(), (x.maximum(y) - x.float().sum().to(dtype)).float(), rtol=1e-2, atol=1e-2)
        left, right = (x[:, None] * torch.tensor(0.1, dtype=dtype)).expand(N, N), y[None].expand(N, N)
        assert torch.allclose(dot, left.float() @ right.float(), rtol=1e-6, atol=1e-6)
    print("numbers agree")
