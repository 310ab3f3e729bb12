"""Attention of one query per sequence over a cache, in torch and by the kernels, against its definition."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from interpreter import in_interpreter
from torch import Tensor

from workbench.ops.decode_attention import decode_attention
from workbench.ops.decode_attention.reference import decode_attention_reference
from workbench.ops.dispatch import force_backend

pytestmark = pytest.mark.compile

LENGTHS = [37, 1, 16, 0, 600]
CASES: dict[str, dict[str, Any]] = {
    "heads": {"H": 2, "G": 2},
    "groups": {"H": 6, "G": 2, "K": 20, "V": 12},
    "latents": {"H": 4, "G": 1, "V": None, "R": 6},
    "grouped latents": {"H": 4, "G": 2, "V": None, "R": 8, "sink": True},
    "window": {"H": 2, "G": 2, "window": 20},
    "capped": {"H": 2, "G": 1, "softcap": 0.7, "sink": True},
    "eight bits": {"H": 4, "G": 2, "steps": True},
    "latents in eight bits": {"H": 4, "G": 1, "V": None, "R": 6, "steps": True},
}


def inputs(
    dtype: torch.dtype,
    device: str,
    H: int,
    G: int,
    K: int = 16,
    V: int | None = 16,
    R: int = 0,
    softcap: float | None = None,
    window: int | None = None,
    sink: bool = False,
    steps: bool = False,
) -> tuple[list[Any], dict[str, Any]]:
    B, S = len(LENGTHS), max(LENGTHS) + 9

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=device).to(dtype)

    def rows(G: int, C: int) -> Tensor:
        x = torch.randint(-127, 128, (B, S, G, C), device=device).to(torch.int8) if steps else numbers(B, S, G, C)
        if not steps:
            for row, length in zip(x, LENGTHS):
                row[length:] = torch.nan
        return x

    def sizes() -> Tensor:
        return torch.rand(B, S, G, device=device) / 64

    options: dict[str, Any] = {"scale": 0.3, "softcap": softcap, "window": window}
    if sink:
        options["sink_H"] = numbers(H)
    if R:
        options["shared_BS1R"] = numbers(B, S, 1, R)
    if steps:
        options |= {"k_steps_BSG": sizes(), "v_steps_BSG": None if V is None else sizes()}
    return [numbers(B, H, K + R), rows(G, K), None if V is None else rows(G, V)], options


def worst_error(case: str, dtype: torch.dtype, device: str = "cpu") -> float:
    """Relative to the definition in fp64; a sequence without tokens gives zero."""
    (q, k, v), options = inputs(dtype, device, **CASES[case])
    lengths_B = torch.tensor(LENGTHS, device=device)
    o, lse = decode_attention(q, k, v, lengths_B, **options)
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    expected = decode_attention_reference(q.double(), k, v, LENGTHS, **exact)
    assert o.dtype == dtype and o.shape == expected.shape
    assert (o[3] == 0).all() and (lse[3] == -torch.inf).all()
    assert lse[[0, 1, 2, 4]].isfinite().all()
    return float((o.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", CASES)
def test_torch_is_the_definition(case: str) -> None:
    assert worst_error(case, torch.float64) < 1e-12
    assert worst_error(case, torch.bfloat16) < 1e-2


def test_the_log_sum_exp_is_that_of_the_scores() -> None:
    (q, k, v), options = inputs(torch.float64, "cpu", H=2, G=1)
    _, lse = decode_attention(q, k, v, torch.tensor(LENGTHS), **options)
    torch.testing.assert_close(lse[0, 1], (k[0, :37, 0] @ q[0, 1] * 0.3).logsumexp(0))


def test_kernels_are_the_definition_in_the_interpreter() -> None:
    output = in_interpreter(__file__)
    assert output.split()[-1:] == ["passed"], output


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_kernels_are_the_definition(case: str) -> None:
    assert worst_error(case, torch.float32, "cuda") < 1e-5
    assert worst_error(case, torch.bfloat16, "cuda") < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "G", "K", "V", "R"), [(8, 8, 128, 128, 0), (32, 8, 128, 128, 0), (16, 1, 256, None, 32)])
def test_kernels_read_long_caches(H: int, G: int, K: int, V: int | None, R: int) -> None:
    B, S = 3, 33_000
    q = torch.randn(B, H, K + R, device="cuda").bfloat16()
    k = torch.randn(B, S, G, K, device="cuda").bfloat16()
    v = None if V is None else torch.randn(B, S, G, V, device="cuda").bfloat16()
    lengths_B = torch.tensor([33_000, 17, 4096], device="cuda")
    shared = torch.randn(B, S, 1, R, device="cuda").bfloat16() if R else None
    actual, lse = decode_attention(q, k, v, lengths_B, shared_BS1R=shared, scale=K**-0.5)
    with force_backend("torch"):
        expected, expected_lse = decode_attention(q, k, v, lengths_B, shared_BS1R=shared, scale=K**-0.5)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    torch.manual_seed(0)
    with force_backend("triton"):
        for name in CASES:
            for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
                error = worst_error(name, dtype)
                assert error < bound, f"{name}, {dtype}: {error}"
    print("passed")
    sys.exit()
