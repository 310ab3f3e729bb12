"""QK-clip: what a factor does to the scores of a head, bounds after a step, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_tokens, small_model

from workbench.config import ConfigError
from workbench.contract import AuxOutputs, Mixer, mixers
from workbench.model import LanguageModel
from workbench.training import RunConfig
from workbench.training.qk_clip import QKClip, QKClipConfig

CASES: dict[str, dict[str, Any]] = {
    "full": {"pattern": "full", "mixers": {"full": {"heads": 4, "softcap": 2.0, "sink": True, "rotary_dim": 8}}},
    "grouped queries": {"pattern": "full", "mixers": {"full": {"heads": 4, "kv_heads": 2}}},
    "sliding": {"pattern": "sliding", "mixers": {"sliding": {"heads": 4, "window": 5}}},
    "mla": {"pattern": "mla", "mixers": {"mla": {"heads": 4, "head_dim": 8, "query_latent": 24, "form": "absorbed"}}},
    "latents": {"pattern": "grouped_latent", "mixers": {"grouped_latent": {"heads": 4, "head_dim": 8}}},
    "no rotation": {"pattern": "mla", "mixers": {"mla": {"heads": 4, "head_dim": 8, "rotary_dim": 0}}},
}


def first_mixer(model: LanguageModel) -> Mixer:
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, Mixer)
    return mixer


def outputs(model: LanguageModel, tokens_BT: torch.Tensor) -> list[AuxOutputs]:
    """Auxiliary outputs of the blocks, with the largest score of every head."""
    layers = [AuxOutputs(score_maxima=[]) for _ in model.blocks]
    segments = torch.tensor([[0] * 10 + [1] * 10, [0] * 14 + [-1] * 6])
    with torch.no_grad():
        model(tokens_BT, segments=segments, layer_aux=layers)
    return layers


@pytest.mark.parametrize("case", CASES)
def test_factors_multiply_the_scores_of_each_head_alone(case: str) -> None:
    model, tokens_BT = small_model(**CASES[case]).double(), random_tokens(2, 20)
    mixer, factors_H = first_mixer(model), torch.tensor([0.5, 1.0, 0.2, 0.9], dtype=torch.float64)
    (before_H,) = outputs(model, tokens_BT)[0].score_maxima or ()
    parameters = dict(mixer.named_parameters())
    with torch.no_grad():
        for name, factor in mixer.score_factors(factors_H).items():
            parameters[name].mul_(factor)
    (after_H,) = outputs(model, tokens_BT)[0].score_maxima or ()
    torch.testing.assert_close(after_H, factors_H * before_H)


def test_queries_and_keys_of_a_head_share_its_factor() -> None:
    mixer = first_mixer(small_model(**CASES["full"]))
    rows = mixer.score_factors(torch.tensor([0.25, 1.0, 1.0, 1.0]))["qkv.weight"].flatten()
    assert rows.view(3, 4, 16)[:, 0, 0].tolist() == [0.5, 0.5, 1.0]
    assert (rows.view(3, 4, 16)[:, 1:] == 1).all()


def test_the_shared_rotated_key_of_latent_attention_stays() -> None:
    factors = first_mixer(small_model(**CASES["mla"])).score_factors(torch.full((4,), 0.25))
    assert set(factors) == {"project.q.weight", "project.up.weight"}
    assert factors["project.q.weight"].view(4, 12)[0].tolist() == [0.5] * 8 + [0.25] * 4
    assert factors["project.up.weight"].view(4, 16)[0].tolist() == [0.5] * 8 + [1.0] * 8


def recorded(model: LanguageModel, threshold: float, batches: list[torch.Tensor]) -> QKClip:
    clip = QKClip(model, QKClipConfig(threshold=threshold))
    clip.begin_step()
    for tokens_BT in batches:
        clip.record(outputs(model, tokens_BT), AuxOutputs())
    return clip


@pytest.mark.parametrize("case", ["full", "grouped queries", "mla"])
def test_no_score_of_the_step_exceeds_the_threshold_afterwards(case: str) -> None:
    # one layer: with several, the inputs of later ones change too
    model = small_model(**CASES[case], depth=1).double()
    batches = [random_tokens(2, 20), random_tokens(2, 20).flip(0) + 1]
    before_H = recorded(model, 1.0, batches).maxima[0]
    threshold = float(before_H.sort().values[1])
    clip = recorded(model, threshold, batches)
    clip(torch.ones(()))
    torch.testing.assert_close(recorded(model, 1.0, batches).maxima[0], before_H.clamp_max(threshold))
    assert clip.metrics["clipped_heads"] == 2
    assert clip.metrics["score_max"] == before_H.max()


def test_micro_batches_are_joined_by_their_maximum() -> None:
    model, batches = small_model(), [random_tokens(2, 20), random_tokens(2, 20) + 3]
    single = [recorded(model, 1.0, [tokens_BT]).maxima for tokens_BT in batches]
    joined = recorded(model, 1.0, batches).maxima
    for index, maxima_H in joined.items():
        assert torch.equal(maxima_H, torch.maximum(*(maxima[index] for maxima in single)))


@pytest.mark.parametrize("applied,score", [(0.0, 5.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_skipped_steps_and_scores_that_are_not_finite_change_nothing(applied: float, score: float) -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clip = QKClip(model, QKClipConfig(threshold=0.1))
    clip.maxima = {0: torch.tensor([0.1, score])}
    clip(torch.tensor(applied))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


CLIPPED = {"full", "sliding", "mla", "grouped_latent", "asa_local", "differential"}


@pytest.mark.parametrize("name", sorted(mixers))
def test_mixers_are_clipped_or_refused_by_name(name: str) -> None:
    fields = {"model": {"pattern": name}, "training": {"qk_clip": {}}}
    if name in CLIPPED:
        RunConfig.parse(fields)
        return
    with pytest.raises(ConfigError, match=f"qk_clip.missing: got mixer '{name}', whose scores cannot be clipped"):
        RunConfig.parse(fields)


def test_qk_norm_is_refused() -> None:
    fields = {"model": {"mixers": {"full": {"qk_norm": True}}}, "training": {"qk_clip": {}}}
    with pytest.raises(ConfigError, match=r"'full'.*qk_norm"):
        RunConfig.parse(fields)


def test_other_layers_are_skipped_where_asked_for() -> None:
    fields: dict[str, Any] = {"model": {"pattern": "full gdn"}, "training": {"qk_clip": {"missing": "skip"}}}
    assert list(QKClip(LanguageModel(RunConfig.parse(fields).model), QKClipConfig(missing="skip")).mixers) == [0, 2]
    fields["model"]["pattern"] = "gdn"
    with pytest.raises(ConfigError, match="a model with scores to clip"):
        RunConfig.parse(fields)


def test_the_identity_has_no_clip_by_default() -> None:
    assert "qk_clip" not in RunConfig().canonical()["training"]
