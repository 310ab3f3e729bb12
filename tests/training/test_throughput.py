"""The clock of a run, with times passed in."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.training.config import RunConfig
from workbench.training.throughput import Throughput

CONFIG = RunConfig.parse({"training": {"tokens": 100 * 64, "batch_size": 2, "context": 32}})
TOKENS_PER_STEP = 64


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def started(clock: Clock, *, step: int = 0, seconds: float = 0.0, **settings: Any) -> Throughput:
    throughput = Throughput(CONFIG, now=clock, **settings)
    throughput.seconds = seconds
    throughput.start(step)
    return throughput


def test_speed_is_that_since_the_last_row(clock: Clock) -> None:
    throughput = started(clock)
    clock.seconds += 10
    throughput.row(5)
    clock.seconds += 2
    assert throughput.row(9)["tokens_per_second"] == pytest.approx(4 * TOKENS_PER_STEP / 2)


def test_rows_count_tokens(clock: Clock) -> None:
    assert started(clock).row(5)["tokens"] == 5 * TOKENS_PER_STEP


def test_seconds_continue_those_of_a_checkpoint(clock: Clock) -> None:
    throughput = started(clock, step=5, seconds=30.0)
    clock.seconds += 2
    assert throughput.row(6)["seconds"] == pytest.approx(32.0)


def test_speed_after_a_checkpoint_is_that_of_this_process(clock: Clock) -> None:
    throughput = started(clock, step=5, seconds=30.0)
    clock.seconds += 2
    assert throughput.row(6)["tokens_per_second"] == pytest.approx(TOKENS_PER_STEP / 2)


def test_compilation_is_not_training_time(clock: Clock) -> None:
    throughput = started(clock)
    clock.seconds += 60
    assert throughput.end_first_step(compiled=True) == pytest.approx(60)
    clock.seconds += 2
    row = throughput.row(3)
    assert row["seconds"] == pytest.approx(2)
    assert row["tokens_per_second"] == pytest.approx(2 * TOKENS_PER_STEP / 2)


def test_a_row_of_the_first_compiled_step_alone_has_its_speed(clock: Clock) -> None:
    throughput = started(clock)
    clock.seconds += 60
    throughput.end_first_step(compiled=True)
    assert throughput.row(1)["tokens_per_second"] == pytest.approx(TOKENS_PER_STEP / 60)


def test_without_compilation_the_first_step_is_training_time(clock: Clock) -> None:
    throughput = started(clock)
    clock.seconds += 3
    throughput.end_first_step(compiled=False)
    assert throughput.row(1)["seconds"] == pytest.approx(3)


def test_paused_time_is_not_training_time(clock: Clock) -> None:
    throughput = started(clock)
    clock.seconds += 1
    with throughput.paused():
        clock.seconds += 50
    assert throughput.row(1)["seconds"] == pytest.approx(1)


def test_flops_per_second_count_what_is_seen(clock: Clock) -> None:
    throughput = started(clock, seen_flops=[7.0])
    clock.seconds += 1
    row = throughput.row(1)
    assert row["flops_per_second"] == pytest.approx(7.0 * row["tokens_per_second"])
