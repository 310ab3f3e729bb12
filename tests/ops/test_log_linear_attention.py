"""Log-linear attention against its equation, in fp64 with fresh random input unless stated otherwise."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from outside import outside
from torch import Tensor

from workbench.ops.delta_rule import delta_rule
from workbench.ops.log_linear_attention import (
    log_linear_attention,
    log_linear_attention_flops,
    log_linear_delta_rule_flops,
    state_count,
)
from workbench.testing import count_flops, relative_error

pytestmark = pytest.mark.conformance

B, H, K, V = 2, 3, 8, 12
both_rules = pytest.mark.parametrize("erases", [False, True], ids=["adds", "erases"])


def inputs(T: int, decay: float, levels: int, erases: bool = False) -> dict[str, Tensor]:
    """Leaves of a call; a third of the decays is strong where the others are weak. The delta rule has unit keys, and
    edit strengths up to 2."""
    g = -decay * torch.rand(B, T, H, dtype=torch.float64)
    tensors = {
        "q_BTHK": torch.randn(B, T, H, K, dtype=torch.float64),
        "k_BTHK": torch.randn(B, T, H, K, dtype=torch.float64),
        "v_BTHV": torch.randn(B, T, H, V, dtype=torch.float64),
        "g_BTH": torch.where(torch.rand(B, T, H) < 0.3, -60.0, g) if decay == 1 else g,
        "scales_BTHJ": torch.rand(B, T, H, levels, dtype=torch.float64),
    }
    if erases:
        tensors["k_BTHK"] = F.normalize(tensors["k_BTHK"], dim=-1)
        tensors["beta_BTH"] = 2 * torch.rand(B, T, H, dtype=torch.float64)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def results(tensors: dict[str, Tensor], function: Any = log_linear_attention, **more: Any) -> list[Tensor]:
    """Outputs and the gradients of a weighted sum of them."""
    out = function(**tensors, **more)[0]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out)
    return [out, *torch.autograd.grad((out * weight).sum(), list(tensors.values()), materialize_grads=True)]


def equation(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    scales_BTHJ: Tensor,
    beta_BTH: Tensor | None = None,
    *,
    segments: Tensor,
) -> tuple[Tensor]:
    """Every pair of tokens by itself, the later tokens first: the query passes through the transitions of each."""
    rows = []
    for b in range(len(q_BTHK)):
        begin = 0
        for t in range(q_BTHK.shape[1]):
            if t and segments[b, t] != segments[b, t - 1]:
                begin = t
            total, q_HK = torch.zeros(H, V, dtype=torch.float64), q_BTHK[b, t]
            for s in range(t, begin - 1, -1):
                level = min(((t - begin) ^ (s - begin)).bit_length(), scales_BTHJ.shape[-1] - 1)
                score = (q_HK * k_BTHK[b, s]).sum(-1)
                if beta_BTH is not None:
                    score = beta_BTH[b, s] * score
                    q_HK = q_HK - score[:, None] * k_BTHK[b, s]
                total = total + (scales_BTHJ[b, t, :, level] * score)[:, None] * v_BTHV[b, s]
                q_HK = g_BTH[b, s].exp()[:, None] * q_HK
            rows.append(total)
    return (torch.stack(rows).unflatten(0, (len(q_BTHK), -1)),)


@both_rules
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("levels", [2, 4, 9])
def test_states_are_those_of_the_equation(levels: int, packed: bool, erases: bool) -> None:
    T = 45
    tensors = inputs(T, 0.1, levels, erases)
    segments = (torch.rand(B, T) < 0.06 * packed).cumsum(1)
    expected = results(tensors, equation, segments=segments)
    for backend in ("recurrent", "torch"):
        actual = results(tensors, segments=segments if packed else None, chunk=4, backend=backend)
        for name, a, b in zip(("output", *tensors), actual, expected, strict=True):
            assert relative_error(a, b) < 1e-12, (backend, name)


@both_rules
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1, 1.0, 5.0])
@pytest.mark.parametrize(("T", "chunk", "levels"), [(1, 64, 4), (5, 64, 12), (64, 16, 5), (129, 16, 12), (200, 32, 3)])
def test_blocks_equal_the_states(T: int, chunk: int, levels: int, decay: float, packed: bool, erases: bool) -> None:
    tensors = inputs(T, decay, levels, erases)
    segments = (torch.rand(B, T) < 0.05).cumsum(1) if packed else None
    expected = results(tensors, segments=segments, backend="recurrent")
    actual = results(tensors, segments=segments, chunk=chunk, backend="torch")
    for name, a, b in zip(("output", *tensors), actual, expected, strict=True):
        assert relative_error(a, b) < 1e-12, name


@both_rules
def test_rows_of_the_shortest_documents_with_a_reader(erases: bool) -> None:
    """As many odd blocks as fit: documents of 17 and of 16 tokens with blocks of 16."""
    for length in (16, 17, 1):
        tensors, T = inputs(17 * 12, 0.1, 9, erases), 17 * 12
        segments = (torch.arange(T) // length).expand(B, T)
        outputs = [
            log_linear_attention(**tensors, segments=segments, chunk=16, backend=b)[0] for b in ("torch", "recurrent")
        ]
        assert relative_error(*outputs) < 1e-12


@both_rules
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("T", "levels"), [(1, 9), (15, 9), (16, 9), (64, 9), (100, 3), (127, 9), (130, 2)])
def test_states_after_a_pass(T: int, levels: int, packed: bool, erases: bool) -> None:
    """Both forms leave the same states, from which further tokens go on as in one pass."""
    tensors, further = inputs(T, 0.1, levels, erases), 9
    more = inputs(further, 0.1, levels, erases)
    zeros = torch.zeros(B, H, state_count(T + further, levels), K, V, dtype=torch.float64)
    segments = (torch.arange(T) // 37).expand(B, T) if packed else None
    found = [
        log_linear_attention(**tensors, states_BHIKV=zeros, segments=segments, chunk=16, backend=backend)[1]
        for backend in ("torch", "recurrent")
    ]
    assert found[0] is not None and found[1] is not None
    assert relative_error(*found) < 1e-12
    if packed:
        return
    joined = {name: torch.cat((tensors[name], more[name]), 1) for name in tensors}
    whole = log_linear_attention(**joined, chunk=16)[0]
    out, _ = log_linear_attention(**more, states_BHIKV=found[0], positions_B=torch.full((B,), T))
    assert relative_error(out, whole[:, T:]) < 1e-12


@pytest.mark.reference
def test_it_is_that_of_fla() -> None:
    """With J levels for 2^(J - 1) tokens, as its definition has them."""
    T, levels = 64, 7
    tensors = {name: x.detach().float() for name, x in inputs(T, 0.1, levels).items()}
    naive = outside("fla.ops.log_linear_attn.naive", "fla-core").naive_log_linear_attn
    assert relative_error(log_linear_attention(**tensors, chunk=16)[0], naive(*tensors.values())) < 1e-5


@both_rules
def test_gradients_are_finite_where_few_blocks_are_complete(erases: bool) -> None:
    """Single precision, many levels and documents that are shorter than a block."""
    T, levels = 1024, 12
    tensors = {name: x.detach().float().requires_grad_() for name, x in inputs(T, 0.0, levels, erases).items()}
    segments = (torch.arange(T) // 3).expand(B, T)
    expected, actual = (results(tensors, segments=segments, chunk=4, backend=b) for b in ("recurrent", "torch"))
    for name, a, b in zip(("output", *tensors), actual, expected, strict=True):
        assert relative_error(a, b) < 1e-4, name


def test_equal_levels_are_the_gated_delta_rule() -> None:
    """Its states sum to the one state."""
    tensors = inputs(90, 0.3, 6, erases=True)
    ones = {**tensors, "scales_BTHJ": torch.ones_like(tensors["scales_BTHJ"])}
    operands = (tensors[name] for name in ("q_BTHK", "k_BTHK", "v_BTHV", "g_BTH"))
    expected, _ = delta_rule(*operands, beta_BTH=tensors["beta_BTH"])
    assert relative_error(log_linear_attention(**ones, chunk=16)[0], expected) < 1e-12


@both_rules
@pytest.mark.parametrize(("T", "chunk"), [(1, 64), (24, 64), (64, 64), (200, 16), (128, 16), (161, 32)])
def test_flops_are_those_of_the_products(T: int, chunk: int, erases: bool) -> None:
    tensors = {name: x.detach() for name, x in inputs(T, 0.1, 9, erases).items()}
    counted = count_flops(lambda: log_linear_attention(**tensors, chunk=chunk, backend="torch"))
    formula = log_linear_delta_rule_flops if erases else log_linear_attention_flops
    assert counted / (B * T) == pytest.approx(formula(H, K, V, T, chunk), rel=1e-9)


def test_flops_grow_as_the_logarithm_of_the_length() -> None:
    at = [log_linear_attention_flops(1, 64, 64, T) for T in (1024, 2048, 4096, 8192)]
    steps = [b - a for a, b in pairwise(at)]
    assert steps == pytest.approx([2 * 64 * 64 / 2] * 3)


@pytest.mark.gpu
@both_rules
@pytest.mark.parametrize("packed", [False, True])
def test_the_device_computes_the_same_bits_twice(packed: bool, erases: bool) -> None:
    """In deterministic mode, where operations without such a form raise; and what the host computes."""
    T = 1000
    tensors = {name: x.detach().float() for name, x in inputs(T, 0.1, 12, erases).items()}
    segments = (torch.arange(T) // 170).expand(B, T) if packed else None
    on_host = results({name: x.requires_grad_() for name, x in tensors.items()}, segments=segments, backend="torch")
    on_device = {name: x.detach().cuda().requires_grad_() for name, x in tensors.items()}
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, again = (
            results(on_device, segments=None if segments is None else segments.cuda(), backend="torch")
            for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(map(torch.equal, first, again))
    for a, b in zip(first, on_host, strict=True):
        assert relative_error(a.cpu(), b) < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_BTHK": torch.zeros(B, 4, H, K + 1)}, "k_BTHK: got shape"),
        ({"scales_BTHJ": torch.zeros(B, 4, H, 1)}, "scales_BTHJ: got shape"),
        ({"beta_BTH": torch.zeros(B, 4, H, 1)}, "beta_BTH: got shape"),
        ({"states_BHIKV": torch.zeros(B, H, 7, K, V)}, "states_BHIKV: got shape"),
        ({"chunk": 24}, "chunk: got 24; expected a power of two"),
        ({"backend": "fast"}, "backend: got 'fast'"),
    ],
)
def test_bad_input_is_one_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_linear_attention(**{**inputs(4, 0.1, 5), **changes})
