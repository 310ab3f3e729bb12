"""The estimate of activation bytes."""

from __future__ import annotations

from workbench.ablation.cost.memory import activation_bytes
from workbench.training.config import RunConfig


def test_recomputing_activations_shows_in_the_memory() -> None:
    stored, recomputed = (
        activation_bytes(RunConfig.parse({"model": {"depth": 8}, "training": {"recompute": recompute}}))
        for recompute in (False, True)
    )
    assert stored / 8 < recomputed < stored / 3


def test_activations_grow_with_the_context_not_with_its_square() -> None:
    """Fused attention saves no scores; the meta device must not count them."""
    short, long = (
        activation_bytes(RunConfig.parse({"training": {"context": context, "batch_size": 1, "tokens": 10_000}}))
        for context in (1024, 4096)
    )
    assert 3.9 < long / short < 4.1
