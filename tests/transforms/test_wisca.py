"""WISCA: norms after the transform, powers of two, refusals by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import logits, random_tokens, small_model

from workbench.config import ConfigError
from workbench.model import LanguageModel, ModelConfig
from workbench.optimisers import optimisers
from workbench.transforms import StartConfig, apply_transforms, transforms

ADAMW = optimisers["adamw"](optimisers["adamw"].Config())
GROUPED: dict[str, Any] = {"mixers": {"full": {"heads": 4, "kv_heads": 2}}}


def applied(model: LanguageModel, kind: str = "wisca", **fields: Any) -> dict[str, torch.Tensor]:
    transform = transforms[kind](transforms[kind].Config.parse(fields), ADAMW)
    return apply_transforms([transform], model.state_dict(), None, model.config, model.config)[0]


def parts(weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values of the first layer, and its output matrix."""
    return (*weights["blocks.0.mixer.qkv.weight"].split((64, 32, 32)), weights["blocks.0.mixer.out.weight"])


@pytest.mark.parametrize("norm", ["sum", "mean"])
def test_paired_norms_are_equal_afterwards(norm: str) -> None:
    q, k, v, out = parts(applied(small_model(**GROUPED), norm=norm))
    for first, second in ((q, k), (v, out)):
        sizes = [float(getattr(side.abs().double(), norm)()) for side in (first, second)]
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)


def test_the_scale_is_the_root_of_the_ratio_of_norms() -> None:
    model = small_model(**GROUPED)
    before, after = parts(model.state_dict()), parts(applied(model))
    scale = (before[1].abs().sum() / before[0].abs().sum()).sqrt()
    torch.testing.assert_close(after[0], before[0] * scale)
    torch.testing.assert_close(after[1], before[1] / scale)


def test_grouped_queries_are_scaled_by_their_number_alone() -> None:
    """Four query heads on one key head: about sqrt(1/4) at the start with the sum, about 1 with the mean."""
    model = LanguageModel(ModelConfig.parse({"mixers": {"full": {"heads": 4, "kv_heads": 1}}}), seed=0)
    before = model.state_dict()["blocks.0.mixer.qkv.weight"][0, 0]
    scales = [float(applied(model, norm=norm)["blocks.0.mixer.qkv.weight"][0, 0] / before) for norm in ("sum", "mean")]
    assert scales == pytest.approx([0.5, 1.0], rel=0.05)


def test_twice_is_once() -> None:
    model = small_model(**GROUPED)
    once = applied(model, granularity="row")
    model.load_state_dict(once)
    twice = applied(model, granularity="row")
    assert all(torch.allclose(twice[name], tensor, rtol=1e-5) for name, tensor in once.items())


def test_powers_of_two_keep_every_bit_in_fp32() -> None:
    model, tokens_BT = small_model(pattern="mla full"), random_tokens(2, 21)
    before = logits(model, tokens_BT)
    model.load_state_dict(applied(model, granularity="row", power_of_two=True))
    assert torch.equal(logits(model, tokens_BT), before)


def test_a_side_of_zeros_is_left_alone() -> None:
    model = small_model()
    with torch.no_grad():
        model.blocks[0].mixer.out.weight.zero_()
    assert all(tensor.isfinite().all() for tensor in applied(model).values())


def test_rescaling_by_hand_is_exact() -> None:
    model = small_model()
    (q, k, v, _), (new_q, new_k, new_v, _) = (
        parts4(model.state_dict()),
        parts4(applied(model, "rescale", scales={"qk": 0.5, "vo": 2.0})),
    )
    assert torch.equal(new_q, q / 2) and torch.equal(new_k, k * 2) and torch.equal(new_v, v * 2)


def parts4(weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return (*weights["blocks.0.mixer.qkv.weight"].chunk(3), weights["blocks.0.mixer.out.weight"])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"pattern": "gdn"}, r"model.mixers.gdn: got no exact rescaling 'vo': the RMS norm between the heads"),
        ({"pattern": "kda"}, r"model.mixers.kda: got no exact rescaling 'qk': queries and keys are scaled to unit"),
        ({"mixers": {"full": {"qk_norm": True}}}, r"model.mixers.full: got no exact rescaling 'qk': the RMS norms"),
        ({"pattern": "nsa"}, r"model.mixers.nsa: got no exact rescaling 'qk': the learned map of a block"),
    ],
)
def test_a_refusal_names_mixer_pair_and_obstacle(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        applied(small_model(**fields))


def test_layers_without_a_pair_may_be_skipped() -> None:
    model = small_model(pattern="gdn full")
    new, old = applied(model, missing="skip"), model.state_dict()
    changed = {name for name, tensor in new.items() if not torch.equal(tensor, old[name])}
    assert changed == {"blocks.1.mixer.qkv.weight", "blocks.1.mixer.out.weight"}


def test_a_model_without_any_pair_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pairs: got .*; expected a pair of this model: up_down"):
        applied(small_model(pattern="gdn"), missing="skip")


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("wisca", {"pairs": ["qk", "ov"]}, r"pairs: got 'ov'; expected a pair: lora, qk.*Nearest valid name"),
        ("rescale", {"scales": {"qk": 2.0, "ov": 0.5}}, r"scales: got 'ov'"),
    ],
)
def test_a_pair_that_no_component_has_is_refused(kind: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        applied(small_model(), kind, **fields)


def test_compensation_belongs_to_training() -> None:
    with pytest.raises(ConfigError, match=r"transforms\[0\]: got .*which acts on the optimiser's state"):
        StartConfig(folder="weights", transforms=[{"kind": "wisca", "state": "compensate"}])


def test_rescaled_moments_follow_the_gradient() -> None:
    model = small_model()
    name = "blocks.0.mixer.out.weight"
    ones = torch.ones_like(model.state_dict()[name])
    transform = transforms["rescale"](
        transforms["rescale"].Config.parse({"scales": {"vo": 2.0}, "state": "rescale"}), ADAMW
    )
    state = {name: {"step": torch.tensor(3.0), "exp_avg": ones, "exp_avg_sq": ones}}
    _, new = apply_transforms([transform], model.state_dict(), state, model.config, model.config)
    assert new is not None  # the output matrix is halved, its gradients double
    assert (float(new[name]["exp_avg"][0, 0]), float(new[name]["exp_avg_sq"][0, 0])) == (2.0, 4.0)
