"""Time estimates: from the cost card before runs have ended, then from their wall times."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from workbench.ablation.estimate import RunTimes, card_seconds, describe_total, makespan, total_seconds
from workbench.results.tables import RUN_SCHEMA
from workbench.status import Stage, Status

OVERHEAD = {"startup_seconds": 2.0, "evaluation_seconds": 4.0, "report_seconds": 3.0}
CARD: list[dict[str, Any]] = [
    {"arm": "full", "seconds_per_trial": 10.0, **OVERHEAD},
    {"arm": "gdn", "seconds_per_trial": 20.0, **OVERHEAD},
]


def run(arm: str = "full", stage: str = Stage.TUNING, status: str = Status.DONE, **changes: Any) -> dict[str, Any]:
    done = {"step": 100, "steps": 100, "seconds": 10.0, "wall_seconds": 16.0, "seconds_left": None}
    return {"arm": arm, "stage": stage, "status": status, **done, **changes}


def times(*rows: dict[str, Any], card: list[dict[str, Any]] = CARD) -> RunTimes:
    return RunTimes(pl.DataFrame(list(rows), schema=RUN_SCHEMA, orient="row"), card)


def test_the_card_counts_start_up_evaluation_and_report_documents() -> None:
    assert card_seconds(CARD[0], Stage.TUNING) == times().of("full", Stage.TUNING) == 16.0
    assert card_seconds(CARD[0], Stage.CONFIRMATION) == times().of("full", Stage.CONFIRMATION) == 19.0


@pytest.mark.parametrize("name", ["seconds_per_trial", "startup_seconds", "evaluation_seconds"])
def test_what_was_not_measured_leaves_the_time_open(name: str) -> None:
    assert times(card=[{**CARD[0], name: None}]).of("full", Stage.TUNING) is None


def test_runs_that_have_ended_replace_the_card() -> None:
    found = times(run(wall_seconds=30.0), run(wall_seconds=50.0))
    assert found.of("full", Stage.TUNING) == 40.0


def test_they_carry_over_to_other_arms_and_stages() -> None:
    found = times(run(seconds=20.0, wall_seconds=32.0))  # everything takes twice as long as on the card
    assert found.of("gdn", Stage.TUNING) == pytest.approx(40.0 + 12.0)
    assert found.of("full", Stage.CONFIRMATION) == pytest.approx(20.0 + 18.0)


def test_without_a_card_they_carry_over_as_they_are() -> None:
    assert times(run(), card=[]).of("gdn", Stage.CONFIRMATION) == 16.0


def test_a_run_that_failed_says_nothing() -> None:
    assert times(run(status=Status.DIVERGED, step=1, seconds=0.1, wall_seconds=1.0)).of("full", Stage.TUNING) == 16.0


def test_without_a_card_a_run_at_work_shows_the_least_that_others_take() -> None:
    row = run(status=Status.RUNNING, step=50, seconds=5.0, wall_seconds=9.0, seconds_left=6.0)
    assert times(row, card=[]).of("gdn", Stage.TUNING) == 14.0


def test_a_running_run_takes_what_remains() -> None:
    row = run(status=Status.RUNNING, step=50, seconds=5.0, wall_seconds=9.0, seconds_left=6.0)
    assert times(row).left(row) == 7.0


def test_a_slow_run_takes_at_least_its_own_pace() -> None:
    row = run(status=Status.RUNNING, step=10, seconds=50.0, wall_seconds=60.0, seconds_left=450.0)
    assert times(run(), row).left(row) == 450.0


def test_an_interrupted_run_takes_the_steps_that_are_left() -> None:
    row = run(status=Status.INTERRUPTED, step=75)
    assert times(run()).left(row) == 4.0
    assert times(run()).left(run()) == 0.0


def test_workers_take_the_next_run_when_they_are_free() -> None:
    assert makespan([10.0] * 5, workers=2) == 30.0
    assert makespan([10.0], workers=8) == 10.0
    assert makespan([], workers=0) == 0.0


def test_the_total_is_said_with_all_that_it_contains() -> None:
    card = [{**row, "trials": 3, "seconds_total": 54.0, "suites": 0} for row in CARD]
    assert total_seconds(card, 2) == 54.0
    expected = "Total time: about 54 s with 2 workers (start-up, training and evaluation of 6 runs)."
    assert describe_total(card, 2) == expected
    suites = describe_total([{**row, "suites": 1} for row in card], 1)
    assert suites.endswith("of 6 runs, without evaluation suites).")


def test_training_alone_is_said_to_be_that() -> None:
    card = [{"arm": "full", "seconds_per_trial": 10.0, "trials": 3, "seconds_total": None}]
    assert describe_total(card, 1) == (
        "Training alone: about 30 s with 1 worker; start-up and evaluation were not measured."
    )
    assert describe_total([{**card[0], "seconds_per_trial": None}], 1) == ""
