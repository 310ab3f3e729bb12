"""Planted instabilities, a few of those of benchmarks/stability.py: which guard notices, what becomes of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stability import measured

pytestmark = pytest.mark.process
STEPS = 40


@pytest.fixture(scope="module")
def results(corpus: Path, cache: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Plant and protection -> what is measured."""
    data = {"corpus": {"kind": "files", "path": str(corpus)}, "evaluation_documents": 3, "evaluation_bytes": 200}
    pairs = [
        ("clean", "loss spike, roll back"),
        ("nan", "none"),
        ("nan", "not_finite, skip"),
        ("corrupt", "loss spike, skip"),
        ("damaged weights", "loss spike, skip"),
        ("damaged weights", "loss spike, roll back"),
    ]
    return {pair: measured(*pair, seed=0, steps=STEPS, data=data, cache=cache) for pair in pairs}


def test_nothing_is_rejected_without_a_fault(results: dict[tuple[str, str], dict[str, Any]]) -> None:
    result = results["clean", "loss spike, roll back"]
    assert (result["status"], result["skipped"], result["rolled_back"]) == ("done", 0, 0)


def test_a_micro_batch_that_is_not_a_number_ends_an_unguarded_run(
    results: dict[tuple[str, str], dict[str, Any]],
) -> None:
    result = results["nan", "none"]
    assert (result["status"], result["step"]) == ("diverged", result["fault_step"])


def test_a_micro_batch_that_is_not_a_number_is_skipped(results: dict[tuple[str, str], dict[str, Any]]) -> None:
    result = results["nan", "not_finite, skip"]
    assert (result["status"], result["skipped"]) == ("done", 1)
    assert result["rejected_at_fault_by"] == ["not_finite"]


def test_a_corrupt_batch_is_a_spike_of_the_loss(results: dict[tuple[str, str], dict[str, Any]]) -> None:
    result = results["corrupt", "loss spike, skip"]
    assert result["rejected_at_fault_by"] == ["loss_spike"] and result["rejected_elsewhere"] == 0


def test_damaged_weights_are_rolled_back(results: dict[tuple[str, str], dict[str, Any]]) -> None:
    skipped, rolled_back = (results["damaged weights", f"loss spike, {action}"] for action in ("skip", "roll back"))
    assert rolled_back["status"] == "done" and rolled_back["rolled_back"] == 1
    assert skipped["rejected_elsewhere"] > rolled_back["rejected_elsewhere"]
