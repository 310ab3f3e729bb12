"""Expert choice against dense mathematics; it is not causal, and everything that reports a run says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from feedforwards.moe_reference import WIDTH, build, dense_mixture
from helpers import make_run, run_fields, write_corpus

from workbench.ablation.arms import resolve
from workbench.ablation.cost.card import cost_table
from workbench.ablation.spec.ablation import AblationConfig
from workbench.contract import feedforwards
from workbench.training.trial import train

SETTINGS = {"experts": 4, "top_k": 2, "hidden": 16}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_experts_take_their_best_tokens() -> None:
    module, x_BTD = build("moe_expert_choice", **SETTINGS), torch.randn(1, 16, WIDTH).double()
    scores_NC = module.router.scores(x_BTD[0])[1]
    gates_NC = torch.zeros_like(scores_NC).scatter(0, scores_NC.topk(8, dim=0).indices, 1.0) * scores_NC
    assert torch.allclose(module(x_BTD)[0], dense_mixture(module, x_BTD[0], gates_NC), rtol=1e-10, atol=1e-12)


def test_later_tokens_change_earlier_outputs() -> None:
    module, x_BTD = build("moe_expert_choice", **SETTINGS), torch.randn(1, 16, WIDTH).double()
    changed_BTD = x_BTD.clone()
    changed_BTD[:, 8:] *= -3
    assert not torch.equal(module(changed_BTD)[:, :8], module(x_BTD)[:, :8])
    assert not feedforwards["moe_expert_choice"].capabilities.causal


def test_a_run_says_that_it_is_not_causal(corpus: Path, tmp_path: Path) -> None:
    model = {"feedforward": "moe_expert_choice"}
    fields = run_fields(corpus, model=model, training={"tokens": 4 * 64}, allow_document_leaks=True)
    folder = make_run(tmp_path / "run", tmp_path / "cache", fields)
    assert train(folder.path, tmp_path / "cache")["reason"] == (
        "not causal: moe_expert_choice sees later tokens; moe_expert_choice sees the other documents of a row"
    )


def test_the_cost_card_says_that_it_is_not_causal(corpus: Path) -> None:
    choice = {"model.feedforward": "moe_expert_choice", "allow_document_leaks": True}
    arms = {"moe": {"model.feedforward": "moe"}, "choice": choice}
    fields = {"name": "leak", "base": run_fields(corpus), "arms": arms, "baseline": "moe"}
    arms = resolve(AblationConfig.parse({**fields, "tuning": {"trials": 0, "space": {}}}))
    mismatch = dict(cost_table(arms).select("arm", "mismatch").iter_rows())
    assert mismatch == {"moe": "", "choice": "not causal, sees later tokens: moe_expert_choice"}
