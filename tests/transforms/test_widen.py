"""Widening: shares of the copies by hand; the conformance suite checks that the function stays."""

from __future__ import annotations

from typing import Any

import torch
from helpers import small_model

from workbench.model import LanguageModel, ModelConfig
from workbench.optimisers import SCALE, optimisers
from workbench.transforms import apply_transforms, transforms

ADAMW = optimisers["adamw"](optimisers["adamw"].Config())
HEADS: dict[str, Any] = {"mixers": {"full": {"head_dim": 16, "heads": 4}}, "feedforwards": {"swiglu": {"hidden": 48}}}
WIDE: dict[str, Any] = {"mixers": {"full": {"head_dim": 16, "heads": 8}}, "feedforwards": {"swiglu": {"hidden": 96}}}


def widened(small: LanguageModel, state: Any = None, **fields: Any) -> tuple[dict[str, torch.Tensor], Any]:
    transform = transforms["widen"](transforms["widen"].Config.parse(fields), ADAMW)
    wide = ModelConfig.parse({**small.config.plain(), **WIDE, "width": 128})
    return apply_transforms([transform], small.state_dict(), state, small.config, wide)


def test_shares_of_copies_add_up_to_the_weight() -> None:
    small = small_model(**HEADS)
    up = small.state_dict()["blocks.0.feedforward.up.weight"]
    for split in ("even", "random"):
        wide = widened(small, split=split)[0]["blocks.0.feedforward.up.weight"]
        gate, gate_copy, value, _ = wide.split(48)  # each part is repeated by itself
        torch.testing.assert_close(gate[:, :64] + gate[:, 64:], up[:48])
        torch.testing.assert_close(gate_copy[:, :64] + gate_copy[:, 64:], up[:48])
        torch.testing.assert_close(value[:, :64] + value[:, 64:], up[48:])
        assert torch.equal(gate[:, :64], gate[:, 64:]) == (split == "even")


def test_a_fresh_state_has_the_scales_of_compensated_weights() -> None:
    small = small_model(**HEADS)
    state = {name: {"exp_avg": p.detach(), SCALE: torch.full_like(p, 2.0)} for name, p in small.named_parameters()}
    weights, new = widened(small, state, optimiser="reset")
    assert all(entry.keys() == {SCALE} for entry in new.values())
    assert all(torch.equal(entry[SCALE], torch.full_like(weights[name], 2.0)) for name, entry in new.items())
