"""Operators against the definitions of flash-linear-attention in torch; its kernels need a CUDA device.

Its definitions compute in fp32. Legend: B batch, T time, H heads, K key channels, V value channels, G key–value heads.
"""

from __future__ import annotations

import pytest
import torch
from outside import outside
from torch import Tensor
from torch.nn.functional import normalize

from workbench.ops.delta_rule import delta_rule
from workbench.ops.sparse_attention import document_starts, selected_attention
from workbench.testing import relative_error

pytestmark = pytest.mark.reference
B, H, K, V = 2, 3, 16, 24


def inputs(T: int) -> dict[str, Tensor]:
    """Unit keys, moderate decays, strengths in (0, 1), a state."""
    return {
        "q": torch.randn(B, T, H, K),
        "k": normalize(torch.randn(B, T, H, K), dim=-1),
        "v": torch.randn(B, T, H, V),
        "beta": torch.rand(B, T, H),
        "g": -torch.rand(B, T, H, K),
        "state": torch.randn(B, H, K, V),
    }


def by_head(*tensors: Tensor) -> list[Tensor]:
    """(B, T, H, …) -> (B, H, T, …)"""
    return [x.transpose(1, 2).contiguous() for x in tensors]


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for name, a, b in zip(("output", "state"), actual, expected, strict=True):
        assert relative_error(a, b.to(a.dtype)) < 5e-6, name


@pytest.mark.parametrize("T", [5, 130])
def test_kimi_delta_attention(T: int) -> None:
    x = inputs(T)
    naive = outside("fla.ops.kda.naive", "fla-core").naive_recurrent_kda
    options = {"scale": 1.0, "initial_state": x["state"], "output_final_state": True}
    expected = naive(x["q"], x["k"], x["v"], x["g"], x["beta"], **options)
    assert_same(delta_rule(x["q"], x["k"], x["v"], x["g"], beta_BTH=x["beta"], state_BHKV=x["state"]), expected)


@pytest.mark.parametrize("T", [5, 130])
def test_gated_delta_rule(T: int) -> None:
    x = inputs(T)
    naive = outside("fla.ops.gated_delta_rule.naive", "fla-core").naive_recurrent_gated_delta_rule
    g = x["g"][..., 0].contiguous()
    options = {"scale": 1.0, "initial_state": x["state"], "output_final_state": True}
    expected = naive(x["q"], x["k"], x["v"], x["beta"], g, **options)
    assert_same(delta_rule(x["q"], x["k"], x["v"], g, beta_BTH=x["beta"], state_BHKV=x["state"]), expected)


def test_delta_rule_without_decay() -> None:
    x = inputs(70)
    naive = outside("fla.ops.delta_rule.naive", "fla-core").delta_rule_recurrence
    output, state = naive(*by_head(x["q"], x["k"], x["v"], x["beta"]), initial_state=x["state"])
    actual = delta_rule(x["q"] * K**-0.5, x["k"], x["v"], beta_BTH=x["beta"], state_BHKV=x["state"])
    assert_same(actual, (output.transpose(1, 2), state))


def test_gates_of_gdn2_by_channel() -> None:
    x = inputs(70)
    erase, write = torch.rand(B, 70, H, K), torch.rand(B, 70, H, V)
    naive = outside("fla.ops.gdn2.naive", "fla-core").naive_recurrent_gdn2
    options = {"scale": 1.0, "initial_state": x["state"], "output_final_state": True}
    expected = naive(x["q"], x["k"], x["v"], x["g"], erase, write, **options)
    actual = delta_rule(x["q"], x["k"], write * x["v"], x["g"], erase_key_BTHK=erase * x["k"], state_BHKV=x["state"])
    assert_same(actual, expected)


@pytest.mark.parametrize(("block", "n"), [(8, 3), (16, 2)])
def test_selected_attention_of_nsa(block: int, n: int) -> None:
    T, G, R = 50, 2, 2
    q, k, v = torch.randn(B, T, G * R, K), torch.randn(B, T, G, K), torch.randn(B, T, G, V)
    own = (torch.arange(T) // block)[None, :, None, None].expand(B, T, G, 1)
    others = torch.rand(B, T, G, T // block + 1).argsort(-1)[..., : n - 1]
    others = torch.where(others < own, others, -1)  # its own block and earlier ones
    chosen = torch.cat((others, own), dim=-1).sort(-1).values
    naive = outside("fla.ops.nsa.naive", "fla-core").naive_nsa_selection
    start_BT = document_starts(None, B, T, q.device)
    actual, _ = selected_attention(q, k, v, chosen.int(), start_BT=start_BT, block=block)
    for b in range(B):
        # unused places name a block of the future, which the query does not see
        indices = torch.where(chosen < 0, T, chosen)[b, None]
        expected = naive(q[b, None], k[b, None], v[b, None], indices, block_size=block, scale=K**-0.5)
        assert relative_error(actual[b, None], expected) < 5e-6
