"""Time and memory of a step, measured on shrunken runs: exact where it is affine in depth."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from workbench.model import LanguageModel
from workbench.training.config import RunConfig
from workbench.training.probe import (
    MAX_STEPS,
    MIN_STEPS,
    PHASES,
    WARM_UP_STEPS,
    Measured,
    Meter,
    measure,
    measure_shrunken,
    shrunken,
)

pytestmark = pytest.mark.process

TRAINING = {"batch_size": 2, "context": 32, "tokens": 6400}


def config_of(**model: Any) -> RunConfig:
    fields = {"width": 32, "depth": 8, "vocabulary": 64, "pattern": "gdn full"}
    return RunConfig.parse({"model": {**fields, **model}, "training": TRAINING})


class TestMeasure:
    """A model of twelve layers, measured at full depth and from shrunken runs."""

    @pytest.fixture(scope="class")
    def config(self) -> RunConfig:
        return config_of(pattern="full", depth=12)

    @pytest.fixture(scope="class")
    def real(self, config: RunConfig) -> Measured:
        return measure(config)

    @pytest.fixture(scope="class")
    def predicted(self, config: RunConfig) -> Measured:
        return measure_shrunken(config)

    def test_a_rank_has_its_rows_of_every_micro_batch(self, config: RunConfig) -> None:
        both = config.changed(training=config.training.changed(batch_size=4))
        assert measure(both, ranks=2).peaks == measure(config).peaks

    @pytest.fixture(scope="class")
    def parameters(self, config: RunConfig) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in LanguageModel(config.model).parameters())

    @pytest.mark.parametrize("phase", PHASES)
    def test_shrunken_runs_predict_the_peak_of_every_phase(
        self, phase: str, predicted: Measured, real: Measured
    ) -> None:
        assert predicted.peaks[phase] == pytest.approx(real.peaks[phase], rel=0.01)

    def test_the_update_needs_weights_gradients_and_two_moments(self, real: Measured, parameters: int) -> None:
        assert real.peaks["update"] == pytest.approx(16 * parameters, rel=0.02)

    def test_a_checkpoint_needs_weights_two_moments_and_their_copy(self, real: Measured, parameters: int) -> None:
        assert real.peaks["checkpoint"] == pytest.approx(20 * parameters, rel=0.02)

    def test_activations_make_the_largest_peak(self, real: Measured) -> None:
        assert real.peak_bytes > real.peaks["update"]

    def test_steps_take_time(self, real: Measured) -> None:
        assert real.seconds > 0

    def test_accumulation_needs_no_memory_of_its_own(self) -> None:
        config = config_of(depth=2)
        accumulating = config.changed(training=config.training.changed(accumulate=8))
        assert measure(accumulating).peak_bytes == pytest.approx(measure(config).peak_bytes, rel=0.25)

    def test_the_random_state_is_unchanged(self) -> None:
        before = torch.get_rng_state()
        measure(config_of(depth=2))
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_setting_of_deterministic_algorithms_is_unchanged(self) -> None:
        before = torch.are_deterministic_algorithms_enabled()
        measure(config_of(depth=2))
        assert torch.are_deterministic_algorithms_enabled() == before


class TestShrunken:
    """Which runs are measured, and how they are combined."""

    def test_every_kind_of_block_is_repeated_in_a_run(self) -> None:
        spans = config_of().model.spans
        gdn, full = spans[:2]
        wanted = [((gdn, full), 0), ((gdn, full, gdn, gdn, gdn), 3), ((gdn, full, full, full, full), 3)]
        assert [(run, extra) for run, _, extra in shrunken(spans)] == wanted

    def test_pairs_with_shortcuts_stay_pairs(self) -> None:
        spans = config_of(pattern="full", depth=12, shortcut="moe").model.spans
        assert [len(run) for run, _, _ in shrunken(spans)] == [1, 4]

    def test_affine_costs_are_extrapolated_exactly(self) -> None:
        predicted = measure_shrunken(config_of(depth=24), measure=_affine)
        assert predicted.seconds == pytest.approx(1 + 0.75 * 12)
        assert predicted.peak_bytes == 100 + 37 * 12

    def test_a_model_that_is_no_deeper_is_measured_itself(self) -> None:
        configs: list[RunConfig] = []

        def record(config: RunConfig, stream: Any) -> Measured:
            configs.append(config)
            return _affine(config, stream)

        shallow = config_of(depth=2)
        measure_shrunken(shallow, measure=record)
        assert configs == [shallow]

    def test_a_model_with_shortcuts_is_predicted(self) -> None:
        config = config_of(pattern="full", depth=12, shortcut="moe")
        assert measure_shrunken(config).peak_bytes == pytest.approx(measure(config).peak_bytes, rel=0.01)


class TestMeter:
    """The stopwatch of micro-batches, with times passed in."""

    def run(self, accumulate: int, micro_batch: float, last: float, steps: int, count: float | None = None) -> Meter:
        """Steps whose micro-batches take ``micro_batch`` seconds, the last one with the update ``last``; where it is
        given, each counts before for ``count`` seconds."""
        clock = SimpleNamespace(seconds=0.0)
        meter = Meter(accumulate, now=lambda: clock.seconds)
        step: Any = SimpleNamespace(device=torch.device("cpu"))
        for _ in range(steps):
            meter.begin_step(step, compiled=True)
            for _ in range(0 if count is None else accumulate):
                clock.seconds += count or 0.0
                meter.on_phase("count")
            for index in range(accumulate):
                meter.on_phase("forward")
                clock.seconds += micro_batch if index + 1 < accumulate else last
                meter.on_phase("backward")
            meter.on_phase("update")
            meter.end_step(step)
        return meter

    def test_a_step_is_its_micro_batches_and_the_update(self) -> None:
        meter = self.run(accumulate=3, micro_batch=1.0, last=1.5, steps=WARM_UP_STEPS + MIN_STEPS)
        assert meter.seconds == pytest.approx(3.5)

    def test_more_micro_batches_than_measured_are_extrapolated(self) -> None:
        meter = self.run(accumulate=2, micro_batch=1.0, last=1.5, steps=WARM_UP_STEPS + MIN_STEPS)
        meter.accumulate = 8
        assert meter.seconds == pytest.approx(8.5)

    def test_passes_that_count_are_extrapolated_too(self) -> None:
        meter = self.run(accumulate=2, micro_batch=1.0, last=1.5, steps=WARM_UP_STEPS + MIN_STEPS, count=0.25)
        meter.accumulate = 8
        assert meter.seconds == pytest.approx(8.5 + 8 * 0.25)

    def test_warm_up_steps_are_not_timed(self) -> None:
        assert self.run(accumulate=1, micro_batch=0.0, last=1.0, steps=WARM_UP_STEPS).last_seconds == []

    def test_slow_steps_are_timed_few_times(self) -> None:
        assert self.run(accumulate=1, micro_batch=0.0, last=10.0, steps=WARM_UP_STEPS + MIN_STEPS).done

    def test_fast_steps_are_timed_more_often(self) -> None:
        assert not self.run(accumulate=1, micro_batch=0.0, last=0.01, steps=WARM_UP_STEPS + MAX_STEPS - 1).done

    def test_timing_ends(self) -> None:
        assert self.run(accumulate=1, micro_batch=0.0, last=0.01, steps=WARM_UP_STEPS + MAX_STEPS).done


def _affine(config: RunConfig, stream: Any) -> Measured:
    """Costs that are affine in the number of blocks of each kind."""
    gdn, full = config_of().model.spans[:2]
    counts = Counter(config.model.spans)
    peak = 100 + 30 * counts[gdn] + 7 * counts[full]
    return Measured(1 + 0.5 * counts[gdn] + 0.25 * counts[full], dict.fromkeys(PHASES, peak))
