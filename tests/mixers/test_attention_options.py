"""Options of softmax attention and differential attention against their equations, token by token in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.contract import Mixer, mixers

WIDTH, T = 32, 11


def build(kind: str = "full", **fields: Any) -> Any:
    """A mixer in fp64 without rotation, whose parameters are random."""
    cls = mixers[kind]
    mixer = cls(cls.Config.parse({"head_dim": 8, "rotary": False, **fields}).resolved(WIDTH), WIDTH).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return mixer


def inputs() -> Tensor:
    return torch.randn(T, WIDTH, dtype=torch.float64)


def heads(mixer: Any, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(T, H, K), (T, G, K), (T, G, K)"""
    q, k, v = (x_TD @ mixer.qkv.weight.T).split([n * mixer.K for n in (mixer.H, mixer.G, mixer.G)], dim=1)
    return q.view(T, -1, mixer.K), k.view(T, -1, mixer.K), v.view(T, -1, mixer.K)


def softmax_output(q_TK: Tensor, k_TK: Tensor, v_TV: Tensor, t: int) -> Tensor:
    """(V,) of the query at t."""
    return (k_TK[: t + 1] @ q_TK[t] / q_TK.shape[1] ** 0.5).softmax(0) @ v_TV[: t + 1]


def assert_computes(mixer: Mixer, x_TD: Tensor, outputs: list[list[Tensor]]) -> None:
    """``outputs[t][h]`` are what the heads give to the output projection."""
    expected = torch.stack([torch.cat(of_token) for of_token in outputs]) @ mixer.out.weight.T  # type: ignore[union-attr]
    torch.testing.assert_close(mixer(x_TD[None])[0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_an_output_gate_is_a_sigmoid_of_the_input(gate: str) -> None:
    mixer, x = build(output_gate=gate, kv_heads=2), inputs()
    q, k, v = heads(mixer, x)
    gates = torch.sigmoid(x @ mixer.gate.weight.T).view(T, mixer.H, -1)
    outputs = [
        [gates[t, h] * softmax_output(q[:, h], k[:, h // 2], v[:, h // 2], t) for h in range(mixer.H)] for t in range(T)
    ]
    assert_computes(mixer, x, outputs)


def test_exclusive_attention_has_nothing_along_the_value() -> None:
    mixer, x = build(exclusive=True, kv_heads=2), inputs()
    q, k, v = heads(mixer, x)
    outputs = []
    for t in range(T):
        of_token = []
        for h in range(mixer.H):
            own, o = v[t, h // 2], softmax_output(q[:, h], k[:, h // 2], v[:, h // 2], t)
            of_token.append(o - (o @ own) / (own @ own) * own)
        outputs.append(of_token)
    assert_computes(mixer, x, outputs)
    assert not mixer(x[None])[0, 0].any(), "a first token sees itself alone"


def test_a_convolution_is_added_to_keys_and_values() -> None:
    mixer, x = build(convolution="keys_values"), inputs()
    q, k, v = heads(mixer, x)
    convolved = []
    for name, z in (("k", k), ("v", v)):
        taps = mixer.convolutions[name].weight.view(mixer.G, mixer.K, 4)
        convolved.append(
            torch.stack([z[t] + sum(taps[..., j] * z[t - j] for j in range(min(4, t + 1))) for t in range(T)])
        )
    k, v = convolved
    assert_computes(
        mixer, x, [[softmax_output(q[:, h], k[:, h], v[:, h], t) for h in range(mixer.H)] for t in range(T)]
    )


@pytest.mark.parametrize(("n", "groups"), [(4, 4), (4, 2), (8, 4)])
def test_differential_attention_is_a_difference_of_two_softmaxes(n: int, groups: int) -> None:
    mixer, x = build("differential", heads=n, kv_heads=groups, lambda_init=0.7), inputs()
    q, k, v = heads(mixer, x)
    a1, b1, a2, b2 = mixer.vectors
    share = (a1 @ b1).exp() - (a2 @ b2).exp() + 0.7
    per_key, outputs = n // groups, []
    for t in range(T):
        of_token = []
        for pair in range(groups // 2):
            value = torch.cat((v[:, 2 * pair], v[:, 2 * pair + 1]), dim=1)
            for s in range(per_key):
                first, second = (
                    softmax_output(q[:, (2 * pair + j) * per_key + s], k[:, 2 * pair + j], value, t) for j in (0, 1)
                )
                o = first - share * second
                of_token.append(0.3 * o / (o.square().mean() + 1e-6).sqrt() * mixer.head_norm.weight)
        outputs.append(of_token)
    assert_computes(mixer, x, outputs)
