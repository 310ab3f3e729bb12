"""The delta rule against its definition, in fp64 with fresh random input unless stated otherwise."""

from __future__ import annotations

import itertools
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.ops.delta_rule import by_blocks, delta_rule, delta_rule_flops
from workbench.ops.delta_rule.peers import verify
from workbench.ops.delta_rule.reference import delta_rule_recurrent
from workbench.ops.delta_rule.torch import delta_rule_torch
from workbench.testing import count_flops

pytestmark = pytest.mark.conformance

B, H, K, V = 2, 2, 8, 12
DECAYS = ["none", "0", "0.1", "5", "60", "mixed"]
"""Approximate nats per token; "mixed" is decays of 60 among weak ones."""
KINDS = [("none", "scalar"), *((decay, axis) for decay in DECAYS[1:] for axis in ("scalar", "channel"))]
FORMS = ["edit", "erase"]
"""edit: one key and β (DeltaNet, GDN, KDA). erase: separate erase keys, gated values (GDN-2, FG²)."""


def error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖, the norm of ``expected`` taken to be at least 1e-3 of its root size: vanishing
    gradients."""
    assert actual.isfinite().all()
    assert expected.isfinite().all()
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-3 * expected.numel() ** 0.5))


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def inputs(
    T: int, decay: str = "0.1", axis: str = "channel", form: str = "edit", repeated: bool = False, v: int = V
) -> dict[str, Any]:
    """Leaves of a call by keyword: queries, keys, values, log-decay, state."""
    keys = unit(B, 1, H, K).expand(B, T, H, K).clone() if repeated else unit(B, T, H, K)
    tensors: dict[str, Any] = {
        "q_BTHK": torch.randn(B, T, H, K, dtype=torch.float64) / K**0.5,
        "write_key_BTHK": keys,
        "value_BTHV": torch.randn(B, T, H, v, dtype=torch.float64),
        "state_BHKV": torch.randn(B, H, K, v, dtype=torch.float64),
    }
    if decay != "none":
        shape = (B, T, H, K) if axis == "channel" else (B, T, H)
        g = -torch.rand(shape, dtype=torch.float64)
        strength = 1.0 if decay == "mixed" else float(decay)
        g = strength * (0.5 * g - 0.75)
        tensors["g"] = torch.where(torch.rand(shape) < 0.3, -60.0, g) if decay == "mixed" else g
    if form == "edit":
        tensors["beta_BTH"] = torch.rand(B, T, H, dtype=torch.float64)
    else:
        tensors["erase_key_BTHK"] = torch.rand(B, T, H, K, dtype=torch.float64) * keys
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def documents(T: int) -> Tensor:
    return (torch.rand(B, T) < 0.15).cumsum(1)


def results(tensors: dict[str, Any], call: Any = delta_rule, **more: Any) -> list[Tensor]:
    """Outputs, state, and the gradients of a random sum of both."""
    generator = torch.Generator().manual_seed(0)
    outputs = call(**tensors, **more)
    total = sum((y.double() * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(total, list(tensors.values()))]


def compare(actual: list[Tensor], expected: list[Tensor], tolerance: float, names: Any = ()) -> None:
    for name, a, b in zip(("output", "final state", *names), actual, expected, strict=True):
        assert error(a, b) <= tolerance, f"{name}: {error(a, b):.2e}, allowed {tolerance:.0e}"


@pytest.mark.parametrize(("decay", "axis"), KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_chunks_are_the_recurrence(decay: str, axis: str, form: str) -> None:
    for T, chunk in ((1, 64), (2, 64), (3, 1), (15, 16), (33, 16), (65, 64), (100, 32)):
        for repeated in (False, True):
            for segments in (None, documents(T)):
                tensors = inputs(T, decay, axis, form, repeated)
                expected = results(tensors, backend="recurrent", segments=segments)
                compare(results(tensors, backend="torch", chunk=chunk, segments=segments), expected, 1e-12, tensors)


@pytest.mark.parametrize("decay", ["0", "0.1"])
@pytest.mark.parametrize("form", FORMS)
def test_moderate_decays_by_blocks_are_the_recurrence_too(decay: str, form: str) -> None:
    for segments in (None, documents(65)):
        tensors = inputs(65, decay, "channel", form)
        expected = results(tensors, backend="recurrent", segments=segments)
        with by_blocks():
            compare(results(tensors, backend="torch", segments=segments), expected, 1e-12, tensors)


def test_decays_at_the_limit_of_moderate_ones_are_exact_in_fp32() -> None:
    tensors = {name: x.detach().float().requires_grad_() for name, x in inputs(96, "0.1", "channel").items()}
    with torch.no_grad():
        tensors["g"].copy_(torch.where(torch.rand_like(tensors["g"]) < 0.5, -24 / 16, -1e-3))
        tensors["g"][..., 0] = -24 / 16  # all tokens of a channel
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    compare(results(tensors, backend="torch"), results(exact, backend="recurrent"), 2e-6, tensors)


@pytest.mark.parametrize("axis", ["scalar", "channel"])
@pytest.mark.parametrize("packed", [False, True])
def test_chunk_and_span_do_not_matter(axis: str, packed: bool) -> None:
    tensors, segments = inputs(150, "0.1", axis), documents(150) if packed else None
    expected = results(tensors, delta_rule_torch, chunk=64, segments=segments)
    for chunk, span in ((16, 2048), (32, 64), (128, 128), (8, 40)):
        actual = results(tensors, delta_rule_torch, chunk=chunk, span=span, segments=segments)
        compare(actual, expected, 1e-12, tensors)


@pytest.mark.parametrize("cut", [1, 15, 16, 17])
def test_documents_of_a_row_are_rows_of_their_own(cut: int) -> None:
    tensors = inputs(40)
    segments = (torch.arange(40) >= cut).long().expand(B, 40)
    packed = results(tensors, backend="torch", chunk=16, segments=segments)

    def apart(state_BHKV: Tensor, **sequences: Tensor) -> tuple[Tensor, Tensor]:
        first, second = ({name: x[:, at] for name, x in sequences.items()} for at in (slice(cut), slice(cut, None)))
        (a, _), (b, state) = delta_rule_recurrent(**first, state_BHKV=state_BHKV), delta_rule_recurrent(**second)
        return torch.cat((a, b), dim=1), state

    compare(packed, results(tensors, apart), 1e-12, tensors)


@pytest.mark.parametrize(("decay", "axis"), KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_low_precision(decay: str, axis: str, form: str) -> None:
    tensors = inputs(300, decay, axis, form)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        low = {
            # gates and state stay fp32, as the mixers give them
            name: x.detach().to(torch.float32 if name in ("g", "beta_BTH", "state_BHKV") else dtype).requires_grad_()
            for name, x in tensors.items()
        }
        # judged on the rounded input: the error of the computation, not of the input
        expected = results({name: x.detach().double().requires_grad_() for name, x in low.items()}, backend="recurrent")
        actual = results(low, backend="torch")
        assert [x.dtype for x in actual[:2]] == [dtype, torch.float32]
        compare(actual[:2], expected[:2], tolerance)
        compare(actual[2:], expected[2:], 2 * max(tolerance, 5e-6), list(tensors)[2:])


@pytest.mark.parametrize("axis", ["scalar", "channel"])
def test_autocast_does_not_reach_inside(axis: str) -> None:
    tensors = {name: x.detach().float().requires_grad_() for name, x in inputs(70, "0.1", axis).items()}

    def under_autocast(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return delta_rule(**tensors, backend="torch")

    expected = results(tensors, backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(results(tensors, under_autocast), expected))


@pytest.mark.parametrize("axis", ["none", "scalar", "channel"])
def test_gradients_are_differences(axis: str) -> None:
    for form in FORMS:
        tensors = inputs(7, "none" if axis == "none" else "0.1", axis, form)
        tensors = {
            name: x.detach()[:1, ..., :1, :3].requires_grad_() if x.dim() == 4 else x for name, x in tensors.items()
        }
        tensors = {name: x.detach()[:1, :, :1].requires_grad_() if x.dim() == 3 else x for name, x in tensors.items()}
        tensors["state_BHKV"] = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)

        def call(*values: Tensor) -> tuple[Tensor, Tensor]:
            return delta_rule(**dict(zip(tensors, values)), backend="torch", chunk=4)  # noqa: B023

        assert torch.autograd.gradcheck(call, tuple(tensors.values()))


def test_special_cases_are_each_other() -> None:
    for backend in ("torch", "recurrent"):
        t = {name: x.detach() for name, x in inputs(70).items()}
        beta, g_BTH = t.pop("beta_BTH"), t.pop("g")[..., 0]
        g = g_BTH[..., None].expand(B, 70, H, K)
        kda = delta_rule(**t, g=g, beta_BTH=beta, backend=backend)
        gdn = delta_rule(**t, g=g_BTH, beta_BTH=beta, backend=backend)
        compare(list(gdn), list(kda), 1e-12)
        gated = {
            "erase_key_BTHK": beta[..., None] * t["write_key_BTHK"],
            "value_BTHV": beta[..., None] * t["value_BTHV"],
        }
        compare(list(delta_rule(**{**t, **gated}, g=g, backend=backend)), list(kda), 1e-12)
        root = {name: beta.sqrt()[..., None] * t[name] for name in ("write_key_BTHK", "value_BTHV")}
        compare(list(delta_rule(**{**t, **root}, g=g, backend=backend)), list(kda), 1e-12)
        left = {"write_key_BTHK": beta[..., None] * t["write_key_BTHK"], "erase_key_BTHK": t["write_key_BTHK"]}
        compare(list(delta_rule(**{**t, **left}, g=g, backend=backend)), list(kda), 1e-12)
        still = delta_rule(**t, g=0 * g_BTH, beta_BTH=beta, backend=backend)
        compare(list(delta_rule(**t, beta_BTH=beta, backend=backend)), list(still), 1e-12)


def test_the_gradient_of_beta_is_the_sum_over_both_gates() -> None:
    t = inputs(40)
    beta = t.pop("beta_BTH")
    direct = torch.autograd.grad(delta_rule(**t, beta_BTH=beta)[0].square().sum(), beta)[0]
    b, w = (beta.detach()[..., None].expand(B, 40, H, n).clone().requires_grad_() for n in (K, V))
    t = {**t, "erase_key_BTHK": b * t["write_key_BTHK"], "value_BTHV": w * t["value_BTHV"]}
    by_b, by_w = torch.autograd.grad(delta_rule(**t)[0].square().sum(), (b, w))
    assert error(by_b.sum(-1) + by_w.sum(-1), direct) < 1e-12


@pytest.mark.parametrize("t", [0, 15, 16, 40])
def test_outputs_are_causal(t: int) -> None:
    tensors = {name: x.detach() for name, x in inputs(41).items()}
    changed = {
        name: x if name == "state_BHKV" else torch.cat((x[:, : t + 1], torch.rand_like(x[:, t + 1 :]) * -7), dim=1)
        for name, x in tensors.items()
    }
    for backend, tolerance in (("recurrent", 0.0), ("torch", 1e-12)):
        before, after = (delta_rule(**x, chunk=16, backend=backend)[0][:, : t + 1] for x in (tensors, changed))
        assert error(after, before) <= tolerance


def test_a_full_edit_stores_its_value_and_none_only_decays() -> None:
    tensors = {name: x.detach() for name, x in inputs(20).items()}
    state = tensors.pop("state_BHKV")
    for t in range(20):
        token = {name: x[:, t : t + 1] for name, x in tensors.items()}
        full = {**token, "g": 0 * token["g"], "beta_BTH": torch.ones_like(token["beta_BTH"])}
        for backend in ("torch", "recurrent"):
            _, written = delta_rule(**full, state_BHKV=state, backend=backend)
            read = torch.einsum("bhkv,bhk->bhv", written, token["write_key_BTHK"][:, 0])
            assert error(read, token["value_BTHV"][:, 0]) < 1e-12
            nothing = {**token, "beta_BTH": 0 * token["beta_BTH"]}
            _, decayed = delta_rule(**nothing, state_BHKV=state, backend=backend)
            assert error(decayed, token["g"][:, 0].exp()[..., None] * state) < 1e-12
        _, state = delta_rule(**token, state_BHKV=state)


EDGES: dict[str, Any] = {
    "no edit": {"beta_BTH": 0.0},
    "full edit": {"beta_BTH": 1.0},
    "no address": {"write_key_BTHK": 0.0},
    "no decay": {"g": 0.0},
    "60 nats": {"g": -60.0},
    "200 nats": {"g": -200.0},
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("axis", ["scalar", "channel"])
def test_edges_are_finite_and_right(edge: str, axis: str) -> None:
    for T in (1, 5, 64, 67):
        for repeated in (False, True):
            for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
                tensors = inputs(T, "0.1", axis, repeated=repeated)
                fixed = {name: torch.full_like(tensors[name], value) for name, value in EDGES[edge].items()}
                tensors = {n: fixed.get(n, x).detach().to(dtype).requires_grad_() for n, x in tensors.items()}
                exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
                compare(results(tensors, backend="torch"), results(exact, backend="recurrent"), tolerance, tensors)


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_repeated_keys_keep_their_precision(strength: float) -> None:
    """Where the inverse of a chunk's system grows: identical and nearly identical keys, full edits, no decay."""
    for spread in (0.0, 1e-3):
        t = {name: x.detach() for name, x in inputs(256, "0", repeated=True).items()}
        t["write_key_BTHK"] = F.normalize(t["write_key_BTHK"] + spread * torch.randn_like(t["write_key_BTHK"]), dim=-1)
        t["beta_BTH"] = torch.full_like(t["beta_BTH"], strength)
        expected = delta_rule(**t, backend="recurrent")[0]
        actual, step = (
            delta_rule(**{name: x.float() for name, x in t.items()}, backend=backend)[0]
            for backend in ("torch", "recurrent")
        )
        assert error(actual, expected) < max(1e-5, 10 * error(step, expected))


def norm(p: Tensor, e: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(torch.eye(p.shape[-1], dtype=p.dtype) - p[..., :, None] * e[..., None, :], ord=2)


def test_one_step_norms() -> None:
    """A right (or left) gate may stretch the state by up to 2/√3, √2 with negative eigenvalues; gates on both sides
    never."""
    k, b = unit(2000, K), torch.rand(2000, K, dtype=torch.float64)
    for most, largest in ((1, 2 / 3**0.5), (2, 2**0.5)):
        assert norm(k, most * b * k).max() <= largest + 1e-9
        assert torch.allclose(norm(k, most * b * k), norm(most * b * k, k))
        root = (most * b).sqrt() * k
        assert norm(root, root).max() <= 1 + 1e-9
    # the bound is reached: a gate that is open on one of two channels with k² = 1/3 there
    worst = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64).sqrt()
    assert abs(norm(worst, torch.tensor([1.0, 0.0], dtype=torch.float64) * worst) - 2 / 3**0.5) < 1e-12


@pytest.mark.parametrize(("T", "chunk"), [(64, 16), (65, 64), (33, 64), (1, 8), (2, 8), (200, 32)])
@pytest.mark.parametrize("axis", ["none", "scalar", "channel"])
def test_flops_are_counted(T: int, chunk: int, axis: str) -> None:
    tensors = {name: x.detach()[:1] for name, x in inputs(T, "none" if axis == "none" else "0.1", axis).items()}
    formula = delta_rule_flops(H, K, V, T, chunk, by_channel=axis == "channel") * T
    assert count_flops(lambda: delta_rule(**tensors, backend="torch", chunk=chunk)) == pytest.approx(formula, rel=1e-9)


@pytest.mark.parametrize("axis", ["scalar", "channel"])
def test_compiles_whole(axis: str) -> None:
    tensors, segments = inputs(19, "5", axis), documents(19)

    def call(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        return delta_rule(**tensors, segments=segments, chunk=8)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=False)
    compare(results(tensors, compiled), results(tensors, call), 1e-12, tensors)


def test_the_state_is_new_and_nothing_is_overwritten() -> None:
    tensors = {name: x.detach() for name, x in inputs(5).items()}
    before = {name: x.clone() for name, x in tensors.items()}
    for backend in ("torch", "recurrent"):
        _, state = delta_rule(**tensors, backend=backend)
        state.fill_(torch.nan)
        assert all(torch.equal(x, before[name]) for name, x in tensors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"write_key_BTHK": (B, 5, H, K + 1)}, "write_key_BTHK: got shape (2, 5, 2, 9); expected (B=2, T=5, H=2, K=8)"),
        ({"q_BTHK": (B, 5, K)}, "q_BTHK: got shape (2, 5, 8); expected the axes (B, T, H, K)"),
        ({"value_BTHV": (B, 4, H, V)}, "value_BTHV: got shape (2, 4, 2, 12); expected (B=2, T=5, H=2, V=12)"),
        ({"g": (B, 5, H + 1)}, "g: got shape (2, 5, 3); expected (B=2, T=5, H=2)"),
        ({"beta_BTH": (B, 5, H, K)}, "beta_BTH: got shape (2, 5, 2, 8); expected (B=2, T=5, H=2)"),
        ({"state_BHKV": (B, H, V, K)}, "state_BHKV: got shape (2, 2, 12, 8); expected (B=2, H=2, K=8, V=12)"),
        ({"segments": (B, 6)}, "segments: got shape (2, 6); expected (B=2, T=5)"),
    ],
)
def test_errors_name_the_wrong_shape(change: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        delta_rule(**{**inputs(5), **{name: torch.zeros(shape) for name, shape in change.items()}})
    assert message in str(caught.value)


def test_chunk_must_be_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="chunk: got 24; expected a power of two"):
        delta_rule(**inputs(5), chunk=24)


def test_errors_list_the_backends() -> None:
    with pytest.raises(
        ValueError, match=r"backend: got 'cuda'; expected 'auto' or one of recurrent, torch, triton, cudnn_trunc.*fla"
    ):
        delta_rule(**inputs(5), backend="cuda")


def fake_module(name: str) -> types.ModuleType:
    """A module of flash-linear-attention with functions that follow its documented conventions, token by token."""

    def by_document(
        *rows: Any, cu_seqlens: Tensor | None, initial_state: Tensor | None, step: Any
    ) -> tuple[Tensor, Tensor]:
        q, _, v = rows[:3]
        ends = [(b, 0, q.shape[1]) for b in range(len(q))]
        if cu_seqlens is not None:
            assert len(q) == 1, "one row where documents are given"
            ends = [(0, int(a), int(b)) for a, b in itertools.pairwise(cu_seqlens)]
        o, finals = torch.empty_like(v), []
        for n, (b, start, end) in enumerate(ends):
            S = v.new_zeros(q.shape[2], q.shape[3], v.shape[3]) if initial_state is None else initial_state[n]
            for t in range(start, end):
                S = step(S, *(x[b, t] for x in rows[1:]))
                o[b, t] = torch.einsum("hk,hkv->hv", q[b, t], S)
            finals.append(S)
        return o, torch.stack(finals)

    def edit(S: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> Tensor:
        if g is not None:
            S = S * g.exp().reshape(*g.shape, *(1,) * (3 - g.dim()))
        return S + torch.einsum("hk,hv->hkv", k, beta[:, None] * (v - torch.einsum("hkv,hk->hv", S, k)))

    def diagonal_plus_low_rank(S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gk: Tensor) -> Tensor:
        read = torch.einsum("hkv,hk->hv", S, a)
        return S * gk.exp()[..., None] + torch.einsum("hk,hv->hkv", b, read) + torch.einsum("hk,hv->hkv", k, v)

    def call(*, scale: float, output_final_state: bool, initial_state: Any, cu_seqlens: Any = None, **x: Any) -> Any:
        assert scale == 1.0
        assert output_final_state
        names = ("q", "k", "v", "a", "b", "gk") if "a" in x else ("q", "k", "v", "beta", "g")
        step = diagonal_plus_low_rank if "a" in x else edit
        rows = [x.pop(name) for name in names if name in x]
        assert not x
        return by_document(*rows, cu_seqlens=cu_seqlens, initial_state=initial_state, step=step)

    module = types.ModuleType(name)
    for function in ("chunk_delta_rule", "chunk_gated_delta_rule", "chunk_kda", "chunk_dplr_delta_rule"):
        setattr(module, function, call)
    return module


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [False, True])
def test_the_adapter_follows_the_conventions_of_flash_linear_attention(
    decay: str, form: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("delta_rule", "gated_delta_rule", "kda", "generalized_delta_rule"):
        monkeypatch.setitem(sys.modules, f"fla.ops.{module}", fake_module(module))
    monkeypatch.setattr(verify, "obstacle", lambda peer, call: None)
    monkeypatch.setattr(verify, "LENGTH", 9)
    verify.reset()
    t = {name: x.detach() for name, x in inputs(9, "none" if decay == "none" else "0.1", decay, form).items()}
    t = {name: x.float() for name, x in t.items()}
    if form == "erase":
        t["beta_BTH"] = torch.rand(B, 9, H)
    segments = documents(9) if packed else None
    for drop in ((), ("state_BHKV",), ("beta_BTH",)):
        some = {name: x for name, x in t.items() if name not in drop}
        expected = delta_rule(**some, segments=segments, backend="recurrent")
        compare(list(delta_rule(**some, segments=segments, backend="fla")), list(expected), 1e-5)


def test_a_backend_that_cannot_be_used_gives_the_reason() -> None:
    with pytest.raises(RuntimeError, match="backend='fla': its kernels need a CUDA device; the tensors are on cpu"):
        delta_rule(**inputs(5), backend="fla")
