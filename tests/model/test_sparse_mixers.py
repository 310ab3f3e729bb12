"""Latent and sparse attention layers: equal forms, caches of the size that the formulas say, gates, injected blocks,
checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from workbench.accounting import account
from workbench.config import ConfigError
from workbench.contract import AuxOutputs, mixers
from workbench.layers import INIT_SCALE, Pooling
from workbench.mixers.families.sparse import Selection
from workbench.model import LanguageModel, ModelConfig
from workbench.ops.sparse_attention.reference import attend_reference, select_reference, selected_tokens, window_tokens
from workbench.testing import MixerConformance, count_flops, relative_error


def build(name: str, width: int = 64, **settings: Any) -> Any:
    suite = type("Suite", (MixerConformance,), {"name": name, "width": width})()
    return suite.build(settings)


@pytest.mark.parametrize("name", ["mla", "grouped_latent", "asa_local"])
@pytest.mark.parametrize(
    "settings", [{}, {"latent_scale": True, "query_latent": 20, "rotary_dim": 0}, {"sink": True, "window": 5}]
)
def test_absorbed_is_expanded_in_values_and_gradients(name: str, settings: dict[str, Any]) -> None:
    pair = [build(name, form=form, **settings) for form in ("expanded", "absorbed")]
    x_BTD = torch.randn(2, 21, 64, dtype=torch.float64).requires_grad_()
    outputs = [module(x_BTD) for module in pair]
    assert relative_error(*outputs) < 1e-12
    weight = torch.randn_like(outputs[0])
    names = [name for name, _ in pair[0].named_parameters()]
    a, b = (torch.autograd.grad((y * weight).sum(), [x_BTD, *m.parameters()]) for y, m in zip(outputs, pair))
    for name, got, wanted in zip(["x", *names], a, b):
        assert relative_error(got, wanted) < 1e-11, name


def test_latents_are_multiplied_by_the_root_of_the_ratio_of_widths() -> None:
    plain, scaled = (
        build("mla", latent_dim=16, query_latent=4),
        build("mla", latent_dim=16, query_latent=4, latent_scale=True),
    )
    scaled.load_state_dict(plain.state_dict())
    x_BTD = torch.randn(1, 5, 64, dtype=torch.float64)
    (q, _, c, _), (q_scaled, _, c_scaled, _) = plain.project(x_BTD), scaled.project(x_BTD)
    assert relative_error(c_scaled, 2 * c) < 1e-14 and relative_error(q_scaled, 4 * q) < 1e-14


@pytest.mark.parametrize("latent_scale", [False, True])
def test_keys_queries_and_values_start_equally_large_whatever_the_latents_width(latent_scale: bool) -> None:
    """The standard deviation of all of them is INIT_SCALE, that of a projection of the normalised input."""
    settings = {"latent_dim": 16, "query_latent": 64, "heads": 4, "head_dim": 64, "rotary_dim": 64}
    module = build("mla", width=512, latent_scale=latent_scale, **settings)
    q_n, q_r, c, kr = module.project(torch.randn(4, 500, 512, dtype=torch.float64))
    keys, v = module.project.expanded(c, kr)
    for name, part in {"q": q_n, "rotary q": q_r, "k": keys[..., :64], "rotary k": kr, "v": v}.items():
        assert float(part.detach().std()) == pytest.approx(INIT_SCALE, rel=0.06), name


def test_the_factor_changes_how_strongly_updates_act_and_not_the_start() -> None:
    """The same random numbers, divided by the factor: without positions in the latent, the same function."""
    settings = {"latent_dim": 16, "query_latent": 4}
    plain, scaled = (build("mla", latent_scale=on, **settings) for on in (False, True))
    x_BTD = torch.randn(1, 9, 64, dtype=torch.float64)
    assert relative_error(scaled(x_BTD), plain(x_BTD)) < 1e-13
    step = torch.randn_like(plain.project.up.weight) * 1e-3
    with torch.no_grad():
        before = [module.project.expanded(*module.project(x_BTD)[2:])[1] for module in (plain, scaled)]
        for module in (plain, scaled):
            module.project.up.weight.add_(step)
        after = [module.project.expanded(*module.project(x_BTD)[2:])[1] for module in (plain, scaled)]
    assert relative_error(after[1] - before[1], 2 * (after[0] - before[0])) < 1e-9


def test_scaled_latent_attention_is_that_of_longcat_flash() -> None:
    """The order of operations of the released model: norm, then sqrt(d / d_q) and sqrt(d / d_kv); values are scaled
    with the latent, the shared rotary key is not. Written out here."""
    d, H, N, R, d_q, d_kv, T = 64, 4, 16, 8, 20, 24, 11
    settings = {
        "heads": H,
        "head_dim": N,
        "rotary_dim": R,
        "query_latent": d_q,
        "latent_dim": d_kv,
        "latent_scale": True,
    }
    module, x = build("mla", **settings), torch.randn(T, d, dtype=torch.float64)
    state = dict(module.named_parameters())

    def norm(c: Tensor, gain: Tensor) -> Tensor:
        return c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    def rotated(y: Tensor) -> Tensor:  # (T, …, R)
        angle = torch.outer(torch.arange(T, dtype=y.dtype), 10_000.0 ** (-torch.arange(0, R, 2, dtype=y.dtype) / R))
        turn = torch.polar(torch.ones_like(angle), angle).view(T, *[1] * (y.ndim - 2), R // 2)
        z = torch.complex(y[..., : R // 2], y[..., R // 2 :]) * turn
        return torch.cat((z.real, z.imag), dim=-1)

    q = norm(x @ state["project.q_down.weight"].T, state["project.q_norm.weight"]) @ state["project.q.weight"].T
    q = q.view(T, H, N + R) * (d / d_q) ** 0.5
    c, kr = (x @ state["project.down.weight"].T).split((d_kv, R), dim=-1)
    c = norm(c, state["project.norm.weight"]) * (d / d_kv) ** 0.5
    k, v = (c @ state["project.up.weight"].T).view(T, H, 2 * N).split((N, N), dim=-1)
    scores = torch.einsum("thn,shn->hts", q[..., :N], k) + torch.einsum("thr,sr->hts", rotated(q[..., N:]), rotated(kr))
    scores = (scores / (N + R) ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    wanted = torch.einsum("hts,shn->thn", scores.softmax(-1), v).reshape(T, -1) @ state["out.weight"].T
    assert relative_error(module(x[None])[0], wanted) < 1e-12


@pytest.mark.parametrize("name", ["nsa", "moba", "asa_global"])
def test_the_operators_register_the_flops_that_are_counted(name: str) -> None:
    """For one document, as torch's counter sees only shapes."""
    module, x_BTD = build(name), torch.randn(2, 90, 64, dtype=torch.float64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x_BTD)
    assert counter.get_total_flops() == count_flops(lambda: module(x_BTD))


PLAIN: dict[str, Any] = {
    "compress": "mean",
    "compress_length": 8,
    "compress_stride": 4,
    "select_block": 8,
    "select_blocks": 3,
    "local_blocks": 1,
    "window": 6,
    "heads": 4,
    "kv_heads": 2,
    "rotary": False,
}


@pytest.mark.parametrize("kv", ["shared", "per_branch"])
@pytest.mark.parametrize("gate", ["head", "token", "softmax"])
def test_nsa_is_the_sum_of_its_gated_branches(kv: str, gate: str) -> None:
    """Against the plain loops, projections taken from the layer."""
    module = build("nsa", kv=kv, gate=gate, **PLAIN)
    T, H, G, K = 30, 4, 2, 16
    x_TD = torch.randn(T, 64, dtype=torch.float64)
    q = module.q(x_TD).view(T, H, K)
    sets = module.kv(x_TD).view(T, -1, 2, G, K)
    cmp, slc, win = (sets[:, i if kv == "per_branch" else 0].unbind(1) for i in range(3))
    pooled = [torch.stack([x[i : i + 8].mean(0) for i in range(0, T - 7, 4)]) for x in cmp]
    seen = [[[i for i in range(len(pooled[0])) if 4 * i + 7 <= p]] * G for p in range(T)]
    chosen = select_reference(q, pooled[0], length=8, stride=4, block=8, count=3, initial=1, local=1, scale=K**-0.5)
    branches = [
        attend_reference(q, *pooled, seen, K**-0.5),
        attend_reference(q, *slc, selected_tokens(chosen, 8), K**-0.5),
        attend_reference(q, *win, window_tokens(T, G, 6), K**-0.5),
    ]
    raw = (module.gate(x_TD)).view(T, 3, -1)
    gates = raw.softmax(1) if gate == "softmax" else raw.sigmoid()
    wanted = module.out(sum(b * gates[:, i, :, None] for i, b in enumerate(branches)).reshape(T, H * K))
    assert relative_error(module(x_TD[None])[0], wanted) < 1e-12
    selection = module.selection(x_TD[None]).indices[0]
    picked = [[[j for j in row if j >= 0] for row in groups] for groups in selection.tolist()]
    assert picked == chosen


def test_a_layer_attends_its_own_selection_given_as_an_argument() -> None:
    module, x_BTD = build("nsa", **PLAIN), torch.randn(2, 30, 64, dtype=torch.float64)
    assert torch.equal(module(x_BTD, selection=module.selection(x_BTD)), module(x_BTD))


@pytest.mark.parametrize("reuse", [1, 4])
def test_a_layer_attends_the_selection_of_another_one(reuse: int) -> None:
    first, second = (build("nsa", reuse=reuse, **PLAIN) for _ in range(2))
    with torch.no_grad():
        second.q.weight.neg_()
    x_BTD = torch.randn(2, 30, 64, dtype=torch.float64)
    selection = first.selection(x_BTD)
    assert selection.reuse == reuse
    shared = second(x_BTD, selection=selection)
    assert not torch.allclose(shared, second(x_BTD))
    assert torch.equal(shared, second(x_BTD, selection=Selection(selection.indices)))


def test_the_local_block_alone_is_another_function() -> None:
    module, x_BTD = build("nsa", **PLAIN), torch.randn(2, 30, 64, dtype=torch.float64)
    local = (torch.arange(30) // 8)[None, :, None, None].expand(2, 30, 2, 1).int()
    assert not torch.allclose(module(x_BTD, selection=Selection(local)), module(x_BTD))


def test_all_blocks_are_dense_selection() -> None:
    module, x_BTD = build("nsa", **PLAIN), torch.randn(2, 30, 64, dtype=torch.float64)
    everything = torch.arange(4, dtype=torch.int32).expand(2, 30, 2, 4)
    dense = build("nsa", **{**PLAIN, "select_blocks": 4})
    assert relative_error(module(x_BTD, selection=Selection(everything)), dense(x_BTD)) < 1e-12


@pytest.mark.parametrize("branch", ["compression", "selection", "window"])
def test_a_branch_left_out_is_a_branch_whose_gate_is_closed(branch: str) -> None:
    kept = [name for name in ("compression", "selection", "window") if name != branch]
    whole, part = build("nsa", kv="shared", **PLAIN), build("nsa", kv="shared", branches=kept, **PLAIN)
    state = whole.state_dict()
    at = ["compression", "selection", "window"].index(branch)
    with torch.no_grad():
        gate_c = whole.gate.weight.view(3, 4, 64)
        whole.gate.bias.view(3, 4)[at] = -1e9
        rest = [i for i in range(3) if i != at]
        part.load_state_dict(
            {
                **state,
                "gate.weight": gate_c[rest].flatten(0, 1),
                "gate.bias": whole.gate.bias.view(3, 4)[rest].flatten(),
            }
        )
    x_BTD = torch.randn(1, 30, 64, dtype=torch.float64)
    assert relative_error(part(x_BTD), whole(x_BTD)) < 1e-13


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
def test_pooling_starts_as_the_mean(kind: str) -> None:
    pooling = Pooling(kind, 4, 6)
    for owner in pooling.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            with torch.no_grad():
                owner.init_parameter(name, parameter, torch.Generator().manual_seed(1))  # type: ignore[operator]
                if name == "position":
                    parameter.zero_()
    x = torch.randn(2, 3, 2, 6, 4)
    assert torch.allclose(pooling(x), x.mean(-1), atol=1e-6)
    assert sum(p.numel() for p in pooling.parameters()) == Pooling.parameters_of(kind, 4, 6)


DECODED: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    # lengths around multiples of what divides them: block, stride, window, reuse
    (
        "nsa",
        {"compress_length": 8, "compress_stride": 4, "select_block": 8, "select_blocks": 3, "window": 6, "reuse": 4},
        (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 14, 15, 16, 17, 18),
    ),
    (
        "nsa",
        {
            "compress_length": 6,
            "compress_stride": 3,
            "select_block": 3,
            "select_blocks": 4,
            "window": 5,
            "kv": "shared",
            "compress": "linear",
            "compress_rope": "after",
        },
        (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13),
    ),
    ("asa_global", {"block": 4, "select_blocks": 3, "reuse": 4}, (1, 2, 3, 4, 5, 6, 7, 8, 9)),
    ("moba", {"block": 4, "top_k": 2}, (1, 3, 4, 5, 7, 8, 9)),
]


@pytest.mark.parametrize(("name", "settings", "cuts"), DECODED)
def test_prefill_is_decode_at_every_length_near_a_block(
    name: str, settings: dict[str, Any], cuts: tuple[int, ...]
) -> None:
    module = build(name, **settings)
    x_BTD = torch.randn(2, 22, 64, dtype=torch.float64)
    with torch.no_grad():
        wanted = module(x_BTD)
        for cut in cuts:
            cache = module.new_cache(2, 22, "cpu", torch.float64)
            parts = [
                module(x_BTD[:, :cut], cache=cache),
                *(module(x_BTD[:, t : t + 1], cache=cache) for t in range(cut, 22)),
            ]
            assert relative_error(torch.cat(parts, 1), wanted) < 1e-10, cut


SHIPPED = ["full", "sliding", "mla", "grouped_latent", "nsa", "asa_local", "asa_global", "moba"]


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("length", [1, 5, 16, 40, 97])
def test_caches_are_as_large_as_the_formulas_say(name: str, length: int) -> None:
    module, cls = build(name, width=128), mixers[name]
    config = cls.Config.parse(cls.Config.defaults_at("tiny", {})).resolved(128)
    cache = module.new_cache(1, length, "cpu", torch.float32)
    with torch.no_grad():
        module.float()(torch.randn(1, length, 128), cache=cache)
    cost = cls.cost(config, 128, length, element_bytes=4)
    assert sum(t.numel() * t.element_size() for t in cache.tensors()) == cost.cache_bytes
    assert cost.unevicted_bytes is None or cost.unevicted_bytes >= cost.cache_bytes


def elements(pattern: str, scale: str, length: int, **settings: Any) -> tuple[float, float]:
    """Bytes of cache for a token and layer in bf16, with and without eviction."""
    name = settings.pop("kind", pattern.split()[0])
    config = ModelConfig(scale=scale, pattern=pattern, mixers={name: settings} if settings else {})
    cost = account(config, length, element_bytes=2)
    return cost.cache_bytes / length / len(config.layers), cost.unevicted_bytes / length / len(config.layers)


def test_cache_of_a_token_and_layer() -> None:
    """The formulas at 340m, 8,192 tokens, bf16, heads of 64, 16 query and 4 key–value heads; written out
    independently."""
    T, w, d = 8192, 512, 16
    heads = {"heads": 16, "head_dim": 64}
    assert elements("full", "340m", T, **heads) == (4096, 4096)
    assert elements("full", "340m", T, kv_heads=4, **heads) == (1024, 1024)
    assert elements("full", "340m", T, kv_heads=1, **heads) == (256, 256)
    assert elements("mla", "340m", T) == elements("grouped_latent", "340m", T) == (2 * 288, 2 * 288)
    a_set, pooled, tail = 2 * 2 * 4 * 64, (T - 32) // d + 1, 32
    shared = a_set * (1 + (pooled + tail) / T)
    assert elements("nsa", "340m", T, kv="shared") == pytest.approx((shared, shared), rel=1e-12)
    apart = a_set * (1 + w / T + (pooled + tail) / T), a_set * (2 + (pooled + tail) / T)
    assert elements("nsa", "340m", T) == pytest.approx(apart, rel=1e-12)
    local = 576 * w / T, 576
    whole = 576 * (1 + (T // 16 + 16) / T) + 4 * 4 * 64 / T  # the shared selection: int32 indices
    asa = elements("asa_local asa_global", "340m", T)
    assert asa == pytest.approx(((local[0] + whole) / 2, (local[1] + whole) / 2), rel=1e-12)
    assert asa[0] < apart[0] / 2 and asa[1] < apart[1] / 2, "at most half of NSA's, like against like"


@pytest.mark.parametrize("pattern", ["nsa", "asa_local asa_global", "mla", "grouped_latent", "moba"])
@pytest.mark.parametrize("scale", ["340m", "1.3b"])
def test_named_scales_are_counted(pattern: str, scale: str) -> None:
    config = ModelConfig(scale=scale, pattern=pattern)
    with torch.device("meta"):
        model = LanguageModel(config)
    assert sum(p.numel() for p in model.parameters()) == account(config, 2048).parameters


def test_parameters_are_those_of_the_formulas() -> None:
    """One layer at 340m: multiples of the width written out."""
    d, H, K, G = 1024, 16, 64, 4
    config = ModelConfig(scale="340m", pattern="nsa")
    phi = 2 * (32 * K + 32 * K * 4 * K + 4 * K + 4 * K * K + K)
    nsa = d * K * (2 * H + 2 * G) + 2 * (2 * d * G * K) + 3 * H * (d + 1) + phi
    cost = mixers["nsa"].cost(config.layers[0].mixer, d, 64)
    assert cost.parameters == nsa == pytest.approx(4.81e6, rel=2e-3)
    latent = {"mla": (1, 256), "grouped_latent": (4, 64)}
    for name, (h, c) in latent.items():
        layer = ModelConfig(scale="340m", pattern=name).layers[0].mixer
        wanted = d * H * (K + 32) + d * (h * c + 32) + H * 2 * K * c + H * K * d + h * c
        assert mixers[name].cost(layer, d, 64).parameters == wanted


def test_diagnostics_tell_gates_and_distance() -> None:
    for name in ("nsa", "asa_global"):
        aux = AuxOutputs()
        build(name)(torch.randn(1, 90, 64, dtype=torch.float64), aux=aux)
        assert {"gate_compression", "gate_selection", "selected_distance"} <= set(aux.metrics)
        assert all(number.value.dim() == 0 and number.value.isfinite() for number in aux.metrics.values())


@pytest.mark.parametrize(
    ("pattern", "settings", "path", "hint"),
    [
        ("nsa", {"compress_stride": 12}, "compress_length", "Nearest compress_stride: 8"),
        ("nsa", {"select_block": 24, "compress_length": 16}, "select_block", "multiple of compress_stride=16"),
        ("nsa", {"select_blocks": 2}, "select_blocks", "Set select_blocks: 3 or more"),
        ("nsa", {"reuse": 3}, "reuse", "Nearest: "),
        ("nsa", {"branches": []}, "branches", "compression, selection, window"),
        ("nsa", {"branches": ["selection", "window"]}, "compress", "set compress: mean"),
        ("nsa", {"head_dim": 8}, "head_dim", "Nearest: 16"),
        ("nsa", {"window": 0}, "window", "leave it out of ``branches``"),
        ("nsa", {"kv_heads": 3}, "kv_heads", "Nearest: "),
        ("mla", {"latents": 3}, "latents", "Nearest: "),
        ("mla", {"rotary_dim": 3}, "rotary_dim", "a multiple of 2"),
        ("grouped_latent", {"window": 0}, "window", "greater than or equal to 1"),
        ("asa_global", {"reuse": 5}, "reuse", "divisor of block=16"),
        ("asa_global", {"select_blocks": 1}, "select_blocks", "3 or more"),
        ("moba", {"top_k": 0}, "top_k", "greater than or equal to 1"),
        ("full", {"rotary_dim": 512}, "rotary_dim", "rotary: false"),
        ("full", {"softcap": -1.0}, "softcap", "greater than 0"),
    ],
)
def test_settings_that_cannot_be_built(pattern: str, settings: dict[str, Any], path: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ModelConfig(scale="340m", pattern=pattern, mixers={pattern: settings})
    assert raised.value.problems[0].path == f"mixers.{pattern}.{path}", raised.value
    assert hint in str(raised.value)
