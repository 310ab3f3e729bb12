"""Gated linear attention against its definition, in fp64 with fresh random input unless stated otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.ops.linear_attention import linear_attention, linear_attention_flops
from workbench.testing import count_flops, relative_error

pytestmark = pytest.mark.conformance

B, H, K, V = 2, 3, 8, 12


def inputs(T: int, decay: float, rows: int = 1) -> dict[str, Tensor]:
    """Leaves of a call; a third of the decays is strong where the others are weak."""
    g = -decay * torch.rand(B, T, H, dtype=torch.float64)
    tensors = {
        "q_BTHK": torch.randn(B, rows * T, H, K, dtype=torch.float64),
        "k_BTHK": torch.randn(B, rows * T, H, K, dtype=torch.float64),
        "v_BTHV": torch.randn(B, rows * T, H, V, dtype=torch.float64),
        "g_BTH": torch.where(torch.rand(B, T, H) < 0.3, -60.0, g) if decay == 1 else g,
        "state_BHKV": torch.randn(B, H, K, V, dtype=torch.float64),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def results(tensors: dict[str, Tensor], **more: Any) -> list[Tensor]:
    """Outputs, state, and the gradients of a weighted sum of both."""
    generator = torch.Generator().manual_seed(0)
    outputs = linear_attention(**tensors, **more)
    total = sum((y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(total, list(tensors.values()))]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1, 1.0, 5.0])
@pytest.mark.parametrize(("T", "chunk"), [(1, 64), (5, 64), (64, 16), (130, 32)])
def test_chunks_equal_the_definition(T: int, chunk: int, decay: float, packed: bool) -> None:
    tensors = inputs(T, decay)
    segments = (torch.rand(B, T) < 0.15).cumsum(1) if packed else None
    expected = results(tensors, segments=segments, backend="recurrent")
    actual = results(tensors, segments=segments, chunk=chunk, backend="torch")
    for name, a, b in zip(("output", "state", *tensors), actual, expected, strict=True):
        assert relative_error(a, b) < 1e-12, name


def test_rows_of_a_token_see_one_another() -> None:
    """Against the definition, and that against a state to which a token adds all its rows before it is read."""
    T, n = 70, 3
    tensors = inputs(T, 1.0, n)
    segments = (torch.rand(B, T) < 0.1).cumsum(1)
    expected = results(tensors, segments=segments, backend="recurrent")
    actual = results(tensors, segments=segments, chunk=16, backend="torch")
    for name, a, b in zip(("output", "state", *tensors), actual, expected, strict=True):
        assert relative_error(a, b) < 1e-12, name
    q, k, v, g, S = (x.detach() for x in tensors.values())
    outputs = []
    for t in range(T):
        at = slice(n * t, n * (t + 1))
        S = S * g[:, t].exp()[..., None, None]
        if t > 0:
            S = S * (segments[:, t] == segments[:, t - 1])[:, None, None, None]
        S = S + torch.einsum("brhk,brhv->bhkv", k[:, at], v[:, at])
        outputs.append(torch.einsum("brhk,bhkv->brhv", q[:, at], S))
    assert relative_error(expected[0], torch.cat(outputs, 1)) < 1e-12


def test_float32_keeps_weak_decays_after_strong_ones() -> None:
    """Factors between tokens are products of decays: sums of logarithms would lose the weak ones."""
    tensors = inputs(128, 1.0)
    exact = linear_attention(**tensors, backend="recurrent")[0]
    narrow = linear_attention(**{name: tensor.float() for name, tensor in tensors.items()}, backend="torch")[0]
    assert relative_error(narrow.double(), exact) < 1e-6


def test_two_parts_with_the_state_between_equal_one_pass() -> None:
    tensors = inputs(96, 0.1)
    whole, last = linear_attention(**tensors)
    state, parts = tensors.pop("state_BHKV"), []
    for first, end in ((0, 40), (40, 96)):
        out, state = linear_attention(**{name: x[:, first:end] for name, x in tensors.items()}, state_BHKV=state)
        parts.append(out)
    assert relative_error(torch.cat(parts, dim=1), whole) < 1e-12
    assert relative_error(state, last) < 1e-12


@pytest.mark.parametrize(("T", "rows"), [(24, 1), (64, 1), (200, 1), (40, 3)])
def test_flops_are_those_of_the_products(T: int, rows: int) -> None:
    tensors = {name: x.detach() for name, x in inputs(T, 0.1, rows).items()}
    counted = count_flops(lambda: linear_attention(**tensors, backend="torch"))
    assert counted / (B * T) == pytest.approx(linear_attention_flops(H, K, V, T, rows=rows), rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_BTHK": torch.zeros(B, 4, H, K + 1)}, "k_BTHK: got shape"),
        ({"g_BTH": torch.zeros(B, 3, H)}, "q_BTHK: got 4 rows; expected a multiple of the 3 tokens"),
        ({"chunk": 24}, "chunk: got 24; expected a power of two"),
        ({"backend": "fast"}, "backend: got 'fast'"),
    ],
)
def test_bad_input_is_one_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**inputs(4, 0.1), **changes})
