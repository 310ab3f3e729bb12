"""Too few seeds are said before anything runs, and nothing is planned from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from workbench.ablation.spec.protocol import Confirmation, seeds_caution
from workbench.ablation.verdict.comparison import ArmMeasurements
from workbench.ablation.verdict.judge import judge
from workbench.ablation.verdict.summary import Launched, summarise
from workbench.dashboards.panels.failures import advice, failure_step


@pytest.mark.parametrize(
    ("seeds", "words"), [(1, "1 seed: no verdict"), (3, "3 seeds: no verdict"), (4, "twice"), (5, "")]
)
def test_few_seeds_are_said_beforehand(seeds: int, words: str) -> None:
    assert words in seeds_caution(seeds) and bool(seeds_caution(seeds)) == bool(words)
    assert Confirmation(seeds=tuple(range(seeds))).caution == seeds_caution(seeds)


LAUNCHED = Launched(
    folder="results/a",
    name="a",
    seeds=(0, 1, 2, 3),
    effect=0.001,
    tokens=1000,
    tokens_per_seed=2000,
    seconds_per_seed=None,
    obstacle="",
    anytime=False,
)


@pytest.mark.parametrize(("seeds", "is_planned"), [(2, False), (4, False), (6, True)])
def test_no_number_of_seeds_is_planned_from_the_sd_of_few(seeds: int, is_planned: bool) -> None:
    rng, sizes = np.random.default_rng(0), np.array([100.0, 300.0])
    arms = [
        ArmMeasurements(arm, {s: (1 + 0.02 * rng.normal()) * sizes for s in range(seeds)}, sizes) for arm in ("a", "b")
    ]
    verdict = judge(arms[0], arms[1:], alpha=0.05, seeds=tuple(range(seeds)), unit="bits per byte", replicates=0)
    steps = " ".join(step.text for step in summarise(verdict, replace(LAUNCHED, seeds=tuple(range(seeds)))).steps)
    assert ("would take" in steps) == is_planned
    if not is_planned:
        assert "5 in all" in steps and "too uncertain to plan by" in steps


def failed(**fields: Any) -> dict[str, Any]:
    return {"status": "diverged", "reason": None, "step": 0, "hyperparameters": "{}", **fields}


def test_a_failure_has_its_step_and_what_to_do() -> None:
    assert failure_step(failed(reason="the loss is not finite at step 1,200")) == 1200
    assert failure_step(failed(reason="the loss is not finite", step=7)) == 7
    text = advice(failed(hyperparameters='{"training.learning_rate": 0.05}'))
    assert text.startswith("Lower training.learning_rate (0.05) or training.clip")
    assert "training.batch_size" in advice(failed(status="out_of_memory"))
