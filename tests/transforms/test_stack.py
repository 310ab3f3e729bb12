"""Stacking: which layer copies which, silent copies, and refusals by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import logits, random_tokens, small_model

from workbench.config import ConfigError
from workbench.model import LanguageModel, ModelConfig
from workbench.optimisers import SCALE, optimisers
from workbench.transforms import apply_transforms, transforms

ADAMW = optimisers["adamw"](optimisers["adamw"].Config())


def stacked(small: LanguageModel, depth: int, state: Any = None, **fields: Any) -> tuple[LanguageModel, Any]:
    transform = transforms["stack"](transforms["stack"].Config.parse(fields), ADAMW)
    config = small.config.changed(depth=depth)
    weights, new_state = apply_transforms([transform], small.state_dict(), state, small.config, config)
    large = LanguageModel(config).to(next(iter(weights.values())).dtype)
    large.load_state_dict(weights)
    return large.eval(), new_state


@pytest.mark.parametrize(("order", "origins"), [("whole", [0, 1, 0, 1]), ("interleaved", [0, 0, 1, 1])])
def test_the_stacked_function_is_the_composed_one(order: str, origins: list[int]) -> None:
    """In fp64: the small model's blocks applied one after the other, in the stated order."""
    small, tokens_BT = small_model().double(), random_tokens(2, 21)
    large, _ = stacked(small, 4, order=order)
    with torch.no_grad():
        x_BTD = small.embedding(tokens_BT)
        for origin in origins:
            x_BTD = small.blocks[origin](x_BTD)
        expected = small.logits(small.norm(x_BTD))
    assert torch.equal(logits(large, tokens_BT), expected)


def test_one_copy_is_the_identity() -> None:
    small, tokens_BT = small_model(), random_tokens(2, 21)
    assert torch.equal(logits(stacked(small, 2)[0], tokens_BT), logits(small, tokens_BT))


@pytest.mark.parametrize("order", ["whole", "interleaved"])
@pytest.mark.parametrize(
    "fields",
    [
        {"pattern": "full", "feedforward": "moe"},
        {"feedforward": "moe", "feedforwards": {"moe": {"zero_experts": 2, "top_k": 3, "gate": True, "shared": 1}}},
    ],
    ids=["experts", "identity_experts"],
)
def test_silent_copies_keep_every_bit(order: str, fields: dict[str, Any]) -> None:
    small, tokens_BT = small_model(**fields), random_tokens(2, 21)
    large, _ = stacked(small, 4, order=order, new_out="zero")
    assert torch.equal(logits(large, tokens_BT), logits(small, tokens_BT))


def test_identity_experts_without_a_gate_are_refused() -> None:
    small = small_model(feedforward="moe", feedforwards={"moe": {"zero_experts": 2, "top_k": 3}})
    with pytest.raises(ConfigError, match=r"model.moe.gate: got .*zero_experts=2.*only a gate silences"):
        stacked(small, 4, new_out="zero")


def test_a_hybrid_whose_period_does_not_tile_is_refused() -> None:
    small, large = (
        ModelConfig.parse({"depth": len(p.split()), "pattern": p}) for p in ("gdn full", "gdn gdn full full")
    )
    reason = r"model.pattern: got .*'gdn' in layer 1, which copies layer 1 .*period of the pattern \(4\) must divide"
    with pytest.raises(ConfigError, match=reason):
        transforms["stack"](transforms["stack"].Config(), ADAMW).check(small, large)


def test_interleaved_copies_of_a_hybrid_need_runs() -> None:
    with pytest.raises(ConfigError, match=r"Interleaved copies need runs of 2 equal layers"):
        stacked(small_model(pattern="gdn full"), 4, order="interleaved")


@pytest.mark.parametrize(
    ("optimiser", "layers"), [("copy", {0, 1, 2, 3}), ("reset", set()), ("reset_new", {0, 1})], ids=lambda v: str(v)
)
def test_optimiser_state_follows_its_parameter(optimiser: str, layers: set[int]) -> None:
    small = small_model()
    state = {name: {"exp_avg": torch.full_like(p, index)} for index, (name, p) in enumerate(small.named_parameters())}
    _, new = stacked(small, 4, state, optimiser=optimiser)
    assert {int(name.split(".")[1]) for name in new if name.startswith("blocks.")} == layers
    for name, entry in new.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[1] = str(int(parts[1]) % 2)
        assert torch.equal(entry["exp_avg"], state[".".join(parts)]["exp_avg"])


@pytest.mark.parametrize("fields", [{"optimiser": "reset"}, {"optimiser": "reset_new", "new_out": "zero"}])
def test_a_fresh_state_has_the_scales_of_compensated_weights(fields: dict[str, Any]) -> None:
    small = small_model()
    state = {name: {"exp_avg": p.detach(), SCALE: torch.full_like(p, 2.0)} for name, p in small.named_parameters()}
    large, new = stacked(small, 4, state, **fields)
    assert new.keys() == {name for name, _ in large.named_parameters()}
    assert all(torch.equal(entry[SCALE], torch.full_like(entry[SCALE], 2.0)) for entry in new.values())
    assert "exp_avg" not in new["blocks.3.mixer.out.weight"]


@pytest.mark.parametrize("base", [{"width": 32}, {"width": 32, "depth": 2}])
def test_a_base_without_a_depth_of_its_own_grows_with_the_model(base: dict[str, Any]) -> None:
    small = small_model(parametrisation={"kind": "mup", "base": base})
    large, _ = stacked(small, 4)
    assert large.config.base_model.depth == base.get("depth", 4)


def test_another_base_is_no_growth() -> None:
    small, large = (
        ModelConfig.parse({"depth": depth, "parametrisation": {"kind": "mup", "base": {"width": width}}})
        for depth, width in ((2, 32), (4, 64))
    )
    with pytest.raises(ConfigError, match=r"model.parametrisation.base.width"):
        transforms["stack"](transforms["stack"].Config(), ADAMW).check(small, large)


def test_selection_biases_are_copied_per_layer() -> None:
    small = small_model(feedforward="moe", feedforwards={"moe": {"bias": "proportional"}})
    name = next(name for name, _ in small.named_buffers() if name.startswith("blocks.1.") and "bias" in name)
    small.get_buffer(name).fill_(0.25)
    large, _ = stacked(small, 4)
    assert torch.equal(large.get_buffer(name.replace("blocks.1.", "blocks.3.")), small.get_buffer(name))
