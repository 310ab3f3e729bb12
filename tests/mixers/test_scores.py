"""Queries and keys that mixers give for their largest scores: those that attention receives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from workbench.mixers.families import latent, softmax
from workbench.model import LanguageModel, ModelConfig

SEGMENTS = torch.tensor([[0] * 10 + [1] * 6])


def mixer_of(kind: str, settings: dict[str, Any]) -> torch.nn.Module:
    config = ModelConfig.parse(
        {"width": 64, "depth": 1, "vocabulary": 300, "pattern": kind, "mixers": {kind: settings} if settings else {}}
    )
    return LanguageModel(config, seed=0).blocks[0].get_submodule("mixer")


@pytest.mark.parametrize(
    ("kind", "settings", "owner", "name"),
    [
        ("full", {}, softmax, "attention"),
        ("full", {"kv_heads": 1, "qk_norm": True}, softmax, "attention"),
        ("sliding", {"window": 5}, softmax, "attention"),
        ("full", {"softcap": 2.0}, softmax, "visible_block_attention"),
        ("mla", {}, latent, "visible_block_attention"),
        ("mla", {"query_latent": 24, "latent_scale": True, "window": 6}, latent, "visible_block_attention"),
        ("grouped_latent", {}, latent, "visible_block_attention"),
    ],
)
def test_scores_are_those_of_attention(
    kind: str, settings: dict[str, Any], owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer, seen = mixer_of(kind, settings), []
    attend = getattr(owner, name)
    monkeypatch.setattr(
        owner, name, lambda q, k, *more, **named: seen.append((q, k, named)) or attend(q, k, *more, **named)
    )
    x_BTD = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    mixer(x_BTD, segments=SEGMENTS)
    (scores,), ((q, k, named),) = mixer.scores(x_BTD, segments=SEGMENTS), seen
    assert torch.equal(scores.q_BTHK, q) and torch.equal(scores.k_BTGK, k)
    assert (scores.window, scores.scale) == (named.get("window"), named.get("scale"))


@pytest.mark.parametrize(("kind", "number"), [("nsa", 2), ("moba", 1), ("asa_global", 1), ("gdn", 0)])
def test_sparse_mixers_give_what_they_may_select(kind: str, number: int) -> None:
    x_BTD = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    scores = mixer_of(kind, {}).scores(x_BTD, segments=SEGMENTS)
    assert len(scores) == number
    assert all(inputs.q_BTHK.shape[:2] == inputs.k_BTGK.shape[:2] == (1, 16) for inputs in scores)
