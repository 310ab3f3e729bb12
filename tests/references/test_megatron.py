"""Losses and choices of the router, and the loss of a token index, against the functions of Megatron-LM."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from outside import outside
from torch import Tensor

from workbench.contract import AuxOutputs
from workbench.feedforwards.moe import MixtureOfExperts
from workbench.ops.sparse_attention import document_starts
from workbench.ops.token_index import IndexKeys, index_divergence, select_tokens
from workbench.ops.token_index.reference import index_scores
from workbench.testing import FeedForwardConformance

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore:Transformer Engine and Apex")]
N, E, K = 96, 8, 2


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    return outside("megatron.core.transformer.moe.moe_utils", "megatron-core")


def module(**case: Any) -> MixtureOfExperts:
    settings = {"experts": E, "top_k": K, "balance_weight": 0.0, **case}
    suite: Any = type("Suite", (FeedForwardConformance,), {"name": "moe"})()
    return suite.build(settings)


def routed(layer: MixtureOfExperts) -> tuple[Tensor, Tensor, AuxOutputs]:
    """A random micro-batch whose last quarter is padding, with 3 units of scale, so that loads differ."""
    x_1ND = 3 * torch.randn(1, N, 64, dtype=torch.float64)
    segments = torch.where(torch.arange(N) < N * 3 // 4, 0, -1)[None]
    aux = AuxOutputs()
    layer(x_1ND, segments=segments, aux=aux)
    return x_1ND[0], segments[0] >= 0, aux


def test_z_loss(megatron: ModuleType) -> None:
    layer = module(z_weight=1e-3)
    x_ND, valid_N, aux = routed(layer)
    logits_NE, _ = layer.router.scores(x_ND)
    expected = megatron.z_loss_func(logits_NE, 1e-3, padding_mask=~valid_N)
    assert float(sum(aux.losses).detach()) == pytest.approx(float(expected.detach()), rel=1e-12)


def test_balance_loss(megatron: ModuleType) -> None:
    layer = module(balance_weight=0.01)
    x_ND, valid_N, aux = routed(layer)
    _, probability_NE = layer.router.scores(x_ND)
    ((counter, counts_E, share_E),) = aux.counts
    expected = megatron.switch_load_balancing_loss_func(
        probability_NE, counts_E.double(), int(valid_N.sum()), K, E, 0.01, padding_mask=valid_N
    )
    assert float(counter.step_loss(counts_E, share_E).detach()) == pytest.approx(float(expected.detach()), rel=1e-12)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_gates_and_choices(score: str, renormalise: bool, megatron: ModuleType) -> None:
    layer = module(score=score, renormalise=renormalise)
    x_ND = torch.randn(N, 64, dtype=torch.float64)
    routing = layer.router(x_ND)
    logits_NE, _ = layer.router.scores(x_ND)
    # a softmax over the chosen logits is the renormalised softmax over all; sigmoids are always renormalised there
    pre = score == "softmax" and not renormalise
    gates_NE, chosen_NE = megatron.topk_routing_with_score_function(
        logits_NE, K, use_pre_softmax=pre, score_function=score
    )
    ours_NE = torch.zeros(N, E, dtype=torch.float64).scatter(1, routing.topk_expert_ids_NK, routing.topk_scores_NK)
    if score == "sigmoid" and not renormalise:
        ours_NE = ours_NE / ours_NE.sum(-1, keepdim=True)
    assert torch.equal(ours_NE > 0, chosen_NE)
    assert torch.allclose(ours_NE, gates_NE.double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sparse", [False, True])
def test_loss_of_a_token_index(sparse: bool) -> None:
    """Theirs is in fp32, with 1e-10 added to both distributions, which is little beside those of small scores."""
    dsa = outside("megatron.core.transformer.experimental_attention_variant.dsa", "megatron-core")
    B, T, H, K, n = 2, 21, 4, 8, 5
    index = IndexKeys(torch.randn(B, T, 3, 6), torch.randn(B, T, 6), 0.2 * torch.randn(B, T, 3))
    q_BTHK, k_BTHK = torch.randn(B, T, H, K), torch.randn(B, T, H, K)
    start_BT = document_starts(None, B, T, q_BTHK.device)
    tokens_BTn = select_tokens(index, count=n, start_BT=start_BT)
    kl_BT = index_divergence(index, q_BTHK, k_BTHK, tokens_BTn if sparse else None, start_BT=start_BT, scale=0.3)
    scores_BTT = torch.stack([index_scores(*of_row) for of_row in zip(*index)])
    scores_BTT = scores_BTT.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    # the first queries select all tokens that they see: theirs fill up with tokens that the causal mask hides
    chosen_BTn = torch.where(tokens_BTn >= 0, tokens_BTn, T - 1).long()
    one_rank = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    queries, keys = q_BTHK.transpose(0, 1), k_BTHK.transpose(0, 1)
    expected = dsa.compute_dsa_indexer_loss(scores_BTT, chosen_BTn, queries, keys, 0.3, 0.5, sparse, one_rank)
    assert 0.5 * float(kl_BT.mean()) == pytest.approx(float(expected), rel=1e-5)
