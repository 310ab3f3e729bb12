"""A hung run is told from a slow one. The clock is made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench.ablation.execution.watchdog import Watchdog
from workbench.results.store import RunFolder

STEP = 0.5


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watchdog(tmp_path: Path, clock: Clock) -> Watchdog:
    return Watchdog(RunFolder(tmp_path), least=10, clock=clock)


def watch(watchdog: Watchdog, clock: Clock, seconds: float) -> float | None:
    """Seconds of silence as soon as they are too many, looking every half second."""
    for _ in range(round(seconds / STEP)):
        clock.now += STEP
        if (silent := watchdog.silent_seconds()) is not None:
            return silent
    return None


def test_a_run_of_unknown_pace_is_hung_after_the_limit(watchdog: Watchdog, clock: Clock) -> None:
    assert watch(watchdog, clock, 9.5) is None
    assert watch(watchdog, clock, 1) == 10.5


@pytest.mark.parametrize("interval", [0.5, 8])
def test_a_slow_run_gets_twenty_median_intervals(watchdog: Watchdog, clock: Clock, interval: float) -> None:
    for step in range(5):
        watchdog.run.add_metrics({"step": step})
        assert watch(watchdog, clock, interval) is None
    limit = max(10, 20 * interval)
    assert watch(watchdog, clock, limit - interval) is None
    assert watch(watchdog, clock, 1) == limit + 0.5


def test_time_in_which_the_watcher_was_suspended_does_not_count(watchdog: Watchdog, clock: Clock) -> None:
    clock.now += 3600
    assert watchdog.silent_seconds() is None
    assert watch(watchdog, clock, 5) is None
    assert watch(watchdog, clock, 0.5) == 10.5
