"""What training takes, measured on shrunken runs: exact where it is affine in depth."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from workbench.training.config import RunConfig
from workbench.training.probe import PHASES, Measured, measure, measure_shrunken, shrunken

SMALL: dict[str, Any] = {
    "model": {"width": 32, "depth": 8, "vocabulary": 64, "pattern": "gdn full"},
    "training": {"batch_size": 2, "context": 32, "tokens": 6400},
}


def test_peaks_of_the_whole_depth_come_from_shrunken_runs() -> None:
    config = RunConfig.parse({**SMALL, "model": {**SMALL["model"], "pattern": "full", "depth": 12}})
    state, threads = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    told, real = measure_shrunken(config), measure(config)
    assert {p: told.peaks[p] for p in PHASES} == {p: pytest.approx(real.peaks[p], rel=0.01) for p in PHASES}
    parameters = sum(p.numel() for p in _model(config).parameters())
    assert real.peaks["update"] == pytest.approx(16 * parameters, rel=0.02)  # weights, gradients, two moments
    assert real.peaks["checkpoint"] == pytest.approx(20 * parameters, rel=0.02)  # weights, two moments and their copy
    assert real.peak_bytes > real.peaks["update"] and real.seconds > 0
    assert torch.equal(torch.get_rng_state(), state) and torch.are_deterministic_algorithms_enabled() == threads


def test_every_kind_of_block_has_its_own_share() -> None:
    spans = RunConfig.parse(SMALL).model.spans
    gdn, full = spans[:2]
    wanted = [((gdn, full), 0), ((gdn, full, gdn, gdn, gdn), 3), ((gdn, full, full, full, full), 3)]
    assert [(run, more) for run, _, more in shrunken(spans)] == wanted

    def run(config: RunConfig, stream: Any) -> Measured:
        counts = Counter(config.model.spans)
        return Measured(
            1 + 0.5 * counts[gdn] + 0.25 * counts[full], {p: 100 + 30 * counts[gdn] + 7 * counts[full] for p in PHASES}
        )

    config = RunConfig.parse({**SMALL, "model": {**SMALL["model"], "depth": 24}})
    told = measure_shrunken(config, measure=run)
    assert told.seconds == pytest.approx(1 + 0.75 * 12) and told.peak_bytes == 100 + 37 * 12
    few = RunConfig.parse({**SMALL, "model": {**SMALL["model"], "depth": 2}})
    assert measure_shrunken(few, measure=run).peak_bytes == 137, "a model that is no deeper is measured itself"


def test_pairs_with_shortcuts_stay_pairs() -> None:
    model = {**SMALL["model"], "pattern": "full", "depth": 12, "shortcut": "moe"}
    config = RunConfig.parse({**SMALL, "model": model})
    assert [len(run) for run, _, _ in shrunken(config.model.spans)] == [1, 4]
    told, real = measure_shrunken(config), measure(config)
    assert told.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)


def test_accumulated_micro_batches_are_counted() -> None:
    one = measure(RunConfig.parse({**SMALL, "model": {**SMALL["model"], "depth": 2}}))
    four = measure(
        RunConfig.parse({"model": {**SMALL["model"], "depth": 2}, "training": {**SMALL["training"], "accumulate": 8}})
    )
    assert 2 * one.seconds < four.seconds < 40 * one.seconds
    assert four.peak_bytes == pytest.approx(one.peak_bytes, rel=0.25)


def _model(config: RunConfig) -> Any:
    from workbench.model import LanguageModel

    with torch.device("meta"):
        return LanguageModel(config.model)
