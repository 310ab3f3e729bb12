"""Wall time of a run from its events."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.results.wall_time import WallTime


def events(*pairs: tuple[str, float]) -> list[dict[str, Any]]:
    return [{"event": name, "at": at} for name, at in pairs]


WHOLE = [("assigned", 10.0), ("started", 12.0), ("first_step", 13.0), ("done", 20.0)]


def test_it_begins_when_a_worker_takes_the_run() -> None:
    assert WallTime.of(events(*WHOLE)) == WallTime(startup=3.0, ended=10.0, began=None, latest=20.0)


def test_a_run_of_its_own_begins_with_its_process() -> None:
    assert WallTime.of(events(*WHOLE[1:])).seconds() == 8.0


def test_the_pause_before_a_resumption_does_not_count() -> None:
    resumed = [("assigned", 100.0), ("resumed", 101.0), ("first_step", 102.0), ("done", 105.0)]
    time = WallTime.of(events(*WHOLE[:3], ("interrupted", 15.0), *resumed))
    assert (time.seconds(), time.startup) == (10.0, 5.0)


def test_of_a_killed_process_the_time_up_to_its_last_event_counts() -> None:
    time = WallTime.of(events(*WHOLE[:3], ("resumed", 100.0), ("done", 101.0)))
    assert time.seconds() == 4.0


def test_a_process_at_work_counts_up_to_now() -> None:
    time = WallTime.of(events(*WHOLE[:3]))
    assert (time.seconds(now=18.0), time.seconds()) == (8.0, 3.0)


def test_what_is_measured_after_the_end_does_not_count() -> None:
    assert WallTime.of(events(*WHOLE, ("suite_failed", 900.0))).seconds() == 10.0


@pytest.mark.parametrize("event", [{}, {"event": "started", "at": "noon"}, {"at": 3.0}, {"event": 4, "at": 1.0}])
def test_damaged_lines_are_left_out(event: dict[str, Any]) -> None:
    assert WallTime.of([event, *events(*WHOLE), event]).seconds() == 10.0


def test_work_that_a_later_process_does_not_continue_is_lost() -> None:
    again = [("assigned", 3700.0), ("started", 3701.0), ("first_step", 3702.0)]
    time = WallTime.of(events(("assigned", 0.0), ("started", 1.0), ("first_step", 2.0), ("crashed", 3600.0), *again))
    assert (time.lost, time.startup) == (3600.0, 2.0)
    assert time.seconds(now=3710.0) - time.lost == 10.0
