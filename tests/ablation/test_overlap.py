"""An ablation measured on text that was trained on: refused, or exploratory with a reason."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench.ablation.ablation import Ablation
from workbench.ablation.folder import AblationFolder
from workbench.ablation.verdict.disclosure import disclose
from workbench.config import ConfigError

pytestmark = pytest.mark.process


@pytest.fixture
def repetitive(tmp_path: Path) -> dict[str, Any]:
    """Data fields of texts made of the same 30 paragraphs in different order: none is a near-duplicate of another."""
    generator = random.Random(0)
    paragraphs = [" ".join(str(generator.randrange(10**6)) for _ in range(80)) for _ in range(30)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02d}.txt").write_text("\n".join(generator.sample(paragraphs, 6)))
    return {"corpus": {"kind": "files", "path": str(folder)}, "evaluation_bytes": 5_000}


def test_mostly_seen_text_is_refused(ablation: Callable[..., Ablation], repetitive: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"report split of which \d\d % is also in the training data"):
        ablation(base={"data": repetitive}, tuning={"trials": 0}).create()


def test_a_reason_makes_the_verdict_exploratory(ablation: Callable[..., Ablation], repetitive: dict[str, Any]) -> None:
    data = {**repetitive, "allow_overlap": "copies on purpose"}
    run = ablation(base={"data": data}, tuning={"trials": 0}).create()
    reason = disclose(AblationFolder(run.folder), AblationFolder(run.folder).record()).exploratory
    assert reason == "measured data mostly seen in training: copies on purpose"


def test_a_reason_that_is_not_needed_changes_nothing(ablation: Callable[..., Ablation]) -> None:
    data = {"allow_overlap": "not needed"}
    run = ablation(base={"data": data}, tuning={"trials": 0}).create()
    assert disclose(AblationFolder(run.folder), AblationFolder(run.folder).record()).exploratory is None
