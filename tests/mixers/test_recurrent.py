"""Recurrent mixers against their definitions, token by token in fp64, and against public code.

Legend: B batch, T time, D model width, H heads, K key channels, V value channels.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from outside import outside
from torch import Tensor

from workbench.contract import Shared, mixers
from workbench.mixers.families.delta_rule import Operands, erase_and_write, one_by_one
from workbench.ops.delta_rule import delta_rule
from workbench.ops.linear_attention import linear_attention
from workbench.testing import relative_error

B, T, D = 2, 70, 64


def built(kind: str, **fields: Any) -> Any:
    """A layer in fp64 with random parameters around its initial values."""
    config = mixers[kind].Config(**fields).resolved(D)
    module = mixers[kind](config, D).double()
    generator = torch.Generator().manual_seed(1)
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            with torch.no_grad():
                owner.init_parameter(name, parameter, generator)  # type: ignore[operator]
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def convolved(x_BTC: Tensor, weight_CW: Tensor) -> Tensor:
    """silu(Σ_j w_j x_{t-j})."""
    W = weight_CW.shape[1]
    padded = F.pad(x_BTC, (0, 0, W - 1, 0))
    return F.silu(sum(padded[:, W - 1 - j : W - 1 - j + x_BTC.shape[1]] * weight_CW[:, j] for j in range(W)))


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


class Parts:
    """What the members of the delta-rule family make of an input, from their definitions."""

    def __init__(self, module: Any, x_BTD: Tensor, n: int = 1):
        H, K, V = module.H, module.K, module.V
        sizes = [H * K, n * H * K, n * H * V]
        q, k, v = convolved(x_BTD @ module.qkv.weight.T, module.conv.weight).split(sizes, dim=-1)
        self.q, self.k = q.unflatten(-1, (H, K)), k.unflatten(-1, (n * H, K))
        self.v = v.unflatten(-1, (n * H, V))
        names = list(module.gate_shapes(module.config))
        self.raw = dict(
            zip(names, (x_BTD @ module.gates.first.weight.T).split(list(module.gates.first.sizes.values()), -1))
        )
        self.beta = self.raw["edit"].sigmoid()
        self.g = -module.A_log.exp() * F.softplus(self.raw["decay"] + module.dt_bias)

    def output(self, module: Any, o_BTHV: Tensor, gate: Any = F.silu) -> Tensor:
        scale = (o_BTHV.square().mean(-1, keepdim=True) + module.norm.eps).rsqrt()
        return ((o_BTHV * scale * module.norm.weight).flatten(-2) * gate(self.raw["output"])) @ module.out.weight.T


@pytest.fixture
def x_BTD() -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64)


def test_comba(x_BTD: Tensor) -> None:
    module = built("comba", head_dim=16)
    parts, b = Parts(module, x_BTD), module.feedback.sigmoid()[:, None]
    q = unit(parts.q - module.correction[:, None] * b * parts.k) / 4
    S, outputs, k = torch.zeros(B, 4, 16, 16, dtype=torch.float64), [], unit(parts.k)
    for t in range(T):
        S = S * parts.g[:, t].exp()[..., None, None]
        read = torch.einsum("bhk,bhkv->bhv", b * k[:, t], S)
        S = S + torch.einsum("bh,bhk,bhv->bhkv", parts.beta[:, t], k[:, t], parts.v[:, t] - read)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    expected = parts.output(module, torch.stack(outputs, 1), torch.sigmoid)
    assert relative_error(module(x_BTD), expected) < 1e-12


def test_gated_deltaproduct(x_BTD: Tensor) -> None:
    module = built("gated_deltaproduct", head_dim=16, num_householder=3)
    parts = Parts(module, x_BTD, 3)
    S, outputs, k = torch.zeros(B, 4, 16, 16, dtype=torch.float64), [], unit(parts.k)
    for t in range(T):
        S = S * parts.g[:, t].exp()[..., None, None]
        for j in range(3):
            key, value, beta = (x[:, t, 4 * j : 4 * (j + 1)] for x in (k, parts.v, 2 * parts.beta))
            read = torch.einsum("bhk,bhkv->bhv", key, S)
            S = S + torch.einsum("bh,bhk,bhv->bhkv", beta, key, value - read)
        outputs.append(torch.einsum("bhk,bhkv->bhv", unit(parts.q)[:, t] / 4, S))
    assert relative_error(module(x_BTD), parts.output(module, torch.stack(outputs, 1))) < 1e-12


def test_simple_gla(x_BTD: Tensor) -> None:
    module = built("simple_gla", head_dim=16)
    parts = Parts(module, x_BTD)
    S, outputs = torch.zeros(B, 4, 16, 16, dtype=torch.float64), []
    for t in range(T):
        S = S * parts.g[:, t].exp()[..., None, None]
        S = S + torch.einsum("bh,bhk,bhv->bhkv", parts.beta[:, t], unit(parts.k)[:, t], parts.v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", unit(parts.q)[:, t] / 4, S))
    assert relative_error(module(x_BTD), parts.output(module, torch.stack(outputs, 1))) < 1e-12


@pytest.mark.parametrize("taken", [False, True])
def test_rwkv7(x_BTD: Tensor, taken: bool) -> None:
    module, H, K = built("rwkv7", head_dim=16, value_residual=taken), 4, 16
    before = F.pad(x_BTD, (0, 0, 1, 0))[:, :-1]
    r_in, w_in, k_in, v_in, a_in, g_in = (x_BTD + (before - x_BTD) * mix for mix in module.mixtures.mix.chunk(6))
    low = {name: (part.down.weight.T, part.up.weight.T) for name, part in module.low_rank.items()}
    w = (-math.exp(-0.5) * ((w_in @ low["decay"][0]).tanh() @ low["decay"][1] + module.decay_bias).sigmoid()).exp()
    a = (a_in @ low["rate"][0] @ low["rate"][1] + module.rate_bias).sigmoid()
    g = (g_in @ low["gate"][0]).sigmoid() @ low["gate"][1]
    r, k, v = r_in @ module.r.weight.T, k_in @ module.k.weight.T, v_in @ module.v.weight.T
    first = torch.randn_like(v)
    if taken:
        v = v + (first - v) * (v_in @ low["value"][0] @ low["value"][1] + module.value_bias).sigmoid()
    kk, written = k * module.key_scale, k * (1 + module.key_rate * (a - 1))
    r, w, a, v, kk, written, bonus = (
        x.unflatten(-1, (H, K)) for x in (r, w, a, v, kk, written, (module.bonus * written) * r)
    )
    kk, S, outputs = unit(kk), torch.zeros(B, H, K, K, dtype=torch.float64), []
    for t in range(T):
        erased = torch.einsum("bhk,bhkv->bhv", kk[:, t], S)
        S = S * w[:, t, :, :, None] - torch.einsum("bhk,bhv->bhkv", a[:, t] * kk[:, t], erased)
        S = S + torch.einsum("bhk,bhv->bhkv", written[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], S))
    o = F.group_norm(
        torch.stack(outputs, 1).flatten(0, 1).flatten(1),
        H,
        module.norm.weight.flatten(),
        module.norm.bias.flatten(),
        1e-5 * K,
    )
    o = o.unflatten(0, (B, T)) + (bonus.sum(-1, keepdim=True) * v).flatten(-2)
    y = module(x_BTD, shared=Shared({"values of rwkv7": first}))
    assert relative_error(y, (o * g) @ module.out.weight.T) < 1e-12


@pytest.mark.parametrize(
    ("head_dim", "expected"),
    [
        (64, {"decay": 64, "rate": 64, "value": 64, "gate": 160}),
        (128, {"decay": 160, "rate": 160, "value": 96, "gate": 160}),
    ],
)
def test_ranks_of_rwkv7_follow_the_size_of_its_heads(head_dim: int, expected: dict[str, int]) -> None:
    """Those of flash-linear-attention at width 1,024; the gate's follows the width alone."""
    assert mixers["rwkv7"].Config(head_dim=head_dim).resolved(1024).ranks == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "fields", [{}, {"rank": 3, "groups": 2}, {"trapezoidal": False, "rotated": 0.0}, {"rotated": 1.0}], ids=str
)
def test_mamba3(x_BTD: Tensor, fields: dict[str, Any]) -> None:
    """The recurrence of the paper: shares of a token before and of the token itself, on a state of N × P."""
    module = built("mamba3", head_dim=32, state_dim=16, **fields)
    config, H, P, N = module.config, 4, 32, 16
    R, G, A = config.rank, config.groups, int(config.rotated * N) // 2
    sizes = [H * P, R * G * N, H, A, H * P, R * G * N, H] + [H] * config.trapezoidal
    z, C, a, turn, x, key, step, *share = (x_BTD @ module.project.weight.T).split(sizes, -1)
    step = F.softplus(step + module.dt_bias)
    share = share[0].sigmoid() if share else torch.ones_like(step)
    A_BTH = torch.where(a >= 0, 1 + a, 1 / (1 - a)).clamp_min(1e-4)
    theta = (math.pi * turn.tanh()[:, :, None] * step[..., None]).cumsum(1)  # (B, T, H, A)

    def rows(raw: Tensor, norm: Any, bias: Tensor) -> Tensor:  # (B, T, R, H, N), as complex numbers turned
        u = raw.unflatten(-1, (R, G, N))
        u = u * (u.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
        u = u.repeat_interleave(H // G, 3) + bias
        turned = torch.complex(u[..., :A], u[..., A : 2 * A]) * torch.polar(torch.ones_like(theta), theta)[:, :, None]
        return torch.cat((turned.real, turned.imag, u[..., 2 * A :]), -1)

    k, q = rows(key, module.k_norm, module.k_bias), rows(C, module.q_norm, module.q_bias)
    v, z = x.unflatten(-1, (1, H, P)), z.unflatten(-1, (1, H, P))
    if R > 1:
        v, z = v * module.v_share, z * module.z_share
    S, before, outputs = torch.zeros(B, H, N, P, dtype=torch.float64), 0.0, []
    for t in range(T):
        alpha = (-A_BTH[:, t] * step[:, t]).exp()[..., None, None]
        of_token = torch.einsum("brhn,brhp->bhnp", k[:, t], v[:, t])
        beta, gamma = (step[:, t] * f[:, t] for f in (1 - share, share))
        S = alpha * S + alpha * beta[..., None, None] * before + gamma[..., None, None] * of_token
        y = torch.einsum("brhn,bhnp->brhp", q[:, t], S) + module.skip[:, None] * v[:, t]
        y = y * F.silu(z[:, t]) * (module.y_share if R > 1 else 1.0)
        outputs.append(y.sum(1).flatten(1))
        before = of_token
    assert relative_error(module(x_BTD), torch.stack(outputs, 1) @ module.out.weight.T) < 1e-12


def test_log_linear_mamba2(x_BTD: Tensor) -> None:
    """The layer of Mamba-2, with a weight for the level of every pair of tokens."""
    module = built("log_linear", head_dim=32, state_dim=16, groups=2, levels=6)
    H, P, N = 4, 32, 16
    z, raw, step = (x_BTD @ module.project.weight.T).split([H * P, H * P + 4 * N, H], -1)
    x, key, query = convolved(raw, module.conv.weight).split([H * P, 2 * N, 2 * N], -1)
    k, q = (u.unflatten(-1, (2, N)).repeat_interleave(2, 2) for u in (key, query))
    step = F.softplus(step + module.dt_bias)
    v, g = x.unflatten(-1, (H, P)) * step[..., None], -module.A_log.exp() * step
    scales = F.softplus(module.level_scale * (x_BTD @ module.level_gate.weight.T).unflatten(-1, (H, 6)))
    outputs = []
    for t in range(T):
        levels = torch.tensor([min((t ^ s).bit_length(), 5) for s in range(t + 1)])
        decays = torch.stack([g[:, s + 1 : t + 1].sum(1) for s in range(t + 1)], 1).exp()  # (B, t + 1, H)
        weights = scales[:, t][..., levels].transpose(1, 2) * decays * (q[:, t, None] * k[:, : t + 1]).sum(-1)
        outputs.append((weights[..., None] * v[:, : t + 1]).sum(1))
    y = torch.stack(outputs, 1) + module.skip[:, None] * x.unflatten(-1, (H, P))
    y = (y.flatten(-2) * F.silu(z)).unflatten(-1, (2, -1))
    y = (y * (y.square().mean(-1, keepdim=True) + module.norm.eps).rsqrt()).flatten(-2) * module.norm.weight
    assert relative_error(module(x_BTD), y @ module.out.weight.T) < 1e-12


def test_log_linear_gdn(x_BTD: Tensor) -> None:
    """A state for every bucket of tokens before, written out as a dictionary: the smallest first level, then merged."""
    module, levels = built("log_linear_gdn", head_dim=16, levels=5), 5
    parts = Parts(module, x_BTD)
    k, q = unit(parts.k), unit(parts.q) / 4
    scales = F.softplus(module.level_scale * parts.raw["levels"].unflatten(-1, (4, levels)))
    buckets: dict[int, Tensor] = {}  # level -> (B, H, K, V)
    outputs = []
    for t in range(T):
        beta, key = parts.beta[:, t, :, None, None], k[:, t, :, :, None]
        for level, S in buckets.items():
            S = parts.g[:, t].exp()[..., None, None] * S
            buckets[level] = S - beta * key * (key * S).sum(-2, keepdim=True)
        buckets[0] = beta * key * parts.v[:, t, :, None]
        outputs.append(
            sum(scales[:, t, :, level, None] * (q[:, t, :, :, None] * S).sum(-2) for level, S in buckets.items())
        )
        level = min((t ^ (t + 1)).bit_length(), levels - 1)  # where all smaller ones go before the next token
        merged = [buckets.pop(smaller) for smaller in sorted(buckets) if smaller < level]
        buckets[level] = sum(merged) + buckets.get(level, 0.0)
    assert relative_error(module(x_BTD), parts.output(module, torch.stack(outputs, 1))) < 1e-12


@pytest.mark.reference
def test_mamba2_is_that_of_transformers(x_BTD: Tensor) -> None:
    """With mapped weights; its convolution takes the latest token last and has a bias, which is set to zero."""
    models = outside("transformers.models.mamba2.modeling_mamba2", "transformers")
    config = outside("transformers", "transformers").Mamba2Config(
        hidden_size=D, num_heads=4, head_dim=32, state_size=16, n_groups=2, expand=2, chunk_size=16, conv_kernel=4,
        layer_norm_epsilon=1e-6, rms_norm=True,
    )  # fmt: skip
    theirs = models.Mamba2Mixer(config, layer_idx=0).double()
    module = built("mamba2", head_dim=32, state_dim=16, groups=2, chunk=16)
    state = {
        "in_proj.weight": module.project.weight,
        "conv1d.weight": module.conv.weight.flip(-1)[:, None],
        "conv1d.bias": torch.zeros(len(module.conv.weight), dtype=torch.float64),
        "A_log": module.A_log,
        "D": module.skip,
        "dt_bias": module.dt_bias,
        "norm.weight": module.norm.weight,
        "out_proj.weight": module.out.weight,
    }
    theirs.load_state_dict({name: tensor.detach() for name, tensor in state.items()})
    with torch.no_grad():
        assert relative_error(module(x_BTD), theirs(x_BTD)) < 1e-5  # it computes in fp32


def fla(module: str) -> Any:
    return outside(f"fla.ops.{module}.naive", "fla-core")


@pytest.mark.reference
@pytest.mark.parametrize("kind", ["precond_gated_delta_rule", "precond_kda"])
def test_preconditioned_operation_is_that_of_fla(kind: str) -> None:
    """The operation inside the layer, with fla's in its place."""
    decay = "channel" if kind == "precond_kda" else "scalar"
    module = built("preconditioned", head_dim=16, decay=decay).float()
    x_BTD = torch.randn(B, T, D)
    raw, parts = module.gates(x_BTD), module.heads(module.qkv(x_BTD), None, None)
    q, k, v = parts
    g, beta = module.log_decay(raw["decay"]), raw["edit"].sigmoid()
    g_atk = -module.A_log_atk.exp() * F.softplus(raw["atk_decay"] + module.dt_bias_atk)
    options = {"log_atk_scale": module.log_atk_scale, "scale": 16**-0.5, "output_final_state": True, "x": 1.5}
    beta_atk = raw["atk_write"].sigmoid()
    naive = getattr(fla(kind), f"naive_recurrent_{kind}")
    expected, state, curvature = naive(
        q=4 * q, k=k, v=v, g=g, g_atk=g_atk, beta=beta, beta_atk=beta_atk, **options
    )  # fmt: skip
    cache = module.new_cache(B, T, "cpu", torch.float32)
    operands = Operands(q, k, v, g, None, beta)
    out, last = module.operate(operands, raw, None, cache)
    assert relative_error(out, expected) < 1e-5
    assert relative_error(last, state) < 1e-5
    assert relative_error(cache.further[0][:, :, 0], curvature) < 1e-5


@pytest.mark.reference
def test_comba_operation_is_that_of_fla() -> None:
    q, k, p = (
        torch.randn(B, T, 3, 8),
        F.normalize(torch.randn(B, T, 3, 8), dim=-1),
        0.5 * F.normalize(torch.randn(B, T, 3, 8), dim=-1),
    )
    v, g, beta = torch.randn(B, T, 3, 12), -torch.rand(B, T, 3), torch.rand(B, T, 3)
    expected, _ = fla("comba").naive_recurrent_comba(q, k, v, p, beta, g, scale=1.0)
    assert relative_error(delta_rule(q, k, v, g, erase_key_BTHK=p, beta_BTH=beta)[0], expected) < 1e-5


@pytest.mark.reference
def test_gated_delta_product_is_that_of_fla() -> None:
    n, H = 2, 3
    q, k = torch.randn(B, T, H, 8), F.normalize(torch.randn(B, T, n * H, 8), dim=-1)
    v, g, beta = torch.randn(B, T, n * H, 12), -torch.rand(B, T, H), torch.rand(B, T, n * H)
    q_, k_, v_, g_, _, beta_ = one_by_one(Operands(q, k, v, g, None, beta), n)
    naive = fla("gated_delta_product").naive_recurrent_gated_delta_product
    expected, _ = naive(q, k_, v_, g, beta_, scale=1.0, num_householder=n)
    assert relative_error(delta_rule(q_, k_, v_, g_, beta_BTH=beta_)[0][:, 1::2], expected) < 1e-5


@pytest.mark.reference
def test_erasing_and_writing_is_that_of_fla() -> None:
    """The recurrence of RWKV-7: a diagonal plus a matrix of rank one."""
    q, k, v, e, p = (torch.randn(B, T, 3, 8) for _ in range(5))
    g, e = -0.6 * torch.rand(B, T, 3, 8), F.normalize(e, dim=-1)
    p = e * p.sigmoid()
    naive = outside("fla.ops.generalized_delta_rule.dplr.naive", "fla-core").dplr_recurrence
    expected, state = naive(*(x.transpose(1, 2) for x in (8**0.5 * q, k, v, -e, p, g)))
    out, last = erase_and_write(q, k, v, g, p, e)
    assert relative_error(out, expected.transpose(1, 2)) < 1e-5
    assert relative_error(last, state) < 1e-5


@pytest.mark.reference
def test_linear_attention_is_that_of_fla() -> None:
    q, k, v, g = torch.randn(B, T, 3, 8), torch.randn(B, T, 3, 8), torch.randn(B, T, 3, 12), -torch.rand(B, T, 3)
    expected = fla("simple_gla").naive_recurrent_simple_gla(q, k, v, g, scale=1.0)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert relative_error(linear_attention(q, k, v, g)[0], expected) < 1e-5


def test_edits_of_a_product_beside_padding_are_finite() -> None:
    module = built("gated_deltaproduct", head_dim=16)
    segments = torch.full((1, 8), -1)
    assert module(torch.randn(1, 8, D, dtype=torch.float64), segments=segments).isfinite().all()
